"""Every wrong argument raises the error of its kind, naming the argument and what would work; a warm call checks no less."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import flashtile
from flashtile.errors import ArgumentError, AttentionError, DtypeError, ShapeError, UnsupportedError

Args = dict[str, Any]


def contiguous() -> Args:
    return {
        "q": torch.randn(2, 1, 4, 16),
        "k_cache": torch.randn(2, 32, 2, 16),
        "v_cache": torch.randn(2, 32, 2, 24),
        "seqlens_k": torch.tensor([5, 32], dtype=torch.int32),
    }


def paged() -> Args:
    return {
        "q": torch.randn(2, 3, 4, 16),
        "k_cache": torch.randn(9, 8, 2, 16),
        "v_cache": torch.randn(9, 8, 2, 16),
        "seqlens_k": torch.tensor([5, 32], dtype=torch.int32),
        "page_table": torch.arange(8, dtype=torch.int32).view(2, 4),
    }


def packed() -> Args:
    return {
        "q": torch.randn(5, 4, 16),
        "k_cache": torch.randn(2, 32, 2, 16),
        "v_cache": torch.randn(2, 32, 2, 16),
        "seqlens_k": torch.tensor([5, 32], dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, 2, 5], dtype=torch.int32),
        "max_seqlen_q": 3,
    }


def quantised() -> Args:
    return {
        "q": torch.randn(3, 1, 4, 16).half(),
        "k_cache": torch.randn(3, 32, 2, 16).to(torch.float8_e4m3fn),
        "v_cache": torch.randn(3, 32, 2, 16).to(torch.float8_e4m3fn),
        "seqlens_k": torch.tensor([5, 32, 7], dtype=torch.int32),
        "k_scale": torch.rand(2),
        "v_scale": torch.rand(3, 2),
    }


@dataclass(frozen=True)
class Bad:
    """``change`` makes a good call wrong; the message must hold each of ``says``."""

    name: str
    base: Callable[[], Args]
    change: Callable[[Args], Args]
    error: type[Exception]
    says: tuple[str, ...]


def with_(**values: Any) -> Callable[[Args], Args]:
    return lambda args: values


def of(name: str, convert: Callable[[torch.Tensor], Any]) -> Callable[[Args], Args]:
    return lambda args: {name: convert(args[name])}


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with a last dimension that is not contiguous."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


NAN, INF = float("nan"), float("inf")
BAD = [
    # ranks and shapes
    Bad("q_rank", contiguous, of("q", lambda t: t[0]), ShapeError, ("q:", "(batch, seqlen_q, num_heads, head_dim)", "cu_seqlens_q")),
    Bad("q_rank_packed", packed, of("q", lambda t: t[None]), ShapeError, ("q:", "(total_q, num_heads, head_dim)", "flatten")),
    Bad("k_rank", contiguous, of("k_cache", lambda t: t[0]), ShapeError, ("k_cache:", "(batch, capacity", "[None]")),
    Bad("v_rank", paged, of("v_cache", lambda t: t[0]), ShapeError, ("v_cache:", "(num_pages, page_size", "[None]")),
    Bad("v_length", contiguous, of("v_cache", lambda t: t[:, :-1]), ShapeError, ("v_cache:", "leading shape")),
    Bad("v_heads", contiguous, of("v_cache", lambda t: t[:, :, :1]), ShapeError, ("v_cache:", "leading shape")),
    Bad("batch_q", contiguous, of("q", lambda t: t[:1]), ShapeError, ("seqlens_k:", "q's 1 sequences", "(batch,)")),
    Bad(
        "batch_k",
        contiguous,
        lambda a: {n: a[n][:1] for n in ("k_cache", "v_cache")},
        ShapeError,
        ("k_cache:", "2 sequences", "page_table"),
    ),
    Bad("lengths_count", contiguous, of("seqlens_k", lambda t: t[:1]), ShapeError, ("seqlens_k:", "(batch,)")),
    Bad("lengths_rank", contiguous, of("seqlens_k", lambda t: t[None]), ShapeError, ("seqlens_k:", "rank 1")),
    Bad(
        "heads_mismatched", contiguous, of("q", lambda t: t[:, :, :3].contiguous()), ShapeError, ("q:", "multiple of k_cache's 2", "got 3")
    ),
    Bad("heads_none", contiguous, of("q", lambda t: t[:, :, :0]), ShapeError, ("q:", "positive multiple")),
    Bad("dim_mismatched", contiguous, of("q", lambda t: t[..., :8].contiguous()), ShapeError, ("k_cache:", "q's head_dim, 8")),
    Bad(
        "dim_not_multiple_of_8",
        contiguous,
        lambda a: {n: a[n][..., :12] for n in ("q", "k_cache")},
        ShapeError,
        ("head_dim:", "multiple of 8", "Pad"),
    ),
    Bad("dim_v_not_multiple_of_8", contiguous, of("v_cache", lambda t: t[..., :12]), ShapeError, ("head_dim_v:", "multiple of 8", "Pad")),
    Bad(
        "dim_too_large",
        contiguous,
        lambda a: {"q": torch.randn(2, 1, 4, 264), "k_cache": torch.randn(2, 32, 2, 264)},
        ShapeError,
        ("head_dim:", "256"),
    ),
    # layouts
    Bad("q_strided", contiguous, of("q", strided), ShapeError, ("q:", "contiguous last dimension", "q.contiguous()")),
    Bad("k_strided", contiguous, of("k_cache", strided), ShapeError, ("k_cache:", "contiguous last dimension", "k_cache.contiguous()")),
    Bad("v_strided", paged, of("v_cache", strided), ShapeError, ("v_cache:", "contiguous last dimension", "v_cache.contiguous()")),
    Bad("lengths_strided", contiguous, of("seqlens_k", strided), ShapeError, ("seqlens_k:", "contiguous")),
    Bad("q_negated", contiguous, of("q", torch._neg_view), ShapeError, ("q:", "view of their negatives", "q.resolve_neg()")),
    Bad("v_cache_negated", paged, of("v_cache", torch._neg_view), ShapeError, ("v_cache:", "view of their negatives")),
    Bad("q_sparse", contiguous, of("q", lambda t: t.to_sparse()), ShapeError, ("q:", "strided tensor", "to_dense")),
    # dtypes
    Bad("q_float64", contiguous, of("q", lambda t: t.double()), DtypeError, ("q:", "float16, bfloat16 or float32", "float64")),
    Bad("k_dtype", contiguous, of("k_cache", lambda t: t.half()), DtypeError, ("k_cache:", "q's dtype", "k_cache.to(q.dtype)")),
    Bad("v_dtype", contiguous, of("v_cache", lambda t: t.bfloat16()), DtypeError, ("v_cache:", "q's dtype", "v_cache.to(q.dtype)")),
    Bad("lengths_int64", contiguous, of("seqlens_k", lambda t: t.long()), DtypeError, ("seqlens_k:", "int32", "seqlens_k.to(torch.int32)")),
    Bad("lengths_list", contiguous, of("seqlens_k", lambda t: t.tolist()), DtypeError, ("seqlens_k:", "torch.Tensor", "list")),
    Bad("q_numpy", contiguous, of("q", lambda t: t.numpy()), DtypeError, ("q:", "torch.Tensor", "ndarray")),
    Bad("q_none", contiguous, with_(q=None), DtypeError, ("q:", "torch.Tensor", "NoneType")),
    # devices
    *(
        Bad(
            f"{name}_device", base, of(name, lambda t: t.to("meta")), ArgumentError, (f"{name}:", "q's device, cpu", f"{name}.to(q.device)")
        )
        for base, name in (
            (contiguous, "k_cache"),
            (contiguous, "v_cache"),
            (contiguous, "seqlens_k"),
            (paged, "page_table"),
            (packed, "cu_seqlens_q"),
        )
    ),
    Bad("q_device", contiguous, of("q", lambda t: t.to("meta")), ArgumentError, ("k_cache:", "q's device, meta")),
    # pages
    Bad("table_int64", paged, of("page_table", lambda t: t.long()), DtypeError, ("page_table:", "int32", "page_table.to(torch.int32)")),
    Bad("table_rank", paged, of("page_table", lambda t: t.flatten()), ShapeError, ("page_table:", "rank 2")),
    Bad("table_rows", paged, of("page_table", lambda t: t[:1]), ShapeError, ("page_table:", "2 rows", "(batch, max_pages)")),
    Bad("table_strided", paged, of("page_table", strided), ShapeError, ("page_table:", "contiguous")),
    Bad("table_missing", paged, with_(page_table=None), ShapeError, ("k_cache:", "2 sequences", "page_table")),
    Bad(
        "page_size_zero",
        paged,
        lambda a: {n: a[n][:, :0] for n in ("k_cache", "v_cache")},
        ShapeError,
        ("k_cache:", "page size of at least 1"),
    ),
    # packed queries
    Bad("starts_int64", packed, of("cu_seqlens_q", lambda t: t.long()), DtypeError, ("cu_seqlens_q:", "int32")),
    Bad("starts_count", packed, of("cu_seqlens_q", lambda t: t[:2]), ShapeError, ("cu_seqlens_q:", "batch + 1 = 3")),
    Bad("starts_strided", packed, of("cu_seqlens_q", strided), ShapeError, ("cu_seqlens_q:", "contiguous")),
    Bad("longest_missing", packed, with_(max_seqlen_q=None), ArgumentError, ("max_seqlen_q:", "Pass an int")),
    Bad("longest_beyond", packed, with_(max_seqlen_q=6), ArgumentError, ("max_seqlen_q:", "total_q (5)")),
    Bad("longest_negative", packed, with_(max_seqlen_q=-1), ArgumentError, ("max_seqlen_q:", "from 0")),
    Bad("longest_tensor", packed, with_(max_seqlen_q=torch.tensor(3)), ArgumentError, ("max_seqlen_q:", "an int")),
    Bad("longest_float", packed, with_(max_seqlen_q=3.0), ArgumentError, ("max_seqlen_q:", "an int")),
    Bad("longest_not_packed", contiguous, with_(max_seqlen_q=2), ArgumentError, ("max_seqlen_q:", "q's seqlen_q, 1")),
    Bad("longest_not_packed_bool", contiguous, with_(max_seqlen_q=True), ArgumentError, ("max_seqlen_q:", "q's seqlen_q, 1")),
    # numbers
    Bad("hint_beyond", contiguous, with_(max_seqlen_k=33), ArgumentError, ("max_seqlen_k:", "capacity, 32", "Leave it out")),
    Bad("hint_beyond_pages", paged, with_(max_seqlen_k=33), ArgumentError, ("max_seqlen_k:", "capacity, 32", "Leave it out")),
    Bad("hint_negative", contiguous, with_(max_seqlen_k=-1), ArgumentError, ("max_seqlen_k:", "from 0")),
    Bad("hint_tensor", contiguous, with_(max_seqlen_k=torch.tensor(5)), ArgumentError, ("max_seqlen_k:", "an int")),
    Bad("window_negative", contiguous, with_(window=(-1, 0)), ArgumentError, ("window (left)", "non-negative", "None")),
    Bad("window_bool", contiguous, with_(window=(True, 0)), ArgumentError, ("window (left)", "non-negative int")),
    Bad("window_float", contiguous, with_(causal=False, window=(4, 2.0)), ArgumentError, ("window (right)", "non-negative int")),
    Bad("window_int", contiguous, with_(window=16), ArgumentError, ("window:", "pair")),
    Bad("window_three", contiguous, with_(window=(1, 2, 3)), ArgumentError, ("window:", "pair")),
    Bad("causal_tensor", contiguous, with_(causal=torch.tensor(True)), ArgumentError, ("causal:", "True or False")),
    Bad("causal_int", contiguous, with_(causal=1), ArgumentError, ("causal:", "True or False")),
    Bad("tf32_int", contiguous, with_(allow_tf32=0), ArgumentError, ("allow_tf32:", "True or False")),
    *(
        Bad(f"softcap_{v}", contiguous, with_(softcap=v), ArgumentError, ("softcap:", "finite"))
        for v in (NAN, INF, torch.tensor(1.0), True, None, "1")
    ),
    Bad("softcap_negative", contiguous, with_(softcap=-1.0), ArgumentError, ("softcap:", "at least 0", "softcap=0.0")),
    *(Bad(f"scale_{v}", contiguous, with_(scale=v), ArgumentError, ("scale:", "finite")) for v in (NAN, INF, torch.tensor(1.0), True, "1")),
    # per head
    Bad("sinks_shape", contiguous, with_(sinks=torch.zeros(2)), ShapeError, ("sinks:", "(4,)", "each query head")),
    Bad("sinks_rank", contiguous, with_(sinks=torch.tensor(1.0)), ShapeError, ("sinks:", "(4,)", "shape ()")),
    Bad("sinks_dtype", contiguous, with_(sinks=torch.zeros(4).half()), DtypeError, ("sinks:", "float32", "sinks.float()")),
    Bad("sinks_strided", contiguous, with_(sinks=torch.zeros(8)[::2]), ShapeError, ("sinks:", "contiguous", "sinks.contiguous()")),
    Bad("sinks_device", contiguous, with_(sinks=torch.zeros(4, device="meta")), ArgumentError, ("sinks:", "q's device")),
    Bad("slopes_shape", contiguous, with_(alibi_slopes=torch.zeros(3, 4)), ShapeError, ("alibi_slopes:", "(4,) or (2, 4)")),
    Bad("slopes_dtype", contiguous, with_(alibi_slopes=torch.zeros(4).double()), DtypeError, ("alibi_slopes:", "float32")),
    # quantised caches
    Bad("q_beside_codes", quantised, of("q", lambda t: t.float()), DtypeError, ("q:", "float16 or bfloat16", "quantised", "float32")),
    Bad("q_in_codes", quantised, of("q", lambda t: t.to(torch.float8_e4m3fn)), DtypeError, ("q:", "float16 or bfloat16", "float8_e4m3fn")),
    Bad("codes_unlike", quantised, of("v_cache", lambda t: t.view(torch.int8)), DtypeError, ("v_cache:", "k_cache's dtype", "int8")),
    Bad("values_unquantised", quantised, of("v_cache", lambda t: t.half()), DtypeError, ("v_cache:", "k_cache's dtype", "float16")),
    Bad("keys_unquantised", quantised, of("k_cache", lambda t: t.half()), DtypeError, ("v_cache:", "k_cache's dtype", "float8_e4m3fn")),
    Bad("codes_of_e5m2", quantised, of("k_cache", lambda t: t.to(torch.float8_e5m2)), DtypeError, ("v_cache:", "float8_e5m2")),
    Bad(
        "codes_of_uint8",
        quantised,
        lambda a: {n: a[n].view(torch.uint8) for n in ("k_cache", "v_cache")},
        DtypeError,
        ("k_cache:", "uint8"),
    ),
    Bad(
        "k_scale_shape",
        quantised,
        with_(k_scale=torch.rand(4)),
        ShapeError,
        ("k_scale:", "one element", "(2,)", "(3, 2)", "shape (4,)"),
    ),
    Bad("v_scale_shape", quantised, with_(v_scale=torch.rand(2, 3)), ShapeError, ("v_scale:", "(3, 2)", "got shape (2, 3)")),
    Bad("v_scale_by_sequence_alone", quantised, with_(v_scale=torch.rand(3)), ShapeError, ("v_scale:", "(2,)", "got shape (3,)")),
    Bad("k_scale_dtype", quantised, of("k_scale", lambda t: t.half()), DtypeError, ("k_scale:", "float32", "k_scale.float()")),
    Bad("k_scale_float", quantised, with_(k_scale=0.5), DtypeError, ("k_scale:", "torch.Tensor", "float")),
    Bad("v_scale_device", quantised, of("v_scale", lambda t: t.to("meta")), ArgumentError, ("v_scale:", "q's device")),
    Bad("k_scale_alone", contiguous, with_(k_scale=torch.ones(1)), ArgumentError, ("k_scale:", "not quantised", "scale=")),
    Bad("v_scale_alone", paged, with_(v_scale=torch.ones(2)), ArgumentError, ("v_scale:", "not quantised")),
    Bad("out_of_codes", quantised, with_(out_dtype=torch.float8_e4m3fn), DtypeError, ("out_dtype:", "float32")),
    # out
    Bad("out_shape", contiguous, with_(out=torch.zeros(2, 1, 4, 16)), ShapeError, ("out:", "(2, 1, 4, 24)", "allocated")),
    Bad("out_dtype_of_out", contiguous, with_(out=torch.zeros(2, 1, 4, 24, dtype=torch.float16)), DtypeError, ("out",)),
    Bad(
        "out_disagrees",
        contiguous,
        with_(out=torch.zeros(2, 1, 4, 24).double(), out_dtype=torch.float32),
        DtypeError,
        ("out:", "float32", "agree"),
    ),
    Bad("out_device", contiguous, with_(out=torch.zeros(2, 1, 4, 24, device="meta")), ArgumentError, ("out:", "q's device")),
    Bad("out_strided", contiguous, with_(out=torch.zeros(2, 1, 4, 48)[..., ::2]), ShapeError, ("out:", "contiguous last")),
    Bad("out_expanded", contiguous, with_(out=torch.zeros(1, 1, 4, 24).expand(2, 1, 4, 24)), ShapeError, ("out:", "expanded", "clone")),
    Bad("out_dtype_half", contiguous, with_(out_dtype=torch.float16), DtypeError, ("out_dtype:", "float32", "merge")),
    Bad("out_dtype_text", contiguous, with_(out_dtype="float32"), DtypeError, ("out_dtype:", "torch.dtype")),
    # plans that cannot be
    Bad("block_m_7", contiguous, with_(block_m=7), AttentionError, ("block_m", "7")),
    Bad("block_m_negative", contiguous, with_(block_m=-16), AttentionError, ("block_m", "-16")),
    Bad("block_m_float", contiguous, with_(block_m=16.0), AttentionError, ("block_m", "16.0")),
    Bad("num_splits_zero", contiguous, with_(num_splits=0), AttentionError, ("num_splits", "0")),
    Bad("num_splits_bool", contiguous, with_(num_splits=True), AttentionError, ("num_splits", "True")),
    Bad("plan_block_m_7", contiguous, lambda a: {"plan": good_plan(block_m=7)}, AttentionError, ("block_m", "7")),
    Bad("plan_splits_zero", contiguous, lambda a: {"plan": good_plan(num_splits=0)}, AttentionError, ("num_splits", "0")),
    Bad("plan_unknown_kernel", contiguous, lambda a: {"plan": good_plan(kernel="no.such")}, UnsupportedError, ("no.such", "cpu.decode")),
    Bad("plan_other_device", contiguous, lambda a: {"plan": good_plan(kernel="triton.decode")}, UnsupportedError, ("triton.decode",)),
    Bad("plan_text", contiguous, with_(plan="fast"), AttentionError, ("plan", "DecodePlan")),
    Bad("plan_and_block_m", contiguous, lambda a: {"plan": good_plan(), "block_m": 64}, AttentionError, ("plan", "block_m")),
]


def good_plan(**changes: Any) -> flashtile.DecodePlan:
    """The planner's own plan for `contiguous`, changed."""
    args = contiguous()
    [plan] = flashtile.warmup([flashtile.Problem.decode(**args)], device="cpu")
    return plan.with_(**changes)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_wrong_argument_is_named(bad: Bad, warm: bool) -> None:
    args = bad.base()
    if warm:
        flashtile.decode(**args)
    wrong = {**args, **bad.change(args)}
    with pytest.raises(bad.error) as caught:
        flashtile.decode(**wrong)
    assert isinstance(caught.value, AttentionError)
    for text in bad.says:
        assert re.search(re.escape(text), str(caught.value)), f"{text!r} is missing in: {caught.value}"


