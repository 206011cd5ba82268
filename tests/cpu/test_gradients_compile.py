"""Gradients under torch.compile, torch.export and opcheck: operators of their own, whose gradients are those of an eager call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import checkpoint

import flashtile
from flashtile.errors import UnsupportedError
from flashtile.ops import backward as backward_ops
from flashtile.planner.device import Device
from flashtile.planner.plans import BackwardPlan
from flashtile.problem import Problem
from flashtile.testing.forward_cases import ForwardCase
from flashtile.testing.forward_inputs import make_forward_inputs
from tests.cpu.compiling import compiled

NAMES = ("q", "k", "v", "sinks")
ARGUMENTS = (
    "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "page_table", "seqused_k", "causal", "window_left",
    "window_right", "softcap", "scale", "sinks", "alibi_slopes", "block_m", "plan", "allow_tf32", "deterministic", "want_lse",
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def plain(**changes: Any) -> dict[str, Any]:
    return make_forward_inputs(
        ForwardCase("plain", 9, 30, **({"batch": 2, "head_dim": 16, "dtype": "float32", "padding": 0} | changes))
    ).args


def varlen(**changes: Any) -> dict[str, Any]:
    return make_forward_inputs(ForwardCase("varlen", (9, 4), (30, 5), **({"head_dim": 16, "dtype": "float32"} | changes))).args


def loss(args: dict[str, Any]) -> torch.Tensor:
    """A loss of both results; leaves go through an operation first, so that they are no leaves to the operator."""
    function = flashtile.attention_varlen_with_lse if "cu_seqlens_q" in args else flashtile.attention_with_lse
    out, lse = function(**args | {"q": args["q"] * 2})
    return out.sin().sum() + lse.clamp(min=-50).square().sum()


def leaves_of(args: dict[str, Any]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    leaves = {name: args[name].detach().requires_grad_() for name in NAMES if args[name] is not None}
    return args | leaves, list(leaves.values())


@pytest.mark.parametrize(
    "args",
    [
        plain(causal=True),
        plain(window=(7, None), softcap=5.0, sinks=True, alibi=True, scale=0.3, head_dim_v=24, num_heads_q=4),
        plain(layout="HND", causal=True, dtype="bfloat16"),
        varlen(seqused_k=(20, 5), causal=True, sinks=True),
    ],
    ids=["plain", "features", "hnd", "packed"],
)
def test_compiled_is_eager(args: dict[str, Any]) -> None:
    args, leaves = leaves_of(args)
    expected = torch.autograd.grad(loss(args), leaves)
    for found, wanted in zip(torch.autograd.grad(compiled(loss)(args), leaves), expected):
        assert torch.equal(found, wanted)


def test_of_out_alone() -> None:
    args, leaves = leaves_of(plain(sinks=True))
    expected = torch.autograd.grad(flashtile.attention(**args).sin().sum(), leaves)
    found = torch.autograd.grad(compiled(lambda args: flashtile.attention(**args).sin().sum())(args), leaves)
    assert all(torch.equal(*pair) for pair in zip(found, expected))


def test_other_lengths_are_not_compiled_again() -> None:
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def step(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return flashtile.attention(q, k, k, causal=True).square().sum()

    traced = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    graphs_so_far = []
    for seqlen in (30, 31, 65, 130):
        leaves = [torch.randn(2, n, h, 16, requires_grad=True) for n, h in ((seqlen, 4), (seqlen + 3, 2))]
        expected = torch.autograd.grad(step(*leaves), leaves)
        for found, wanted in zip(torch.autograd.grad(traced(*leaves), leaves), expected):
            assert torch.equal(found, wanted)
        graphs_so_far.append(graphs)
    assert graphs_so_far == [graphs_so_far[0]] * 4


@pytest.mark.parametrize(("wish", "expected"), [(None, [False, True]), (True, [True, True]), (False, [False, False])])
def test_compiled_gradients_are_as_deterministic_as_asked_or_as_torch_is(
    wish: bool | None, expected: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, asked = backward_ops.plan_backward, []

    def note(problem: Problem, device: Device) -> BackwardPlan:
        asked.append(problem.deterministic)
        return planned(problem, device)

    monkeypatch.setattr(backward_ops, "plan_backward", note)
    args, leaves = leaves_of(plain(causal=True))
    traced = compiled(lambda args: flashtile.attention(**args, deterministic=wish).square().sum())
    for torchs in (False, True):
        monkeypatch.setattr(backward_ops, "_PREPARED", {})
        torch.use_deterministic_algorithms(torchs)  # torch refuses to change it between a compiled forward and its backward
        try:
            torch.autograd.grad(traced(args), leaves)
        finally:
            torch.use_deterministic_algorithms(False)
    assert asked == expected


def test_under_autocast() -> None:
    args, leaves = leaves_of(plain(sinks=True))
    traced = compiled(loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, found = traced(args), loss(args)
    assert torch.equal(value, found)
    for grad, wanted in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(found, leaves)):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, wanted)


def test_an_operator_takes_tensors_as_they_come() -> None:
    args = plain()
    expected, _ = torch.ops.flashtile.forward(*operands(args))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = torch.ops.flashtile.forward(*operands(args))
    assert torch.equal(out, expected)
    assert out.dtype == torch.float32


def test_with_activation_checkpointing() -> None:
    args, leaves = leaves_of(plain(sinks=True))
    expected = torch.autograd.grad(loss(args), leaves)
    traced = compiled(lambda args: checkpoint(loss, args, use_reentrant=False))
    for found, wanted in zip(torch.autograd.grad(traced(args), leaves), expected):
        assert torch.equal(found, wanted)


def test_an_eager_call_followed_by_compiled_autograd() -> None:
    args, leaves = leaves_of(varlen(causal=True, sinks=True))
    loss(args).backward()
    expected = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    value = loss(args)
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        value.backward()
    for leaf, wanted in zip(leaves, expected):
        torch.testing.assert_close(leaf.grad, wanted)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)
        self.sinks = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 16).unbind(2)
        return flashtile.attention(q, k, v, causal=True, sinks=self.sinks).flatten(2)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_module_trains(strict: bool) -> None:
    block, x = Block(), torch.randn(2, 12, 32)
    exported = torch.export.export(block, (x,), dynamic_shapes=({1: torch.export.Dim("seqlen", min=2, max=512)},), strict=strict).module()
    for seqlen in (12, 40):
        x = torch.randn(2, seqlen, 32)
        expected = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
        found = torch.autograd.grad(exported(x).square().sum(), list(exported.parameters()))
        for grad, wanted in zip(found, expected):
            torch.testing.assert_close(grad, wanted)


# The operators themselves


def operands(args: dict[str, Any], **others: Any) -> tuple[Any, ...]:
    known = {"causal": True, "softcap": 0.0, "allow_tf32": False, "want_lse": True} | {n: args[n] for n in ARGUMENTS if n in args} | others
    return tuple(known.get(name) for name in ARGUMENTS)


@pytest.mark.parametrize(
    "args",
    [plain(head_dim_v=24, sinks=True), plain(layout="HND", dtype="bfloat16"), varlen(sinks=True), varlen(seqused_k=(3, 5))],
    ids=["plain", "hnd", "packed", "used"],
)
def test_opcheck_of_forward_with_gradients(args: dict[str, Any]) -> None:
    torch.library.opcheck(torch.ops.flashtile.forward.default, operands(leaves_of(args)[0], window_left=5))


@pytest.mark.parametrize("through_lse", [False, True])
@pytest.mark.parametrize("args", [plain(head_dim_v=24, sinks=True, layout="HND"), varlen(seqused_k=(3, 5))], ids=["plain", "packed"])
def test_opcheck_of_backward(args: dict[str, Any], through_lse: bool) -> None:
    out, lse = torch.ops.flashtile.forward(*operands(args))
    torch.library.opcheck(
        torch.ops.flashtile.backward.default,
        (
            args["q"], args["k"], args["v"], out, lse, torch.randn_like(out), torch.randn_like(lse) if through_lse else None,
            *(args.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_k")),
            True, None, None, 0.0, None, args["sinks"], None, False, None, True,
        ),
    )  # fmt: skip


def test_the_operator_needs_its_lse_and_has_one_derivative() -> None:
    args, leaves = leaves_of(plain())
    with pytest.raises(UnsupportedError, match="want_lse: "):
        torch.ops.flashtile.forward(*operands(args, want_lse=False))
    out, _ = torch.ops.flashtile.forward(*operands(args))
    first = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    with pytest.raises(UnsupportedError, match="no second derivative"):
        torch.autograd.grad(first[0].sum(), leaves)
