"""torch.compile sees one operator a call, with the plan as text; its results are those of an eager call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashtile
from flashtile.errors import ShapeError
from flashtile.ops import decode as ops
from flashtile.problem import Problem
from flashtile.testing.cases import Case
from flashtile.testing.inputs import make_inputs
from tests.cpu.bound_plans import bound_plans
from tests.cpu.compiling import compiled

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def call(**changes: Any) -> dict[str, Any]:
    return make_inputs(Case("compiled", (9, 30), capacity=40, dtype="float32", **changes)).args


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seqlens_q": (1, 4), "ragged_q": True, "page_size": 8},
        {"window": (7, None), "softcap": 5.0, "sinks": True, "alibi": True, "scale": 0.3, "head_dim_v": 24},
    ],
    ids=["plain", "ragged_paged", "features"],
)
def test_compiled_is_eager(changes: dict[str, Any]) -> None:
    args = call(**changes)

    def double(args: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = flashtile.decode_with_lse(**args)
        return out * 2, lse

    out, lse = compiled(double)(args)
    expected_out, expected_lse = flashtile.decode_with_lse(**args)
    assert torch.equal(out, expected_out * 2)
    assert torch.equal(lse, expected_lse)
    assert torch.equal(compiled(lambda args: flashtile.decode(**args))(args), expected_out)


def test_out_and_out_dtype() -> None:
    args = call()
    expected = flashtile.decode(**args)
    out = torch.zeros_like(expected)
    result = compiled(lambda args, out: flashtile.decode(**args, out=out))(args, out)
    assert torch.equal(out, expected)
    assert torch.equal(result, expected)
    half = {name: args[name].bfloat16() if name in ("q", "k_cache", "v_cache") else args[name] for name in args}
    assert compiled(lambda args: flashtile.decode(**args, out_dtype=torch.float32))(half).dtype == torch.float32


def test_the_plan_crosses_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    args = call()
    [plan] = flashtile.warmup([Problem.decode(**args)], device="cpu")
    bound = bound_plans(ops, monkeypatch)
    step = compiled(lambda args, plan: flashtile.decode(**args, plan=plan))
    for block_m in (32, 64):
        step(args, plan.with_(block_m=block_m))
    assert [plan.block_m for plan in bound] == [32, 64]


def test_a_growing_cache_is_not_compiled_again() -> None:
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    step = torch.compile(lambda q, cache, lengths: flashtile.decode(q, cache, cache, lengths), fullgraph=True, dynamic=True, backend=count)
    q, lengths = torch.randn(2, 1, 4, 16), torch.tensor([5, 20], dtype=torch.int32)
    for capacity in (30, 31, 65, 130):
        cache = torch.randn(2, capacity, 2, 16)
        assert torch.equal(step(q, cache, lengths), flashtile.decode(q, cache, cache, lengths))
    assert graphs == 1


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_quantised_cache_and_its_scales(dtype: torch.dtype) -> None:
    args = call()
    stored = {name: (20 * args[name]).to(dtype) for name in ("k_cache", "v_cache")}
    args |= stored | {"q": args["q"].bfloat16(), "k_scale": torch.rand(args["k_cache"].shape[2]) / 20, "v_scale": torch.tensor(0.05)}
    out = compiled(lambda args: flashtile.decode(**args))(args)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, flashtile.decode(**args))


def test_errors_are_flashtiles_own() -> None:
    args = call()
    with pytest.raises(ShapeError, match="q: expected shape"):
        compiled(lambda args: flashtile.decode(**args))(args | {"q": args["q"][0]})


def test_checked_reaches_into_a_compiled_call() -> None:
    args = call() | {"seqlens_k": torch.tensor([9, 99], dtype=torch.int32)}
    step = compiled(lambda args: flashtile.decode(**args))
    step(args)
    with flashtile.checked(), pytest.raises(flashtile.ArgumentError, match=r"seqlens_k\[1\]"):
        step(args)


@pytest.mark.parametrize("want_lse", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck(ragged: bool, want_lse: bool) -> None:
    args = call(seqlens_q=(1, 4), ragged_q=True, sinks=True) if ragged else call(head_dim_v=24)
    torch.library.opcheck(
        torch.ops.flashtile.decode.default,
        (
            args["q"], args["k_cache"], args["v_cache"], args["seqlens_k"], None, args["cu_seqlens_q"], args["max_seqlen_q"], None,
            True, 5, None, 0.0, None, args["sinks"], *[None] * 8, False, False, want_lse,
        ),
    )  # fmt: skip
