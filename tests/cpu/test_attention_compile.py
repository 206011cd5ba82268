"""torch.compile sees one operator for attention and attention_varlen; results, plans, errors and refusals are those of an eager call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashtile
from flashtile.errors import ArgumentError, ShapeError, UnsupportedError
from flashtile.ops import forward as ops
from flashtile.problem import Problem
from flashtile.testing.forward_cases import ForwardCase
from flashtile.testing.forward_inputs import make_forward_inputs
from tests.cpu.bound_plans import bound_plans
from tests.cpu.compiling import compiled

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def plain(**changes: Any) -> dict[str, Any]:
    return make_forward_inputs(ForwardCase("plain", 9, 30, batch=2, head_dim=16, dtype="float32", **changes)).args


def varlen(**changes: Any) -> dict[str, Any]:
    return make_forward_inputs(ForwardCase("varlen", (9, 4), (30, 5), head_dim=16, dtype="float32", **changes)).args


def run(args: dict[str, Any], **others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    function = flashtile.attention_varlen_with_lse if "cu_seqlens_q" in args else flashtile.attention_with_lse
    return function(**args, **others)


@pytest.mark.parametrize(
    "args",
    [
        plain(causal=True),
        plain(window=(7, None), softcap=5.0, sinks=True, alibi=True, scale=0.3, head_dim_v=24),
        varlen(seqused_k=(20, 5), causal=True),
        varlen(page_size=8, sinks=True),
    ],
    ids=["plain", "features", "packed", "paged"],
)
def test_compiled_is_eager(args: dict[str, Any]) -> None:
    def double(args: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = run(args)
        return out * 2, lse

    out, lse = compiled(double)(args)
    expected_out, expected_lse = run(args)
    assert torch.equal(out, expected_out * 2)
    assert torch.equal(lse, expected_lse)


def test_without_lse() -> None:
    assert torch.equal(compiled(lambda args: flashtile.attention(**args))(plain()), flashtile.attention(**plain()))
    assert torch.equal(compiled(lambda args: flashtile.attention_varlen(**args))(varlen()), flashtile.attention_varlen(**varlen()))


def test_out_is_written() -> None:
    args = plain()
    expected = flashtile.attention(**args)
    out = torch.zeros_like(expected)
    assert torch.equal(compiled(lambda args, out: flashtile.attention(**args, out=out))(args, out), expected)
    assert torch.equal(out, expected)


def test_the_plan_crosses_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    args = plain()
    [plan] = flashtile.warmup([Problem.forward(**args)], device="cpu")
    bound = bound_plans(ops, monkeypatch)
    step = compiled(lambda args, plan: flashtile.attention(**args, plan=plan))
    for block_m in (32, 64):
        step(args, plan.with_(block_m=block_m))
    compiled(lambda args: flashtile.attention(**args, block_m=16))(args)
    assert [plan.block_m for plan in bound] == [32, 64, 16]


def test_prompts_of_other_lengths_are_not_compiled_again() -> None:
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    step = torch.compile(lambda q, k: flashtile.attention(q, k, k, causal=True), fullgraph=True, dynamic=True, backend=count)
    for seqlen in (30, 31, 65, 130):
        q, k = torch.randn(2, seqlen, 4, 16), torch.randn(2, seqlen + 3, 2, 16)
        assert torch.equal(step(q, k), flashtile.attention(q, k, k, causal=True))
    assert graphs == 1


def test_errors_are_flashtiles_own() -> None:
    args = plain()
    with pytest.raises(ShapeError, match="q: expected shape"):
        compiled(lambda args: flashtile.attention(**args))(args | {"q": args["q"][0]})
    with pytest.raises(ArgumentError, match="plan: expected a ForwardPlan or None, got dict"):
        torch.compile(lambda args: flashtile.attention(**args, plan={}), backend="aot_eager")(args)


@pytest.mark.parametrize(
    ("args", "name", "says"),
    [
        (plain(alibi=True), "alibi_slopes", "alibi_slopes: expected a tensor that needs no gradient"),
        (varlen(page_size=8), "q", "page_table:"),
    ],
    ids=["slopes", "paged"],
)
def test_what_has_no_gradient_is_refused_and_none_is_needed_without_grad_mode(args: dict[str, Any], name: str, says: str) -> None:
    expected = run(args)[0]
    args[name].requires_grad_()
    with pytest.raises(UnsupportedError, match=says):
        torch.compile(lambda args: run(args), backend="aot_eager")(args)
    with pytest.raises(Exception, match=says):  # of torch's own, where a whole graph is asked for
        compiled(lambda args: run(args))(args)
    with torch.no_grad():
        out = compiled(lambda args: run(args)[0])(args)
    assert torch.equal(out, expected)
    assert not out.requires_grad


def test_checked_reaches_into_a_compiled_call() -> None:
    args = varlen(seqused_k=(20, 5))
    step = compiled(lambda args: flashtile.attention_varlen(**args))
    step(args)
    args["seqused_k"][1] = 6
    with flashtile.checked(), pytest.raises(flashtile.ArgumentError, match=r"seqused_k\[1\]"):
        step(args)


@pytest.mark.parametrize("want_lse", [False, True])
@pytest.mark.parametrize("args", [plain(head_dim_v=24), varlen(sinks=True), varlen(page_size=8)], ids=["plain", "packed", "paged"])
def test_opcheck(args: dict[str, Any], want_lse: bool) -> None:
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "page_table", "seqused_k")
    torch.library.opcheck(
        torch.ops.flashtile.forward.default,
        (*map(args.get, names), True, 5, None, 0.0, None, args["sinks"], None, None, None, False, None, want_lse),
    )
