"""Small calls of attention and attention_varlen with their gradients, for tests of what stands around the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import flashtile
from flashtile.testing.backward_inputs import Gradients
from flashtile.testing.forward_cases import ForwardCase
from flashtile.testing.forward_inputs import ForwardInputs, make_forward_inputs

NAMES = ("q", "k", "v", "sinks")


def plain(**changes: Any) -> ForwardInputs:
    shape = {"batch": 2, "head_dim": 16, "dtype": "float32", "num_heads_q": 4, "num_heads_kv": 2, "sinks": True, "causal": True} | changes
    return make_forward_inputs(ForwardCase("plain", 9, 30, **shape))


def varlen(**changes: Any) -> ForwardInputs:
    shape = {"head_dim": 16, "dtype": "float32", "num_heads_q": 4, "num_heads_kv": 2, "sinks": True} | changes
    return make_forward_inputs(ForwardCase("varlen", (9, 4), (30, 12), **shape))


def run(args: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return (flashtile.attention_varlen_with_lse if "cu_seqlens_q" in args else flashtile.attention_with_lse)(**args)


def with_leaves(args: dict[str, Any], names: tuple[str, ...] = NAMES) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The arguments with those of ``names`` that are there as leaves that need a gradient, and these leaves."""
    leaves = {name: args[name].detach().requires_grad_() for name in names if args[name] is not None}
    return args | leaves, list(leaves.values())


def gradients(inputs: ForwardInputs, dout: torch.Tensor | None, dlse: torch.Tensor | None, *, of: Callable[..., Any] = run) -> Gradients:
    """What autograd finds for q, k, v and sinks."""
    args, leaves = with_leaves(inputs.args)
    results = [(result, flows) for result, flows in zip(of(args), (dout, dlse)) if flows is not None]
    found = torch.autograd.grad([result for result, _ in results], leaves, [flows for _, flows in results])
    return Gradients(*found[:3], found[3] if len(found) > 3 else None)


def same(found: Gradients, expected: Gradients) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected))
