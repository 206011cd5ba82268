"""flash_attn_with_kvcache of both generations, its plans, and the merge of parts."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import flashtile.flash_attn_interface as three
from flashtile.errors import ArgumentError, DtypeError, ShapeError, UnsupportedError
from flashtile.flash_attn import flash_attn_with_kvcache
from flashtile.flash_attn.cache import FORWARD_ROWS, prefers_attention
from flashtile.planner.choose import plan_decode, plan_forward
from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan, ForwardPlan
from flashtile.problem import Problem
from flashtile.testing.pairwise import pairwise
from flashtile.testing.parity import Parity
from flashtile.testing.parity_cache import Layout, assert_cache_parity, placed

pytestmark = pytest.mark.usefixtures("one_thread")

CAPACITY = 120
AXES = {
    "lengths": tuple((queries, CAPACITY) for queries in (1, 3, 65, 260)),
    "heads": ((4, 4), (6, 1), (6, 2)),
    "head_dim": (59, 64, 128, 256),
    "dtype": ("float16", "bfloat16"),
    "mask": ({}, {"causal": True}, {"window_size": (19, 5)}, {"causal": True, "window_size": (30, -1)}),
    "features": ({}, {"alibi": True}, {"softcap": 15.0}),
    "layout": ("full", "int", "lengths", "batch index", 1, 16, 256),
    "num_splits": (0, 1, 3),
}
ROWS = pairwise(AXES, seed=3)


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_parity(row: dict[str, Any]) -> None:
    case = Parity.of({name: value for name, value in row.items() if name not in ("layout", "num_splits")})
    cache = placed(case, row["layout"])
    q, k, v, slopes = (cache.tensors.get(name) for name in ("q", "k", "v", "alibi_slopes"))
    args = case.scores | {"num_splits": row["num_splits"], "return_softmax_lse": True}
    out, lse = flash_attn_with_kvcache(q, k, v, alibi_slopes=slopes, **cache.given, **args)
    assert_cache_parity(case, cache, out, lse, math.inf)
    if slopes is None:
        out, lse, *parts = three.flash_attn_with_kvcache(q, k, v, **cache.given_to_three(), **args)
        assert parts == [None, None]
        assert_cache_parity(case, cache, out, lse, -math.inf)


@pytest.mark.parametrize("queries", [1, 5, 200])
@pytest.mark.parametrize("num_splits", [0, 2])
def test_packed_queries(queries: int, num_splits: int) -> None:
    case = Parity((queries, 2), CAPACITY, heads=(4, 2), causal=True)
    cache = placed(case, "lengths")
    tensors, given, _ = cache
    out, lse, *_ = three.flash_attn_with_kvcache(
        tensors["q"], tensors["k"], tensors["v"], cu_seqlens_q=tensors["cu_seqlens_q"], max_seqlen_q=max(queries, 2), causal=True,
        num_splits=num_splits, return_softmax_lse=True, **given,
    )  # fmt: skip
    assert_cache_parity(case, cache, out, lse, -math.inf)
    with pytest.raises(ArgumentError, match="max_seqlen_q"):
        three.flash_attn_with_kvcache(tensors["q"], tensors["k"], tensors["v"], cu_seqlens_q=tensors["cu_seqlens_q"], **given)


def test_a_larger_cache_than_there_are_sequences() -> None:
    tensors = Parity(1, 30, batch=4).tensors()
    q, k, v = tensors["q"][:2], tensors["k"], tensors["v"]
    assert torch.equal(flash_attn_with_kvcache(q, k, v), flash_attn_with_kvcache(q, k[:2], v[:2]))


def test_no_gradient_and_no_wait_for_lengths() -> None:
    tensors = Parity(1, 30).tensors()
    q = tensors["q"].requires_grad_()
    for queries in (1, 200):
        out = flash_attn_with_kvcache(q.expand(-1, queries, -1, -1), tensors["k"], tensors["v"], cache_seqlens=9)
        assert not out.requires_grad


@pytest.mark.parametrize("queries", [1, 200])
@pytest.mark.parametrize("layout", ["lengths", 16])
def test_compilers_see_one_graph(queries: int, layout: Layout) -> None:
    tensors, given, _ = placed(Parity(queries, CAPACITY, heads=(4, 2)), layout)
    q, k, v = (tensors[name] for name in ("q", "k", "v"))
    compiled = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    out, lse = compiled(q, k, v, causal=True, return_softmax_lse=True, **given)
    expected, expected_lse = flash_attn_with_kvcache(q, k, v, causal=True, return_softmax_lse=True, **given)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@pytest.mark.parametrize("queries", [1, 200])
def test_plans_made_ahead_are_obeyed(queries: int) -> None:
    case = Parity(queries, CAPACITY, heads=(4, 2), causal=True)
    cache = placed(case, "lengths")
    tensors, given, _ = cache
    plan = three.get_scheduler_metadata(2, queries, CAPACITY, 4, 2, 64, given["cache_seqlens"], causal=True)
    assert isinstance(plan, DecodePlan if queries == 1 else (DecodePlan, ForwardPlan))
    args: dict[str, Any] = {"causal": True, "scheduler_metadata": plan, "return_softmax_lse": True}
    out, lse, *_ = three.flash_attn_with_kvcache(tensors["q"], tensors["k"], tensors["v"], **given, **args)
    assert_cache_parity(case, cache, out, lse, -math.inf)
    odd = DecodePlan(kernel="gluon.decode_sm90", block_m=64)
    with pytest.raises(UnsupportedError, match=r"gluon\.decode_sm90"):
        three.flash_attn_with_kvcache(tensors["q"], tensors["k"], tensors["v"], scheduler_metadata=odd)
    with pytest.raises(ArgumentError, match="scheduler_metadata"):
        three.flash_attn_with_kvcache(tensors["q"], tensors["k"], tensors["v"], scheduler_metadata=given["cache_seqlens"])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch", [2, 0])
def test_no_query_is_valid_with_either_plan(packed: bool, batch: int) -> None:
    k = torch.ones(batch, CAPACITY, 2, 64)
    facts = Problem(batch=batch, total_q=0, seqlen_k=CAPACITY, num_heads_q=4, num_heads_kv=2, head_dim=64, dtype_q="float32", lse=True)
    whole = facts.with_(operation="forward", page_size=CAPACITY, ragged_q=True, seqused_k=True)
    starts = torch.zeros(batch + 1, dtype=torch.int32)
    given: dict[str, Any] = {"cu_seqlens_q": starts, "max_seqlen_q": 0} if packed else {}
    q, heads_first = (torch.ones(0, 4, 64), (4, 0)) if packed else (torch.ones(batch, 0, 4, 64), (batch, 4, 0))
    for plan in (plan_decode(facts, Device.of(k)), plan_forward(whole, Device.of(k))):
        lengths = torch.ones(batch, dtype=torch.int32)
        args = given | {"cache_seqlens": lengths, "scheduler_metadata": plan, "return_softmax_lse": True}
        out, lse, *_ = three.flash_attn_with_kvcache(q, k, k, **args)
        assert out.shape == q.shape and lse.shape == heads_first


@pytest.mark.parametrize("queries", [1, 4, 700])
@pytest.mark.parametrize("layout", ["lengths", 16])
def test_plans_made_ahead_are_those_of_the_call(queries: int, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H200, where plans differ more than on a CPU."""
    h200 = Device.named("h200")
    monkeypatch.setattr("flashtile.flash_attn_interface.caches.Device", SimpleNamespace(of=lambda tensor: h200))
    q, k, v = torch.zeros(8, queries, 32, 128), torch.zeros(8, 1024, 8, 128), torch.zeros(8, 1024, 8, 72)
    lengths, table = torch.ones(8, dtype=torch.int32), None
    if layout == 16:
        k, v = (x.view(512, 16, 8, x.shape[-1]) for x in (k, v))
        table = torch.zeros(8, 64, dtype=torch.int32)
    q, k, v = (x.to(torch.float16) for x in (q, k, v))
    args: dict[str, Any] = {"causal": True, "softcap": 20.0}
    if queries < 700:
        expected: Any = plan_decode(Problem.decode(q, k, v, lengths, page_table=table, window=(300, 0), **args), h200)
    else:
        table = torch.zeros(8, 1, dtype=torch.int32) if table is None else table
        starts = torch.zeros(9, dtype=torch.int32)
        paged = {"page_table": table, "seqused_k": lengths, "window": (300, 0), "lse": True}
        expected = plan_forward(Problem.forward(q.flatten(0, 1), k, v, starts, None, queries, **paged, **args), h200)
    page_size = 16 if layout == 16 else None
    plan = three.get_scheduler_metadata(
        8, queries, 1024, 32, 8, 128, lengths, torch.float16, 72, page_size=page_size, causal=True, window_size=(300, 0), has_softcap=True
    )
    assert plan == expected


