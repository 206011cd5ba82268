"""Every wrong argument of attention and attention_varlen raises one error that names it and what would work; a warm call checks no less."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashtile
from flashtile.errors import ArgumentError, AttentionError, DtypeError, ShapeError, UnsupportedError

Args = dict[str, Any]
Change = Callable[[Args], Args]


def plain() -> Args:
    return {"q": torch.randn(2, 3, 4, 16), "k": torch.randn(2, 32, 2, 16), "v": torch.randn(2, 32, 2, 24)}


def packed() -> Args:
    return {
        "q": torch.randn(5, 4, 16),
        "k": torch.randn(40, 2, 16),
        "v": torch.randn(40, 2, 16),
        "cu_seqlens_q": torch.tensor([0, 2, 5], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 9, 40], dtype=torch.int32),
        "max_seqlen_q": 3,
    }


def paged() -> Args:
    return {
        **packed(),
        "k": torch.randn(9, 8, 2, 16),
        "v": torch.randn(9, 8, 2, 16),
        "cu_seqlens_k": None,
        "page_table": torch.arange(8, dtype=torch.int32).view(2, 4),
        "seqused_k": torch.tensor([5, 32], dtype=torch.int32),
    }


def call(args: Args) -> torch.Tensor:
    return (flashtile.attention_varlen if "cu_seqlens_q" in args else flashtile.attention)(**args)


def with_(**values: Any) -> Change:
    return lambda args: values


def of(convert: Callable[[torch.Tensor], Any], *names: str) -> Change:
    return lambda args: {name: convert(args[name]) for name in names}


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with a last dimension that is not contiguous."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def good_plan(**changes: Any) -> flashtile.ForwardPlan:
    """The planner's own plan for `plain`, changed."""
    [plan] = flashtile.warmup([flashtile.Problem.forward(**plain())], device="cpu")
    assert isinstance(plan, flashtile.ForwardPlan)
    return plan.with_(**changes)


def on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


