"""Small calls of attention and attention_varlen, for tests of what stands around the kernels."""

from __future__ import annotations

from typing import Any

import torch

import flashtile
from flashtile.testing.forward_cases import ForwardCase
from flashtile.testing.forward_inputs import make_forward_inputs


def plain(**changes: Any) -> dict[str, Any]:
    shape = {"batch": 2, "head_dim": 16, "dtype": "float32", "num_heads_q": 4, "num_heads_kv": 2} | changes
    return make_forward_inputs(ForwardCase("plain", 9, 30, **shape)).args


def varlen(**changes: Any) -> dict[str, Any]:
    shape = {"head_dim": 16, "dtype": "float32", "num_heads_q": 4, "num_heads_kv": 2} | changes
    return make_forward_inputs(ForwardCase("varlen", (9, 4), (30, 12), **shape)).args


def run(args: dict[str, Any], **others: Any) -> torch.Tensor:
    return (flashtile.attention_varlen if "cu_seqlens_q" in args else flashtile.attention)(**args, **others)


def run_with_lse(args: dict[str, Any], **others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return (flashtile.attention_varlen_with_lse if "cu_seqlens_q" in args else flashtile.attention_with_lse)(**args, **others)