def test_plans_know_splits_and_pages() -> None:
    lengths = torch.ones(1, dtype=torch.int32)
    plan = three.get_scheduler_metadata(1, 1, 8192, 8, 1, 100, lengths, headdim_v=44, page_size=16, num_splits=5, has_softcap=True)
    assert isinstance(plan, DecodePlan) and plan.num_splits == 5


def test_many_queries_go_where_the_device_has_work_for_them() -> None:
    sms = 132
    assert not prefers_attention(1, 64 * 128, sms)
    assert not prefers_attention(FORWARD_ROWS - 1, 10_000, sms)
    assert prefers_attention(4096, 32, sms)
    assert not prefers_attention(128, 32, sms), "a program for each of 32 tiles leaves 100 SMs idle: decode splits the keys"


@pytest.mark.parametrize(
    "argument",
    [{"qv": torch.ones(1)}, {"q_descale": torch.ones(1)}, {"attention_chunk": 16}],
    ids=lambda argument: next(iter(argument)),
)  # fmt: skip
def test_what_the_third_generation_alone_has_is_refused(argument: dict[str, Any]) -> None:
    tensors = Parity(1, 9).tensors()
    (name,) = argument
    with pytest.raises(UnsupportedError, match=name):
        three.flash_attn_with_kvcache(tensors["q"], tensors["k"], tensors["v"], **argument)