def narrow(dims: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor[..., :dims].contiguous()


NAN, INF = float("nan"), float("inf")
PER_HEAD = torch.zeros(4)
# (a good call, what makes it wrong, the error, what its message must hold)
BAD: dict[str, tuple[Callable[[], Args], Change, type[Exception], tuple[str, ...]]] = {
    # ranks and shapes
    "q_rank": (plain, of(lambda t: t[0], "q"), ShapeError, ("q:", "(batch, seqlen_q, num_heads, head_dim)", "attention_varlen")),
    "q_rank_packed": (packed, of(lambda t: t[None], "q"), ShapeError, ("q:", "(total_q, num_heads, head_dim)", "flatten")),
    "q_rank_zero": (plain, with_(q=torch.tensor(1.0)), ShapeError, ("q:", "got shape ()")),
    "k_rank": (plain, of(lambda t: t[0], "k"), ShapeError, ("k:", "(batch, seqlen_k, num_heads_kv, head_dim)", "use attention_varlen")),
    "v_rank": (plain, of(lambda t: t[0], "v"), ShapeError, ("v:", "(batch, seqlen_k")),
    "k_rank_packed": (packed, of(lambda t: t[None], "k"), ShapeError, ("k:", "(total_k, num_heads_kv, head_dim)", "page_table")),
    "v_rank_packed": (packed, of(lambda t: t[None], "v"), ShapeError, ("v:", "(total_k, num_heads_kv, head_dim)")),
    "k_rank_paged": (paged, of(lambda t: t.flatten(0, 1), "k"), ShapeError, ("k:", "(num_pages, page_size", "cu_seqlens_k")),
    "v_length": (plain, of(lambda t: t[:, :-1], "v"), ShapeError, ("v:", "k's leading shape (2, 32, 2)")),
    "v_heads": (plain, of(lambda t: t[:, :, :1], "v"), ShapeError, ("v:", "leading shape")),
    "v_length_packed": (packed, of(lambda t: t[:-1], "v"), ShapeError, ("v:", "k's leading shape (40, 2)")),
    "v_pages": (paged, of(lambda t: t[:-1], "v"), ShapeError, ("v:", "leading shape")),
    "batch": (plain, of(lambda t: t[:1], "k", "v"), ShapeError, ("k:", "q's 2 sequences", "first dimension")),
    "heads_mismatched": (plain, of(lambda t: t[:, :, :3].contiguous(), "q"), ShapeError, ("q:", "multiple of k's 2", "got 3")),
    "heads_first": (plain, of(lambda t: t.transpose(1, 2), "q", "k", "v"), ShapeError, ("q:", "k's 32", "got 3", ".transpose(-3, -2)")),
    "heads_none": (plain, of(lambda t: t[:, :, :0], "q"), ShapeError, ("q:", "positive multiple")),
    "dim_mismatched": (plain, of(narrow(8), "q"), ShapeError, ("k:", "q's head_dim, 8", "got 16")),
    "dim_mismatched_packed": (packed, of(narrow(8), "q"), ShapeError, ("k:", "q's head_dim, 8")),
    "dim_not_multiple_of_8": (plain, of(narrow(12), "q", "k"), ShapeError, ("head_dim:", "multiple of 8", "Pad")),
    "dim_v_not_multiple_of_8": (plain, of(narrow(12), "v"), ShapeError, ("head_dim_v:", "multiple of 8", "Pad")),
    "dim_too_large": (
        plain,
        with_(q=torch.zeros(2, 3, 4, 264), k=torch.zeros(2, 32, 2, 264)),
        ShapeError,
        ("head_dim:", "256", "No kernel has longer heads"),
    ),
    # layouts
    "q_strided": (plain, of(strided, "q"), ShapeError, ("q:", "contiguous last dimension", "q.contiguous()")),
    "k_strided": (plain, of(strided, "k"), ShapeError, ("k:", "contiguous last dimension", "k.contiguous()")),
    "v_strided": (packed, of(strided, "v"), ShapeError, ("v:", "contiguous last dimension", "v.contiguous()")),
    "k_negated": (plain, of(torch._neg_view, "k"), ShapeError, ("k:", "view of their negatives", "k.resolve_neg()")),
    "q_sparse": (plain, of(lambda t: t.to_sparse(), "q"), ShapeError, ("q:", "strided tensor", "to_dense")),
    "q_nested": (plain, of(lambda t: torch.nested.nested_tensor(list(t)), "q"), ShapeError, ("q:", "nested", "attention_varlen")),
    # dtypes
    "q_float64": (plain, of(lambda t: t.double(), "q"), DtypeError, ("q:", "float16, bfloat16 or float32", "float64")),
    "k_dtype": (plain, of(lambda t: t.half(), "k"), DtypeError, ("k:", "q's dtype", "k.to(q.dtype)")),
    "v_dtype": (paged, of(lambda t: t.bfloat16(), "v"), DtypeError, ("v:", "q's dtype", "v.to(q.dtype)")),
    "q_numpy": (plain, of(lambda t: t.numpy(), "q"), DtypeError, ("q:", "torch.Tensor", "ndarray")),
    "k_none": (plain, with_(k=None), DtypeError, ("k:", "torch.Tensor", "NoneType")),
    "used_list": (paged, of(lambda t: t.tolist(), "seqused_k"), DtypeError, ("seqused_k:", "torch.Tensor", "list")),
    **{
        f"{name}_int64": (base, of(lambda t: t.long(), name), DtypeError, (f"{name}:", "int32", f"{name}.to(torch.int32)"))
        for base, name in ((packed, "cu_seqlens_q"), (packed, "cu_seqlens_k"), (paged, "seqused_k"), (paged, "page_table"))
    },
    **{
        f"{name}_strided": (base, of(strided, name), ShapeError, (f"{name}:", "contiguous"))
        for base, name in ((packed, "cu_seqlens_q"), (packed, "cu_seqlens_k"), (paged, "seqused_k"), (paged, "page_table"))
    },
    # devices
    **{
        f"{name}_device_{base.__name__}": (base, of(on_meta, name), ArgumentError, (f"{name}:", "q's device, cpu", f"{name}.to(q.device)"))
        for base, names in (
            (plain, ("k", "v")),
            (packed, ("k", "v", "cu_seqlens_q", "cu_seqlens_k")),
            (paged, ("page_table", "seqused_k")),
        )
        for name in names
    },
    # where sequences start, how long they are
    "starts_missing": (packed, with_(cu_seqlens_q=None), ArgumentError, ("cu_seqlens_q:", "cu_seqlens_k", "attention, unpacked")),
    "starts_rank": (packed, of(lambda t: t[None], "cu_seqlens_q"), ShapeError, ("cu_seqlens_q:", "rank 1")),
    "starts_rank_zero": (packed, with_(cu_seqlens_q=torch.tensor(1, dtype=torch.int32)), ShapeError, ("cu_seqlens_q:", "rank 1")),
    "starts_none": (packed, of(lambda t: t[:0], "cu_seqlens_q"), ShapeError, ("cu_seqlens_q:", "batch + 1", "total_q")),
    "starts_k_missing": (packed, with_(cu_seqlens_k=None), ArgumentError, ("cu_seqlens_k:", "page_table and seqused_k")),
    "starts_k_count": (packed, of(lambda t: t[:2], "cu_seqlens_k"), ShapeError, ("cu_seqlens_k:", "batch + 1 = 3", "total_k")),
    "longest_missing": (packed, with_(max_seqlen_q=None), ArgumentError, ("max_seqlen_q:", "Pass an int")),
    "longest_beyond": (packed, with_(max_seqlen_q=6), ArgumentError, ("max_seqlen_q:", "total_q (5)")),
    "longest_negative": (packed, with_(max_seqlen_q=-1), ArgumentError, ("max_seqlen_q:", "from 0")),
    "longest_tensor": (packed, with_(max_seqlen_q=torch.tensor(3)), ArgumentError, ("max_seqlen_q:", "an int")),
    "longest_bool": (packed, with_(max_seqlen_q=True), ArgumentError, ("max_seqlen_q:", "an int")),
    "hint_beyond": (packed, with_(max_seqlen_k=41), ArgumentError, ("max_seqlen_k:", "all keys of k, 40", "Leave it out")),
    "hint_beyond_pages": (paged, with_(max_seqlen_k=33), ArgumentError, ("max_seqlen_k:", "pages of a sequence, 32", "Leave it out")),
    "hint_negative": (packed, with_(max_seqlen_k=-1), ArgumentError, ("max_seqlen_k:", "from 0")),
    "hint_float": (paged, with_(max_seqlen_k=8.0), ArgumentError, ("max_seqlen_k:", "an int")),
    "used_count": (packed, with_(seqused_k=torch.zeros(3, dtype=torch.int32)), ShapeError, ("seqused_k:", "2 numbers", "(batch,)")),
    "used_rank": (paged, of(lambda t: t[None], "seqused_k"), ShapeError, ("seqused_k:", "rank 1")),
    # pages
    "table_rank": (paged, of(lambda t: t.flatten(), "page_table"), ShapeError, ("page_table:", "rank 2")),
    "table_rank_zero": (paged, with_(page_table=torch.tensor(1, dtype=torch.int32)), ShapeError, ("page_table:", "rank 2")),
    "table_rows": (paged, of(lambda t: t[:1], "page_table"), ShapeError, ("page_table:", "2 rows", "(batch, max_pages)")),
    "table_missing": (paged, with_(page_table=None), ArgumentError, ("cu_seqlens_k:", "page_table")),
    "table_and_starts": (paged, with_(cu_seqlens_k=torch.zeros(3, dtype=torch.int32)), ArgumentError, ("cu_seqlens_k:", "page_table")),
    "table_without_used": (paged, with_(seqused_k=None), ArgumentError, ("seqused_k:", "page_table", "(batch,) int32")),
    "page_size_zero": (paged, of(lambda t: t[:, :0], "k", "v"), ShapeError, ("k:", "page size of at least 1")),
    # numbers and switches
    "window_negative": (plain, with_(window=(-1, 0)), ArgumentError, ("window (left)", "non-negative", "None")),
    "window_float": (plain, with_(window=(4, 2.0)), ArgumentError, ("window (right)", "non-negative int")),
    "window_int": (plain, with_(window=16), ArgumentError, ("window:", "pair")),
    "causal_int": (plain, with_(causal=1), ArgumentError, ("causal:", "True or False")),
    "deterministic_int": (plain, with_(deterministic=1), ArgumentError, ("deterministic:", "True or False")),
    "tf32_int": (plain, with_(allow_tf32=0), ArgumentError, ("allow_tf32:", "True or False")),
    "softcap_negative": (plain, with_(softcap=-1.0), ArgumentError, ("softcap:", "at least 0", "softcap=0.0")),
    **{
        f"{name}_{value}": (plain, with_(**{name: value}), ArgumentError, (f"{name}:", "finite"))
        for name in ("softcap", "scale")
        for value in (NAN, INF, torch.tensor(1.0), True, "1")
    },
    # per head
    "sinks_shape": (plain, with_(sinks=torch.zeros(2)), ShapeError, ("sinks:", "(4,)", "each query head")),
    "sinks_dtype": (packed, with_(sinks=PER_HEAD.half()), DtypeError, ("sinks:", "float32", "sinks.float()")),
    "all_on_meta": (plain, of(on_meta, "q", "k", "v"), UnsupportedError, ("device:", "CUDA, ROCm or CPU", "meta")),
    "sinks_device": (plain, with_(sinks=on_meta(PER_HEAD)), ArgumentError, ("sinks:", "q's device")),
    "sinks_rank": (plain, with_(sinks=torch.tensor(1.0)), ShapeError, ("sinks:", "(4,)", "shape ()")),
    "slopes_shape": (packed, with_(alibi_slopes=torch.zeros(3, 4)), ShapeError, ("alibi_slopes:", "(4,) or (2, 4)")),
    "slopes_dtype": (plain, with_(alibi_slopes=PER_HEAD.double()), DtypeError, ("alibi_slopes:", "float32")),
    "slopes_strided": (plain, with_(alibi_slopes=torch.zeros(8)[::2]), ShapeError, ("alibi_slopes:", "contiguous")),
    # out
    "out_shape": (plain, with_(out=torch.zeros(2, 3, 4, 16)), ShapeError, ("out:", "(2, 3, 4, 24)", "allocated")),
    "out_dtype": (plain, with_(out=torch.zeros(2, 3, 4, 24).double()), DtypeError, ("out:", "float32", "float64", "allocated")),
    "out_device": (plain, with_(out=torch.zeros(2, 3, 4, 24, device="meta")), ArgumentError, ("out:", "q's device")),
    "out_strided": (plain, with_(out=torch.zeros(2, 3, 4, 48)[..., ::2]), ShapeError, ("out:", "contiguous last")),
    "out_expanded": (plain, with_(out=torch.zeros(1, 3, 4, 24).expand(2, 3, 4, 24)), ShapeError, ("out:", "expanded", "clone")),
    # gradients
    **{
        f"{name}_gradient_paged": (
            paged,
            of(lambda t: t.requires_grad_(), name),
            UnsupportedError,
            ("page_table:", "pack k and v", "detach"),
        )
        for name in ("q", "k", "v")
    },
    "slopes_gradient": (
        packed,
        lambda a: {"alibi_slopes": PER_HEAD.clone().requires_grad_()},
        UnsupportedError,
        ("alibi_slopes:", "sinks"),
    ),
    "out_gradient": (plain, lambda a: {"out": torch.zeros(2, 3, 4, 24, requires_grad=True)}, ArgumentError, ("out:", "torch.no_grad()")),
    "out_and_gradient": (
        plain,
        lambda a: {"q": a["q"].requires_grad_(), "out": torch.zeros(2, 3, 4, 24)},
        ArgumentError,
        ("out:", "leave it out"),
    ),
    "wrong_and_gradient": (plain, lambda a: {"q": a["q"].requires_grad_(), "k": a["k"].half()}, DtypeError, ("k:", "q's dtype")),
    # plans that cannot be
    "block_m_zero": (plain, with_(block_m=0), ArgumentError, ("block_m:", "at least 1")),
    "block_m_float": (plain, with_(block_m=16.0), ArgumentError, ("block_m:", "16.0")),
    "block_m_bool": (plain, with_(block_m=True), ArgumentError, ("block_m:", "True")),
    "plan_block_m": (plain, lambda a: {"plan": good_plan(block_m=0)}, ArgumentError, ("plan:", "block_m", "got 0")),
    "plan_unknown_kernel": (plain, lambda a: {"plan": good_plan(kernel="no.such")}, UnsupportedError, ("no.such", "cpu.forward")),
    "plan_other_device": (plain, lambda a: {"plan": good_plan(kernel="triton.forward")}, UnsupportedError, ("triton.forward", "cpu")),
    "plan_of_decode": (plain, with_(plan=flashtile.DecodePlan("cpu.decode", 16)), ArgumentError, ("plan:", "a ForwardPlan", "DecodePlan")),
    "plan_text": (plain, with_(plan="fast"), ArgumentError, ("plan:", "from_json")),
    "plan_and_block_m": (plain, lambda a: {"plan": good_plan(block_m=32), "block_m": 64}, ArgumentError, ("block_m:", "32", "got 64")),
}


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("name", BAD)
def test_wrong_argument_is_named(name: str, warm: bool) -> None:
    base, change, error, says = BAD[name]
    args = base()
    if warm:
        call(args)
    with pytest.raises(error) as caught:
        call({**args, **change(args)})
    assert isinstance(caught.value, AttentionError)
    for text in says:
        assert text in str(caught.value)


@pytest.mark.parametrize("base", [plain, packed, paged])
def test_good_calls_are_good(base: Callable[[], Args]) -> None:
    assert torch.isfinite(call(base())).all()