@pytest.mark.parametrize("base", [contiguous, paged, packed])
def test_good_calls_are_good(base: Callable[[], Args]) -> None:
    args = base()
    assert torch.isfinite(flashtile.decode(**args)).all()


def test_swapped_operands_are_what_makes_8_rows() -> None:
    """An 8-row tile of the portable kernel exists only with operands swapped: a plan without it is refused."""
    from flashtile.planner.choose import plan_decode

    problem = flashtile.Problem(batch=2, seqlen_k=4096, num_heads_q=32, num_heads_kv=8)
    device = flashtile.Device.named("a100")
    plan = plan_decode(problem, device)
    with pytest.raises(UnsupportedError, match="swapped"):
        plan_decode(problem, device, plan=plan.with_(block_m=8, swapped=False))


def test_a_message_lists_every_kernel() -> None:
    with pytest.raises(UnsupportedError) as caught:
        flashtile.decode(**contiguous(), plan=good_plan(kernel="triton.decode"))
    assert caught.value.reasons


@pytest.mark.parametrize("name", ["batch", "seqlen_k", "num_heads_q", "head_dim"])
def test_sizes_of_a_problem_are_ints(name: str) -> None:
    for size in ("8", 1.5, None):
        with pytest.raises(ArgumentError, match=f"{name}: expected an int, got"):
            flashtile.Problem(**{name: size})  # type: ignore[arg-type]