def test_plans_refuse_what_calls_refuse() -> None:
    with pytest.raises(UnsupportedError, match="attention_chunk"):
        three.get_scheduler_metadata(1, 1, 64, 4, 4, 64, torch.ones(1, dtype=torch.int32), attention_chunk=7)


def test_wrong_indices() -> None:
    tensors = Parity(1, 9).tensors()
    q, k, v = (tensors[name] for name in ("q", "k", "v"))
    with pytest.raises(ShapeError, match="cache_batch_idx"):
        flash_attn_with_kvcache(q, k, v, cache_batch_idx=torch.zeros(3, dtype=torch.int32))
    indices = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ArgumentError, match="cache_batch_idx"):
        flash_attn_with_kvcache(q, k, v, cache_batch_idx=indices, block_table=indices[:, None])


@pytest.mark.parametrize("given_out", [False, True])
def test_combine(given_out: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    outs, lses = torch.randn(3, 2, 5, 4, 32, generator=rng), torch.randn(3, 2, 5, 4, generator=rng) * 4
    lses[1, 0] = -math.inf
    lses[:, 1, 2] = -math.inf
    room = torch.empty(2, 5, 4, 32, dtype=torch.bfloat16)
    out, lse = three.flash_attn_combine(outs, lses, room) if given_out else three.flash_attn_combine(outs, lses, out_dtype=torch.bfloat16)
    assert (out is room) == given_out and out.dtype == torch.bfloat16
    shares = torch.softmax(lses.double(), dim=0).nan_to_num(0.0)[..., None]
    torch.testing.assert_close(out.double(), (outs.double() * shares).sum(0), atol=0.0, rtol=2.0**-8)
    torch.testing.assert_close(lse, lses.logsumexp(0))
    assert lse.shape == (2, 5, 4) and lse.transpose(1, 2).is_contiguous()
    assert three.flash_attn_combine(outs, lses)[0].dtype == torch.float32


def test_parts_that_do_not_fit_are_refused() -> None:
    outs, lses = torch.zeros(3, 2, 5, 4, 32), torch.zeros(3, 2, 5, 4)
    with pytest.raises(ShapeError, match="lse_partial"):
        three.flash_attn_combine(outs, lses.transpose(2, 3))
    with pytest.raises(DtypeError, match="out_dtype"):
        three.flash_attn_combine(outs, lses, outs[0], torch.bfloat16)
