"""FlashAttention-3's functions for inference: attention over a cache, its plan ahead of the call, and the merge of parts."""

from __future__ import annotations

import torch

from flashtile.api import merge
from flashtile.band import Band
from flashtile.errors import ArgumentError, DtypeError, ShapeError, message
from flashtile.flash_attn.cache import attend_cache, prefers_attention
from flashtile.flash_attn.conventions import lse_of_three, window_of
from flashtile.flash_attn.refusals import check_supported
from flashtile.planner.choose import plan_decode, plan_forward
from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan, ForwardPlan
from flashtile.problem import Problem
from flashtile.rounding import length_bucket, query_bucket

WithLse = tuple[torch.Tensor, torch.Tensor, None, None]


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    qv: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: DecodePlan | ForwardPlan | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> torch.Tensor | WithLse:
    """FlashAttention-3's function of this name, by `flashtile.decode`; many queries by attention over pages. No gradients.

    Args:
        q: (batch, seqlen_q, nheads, head_dim), or with ``cu_seqlens_q`` packed (total_q, nheads, head_dim).
        k_cache: (batch_cache, capacity, nheads_k, head_dim), or with ``page_table`` (num_pages, page_size, nheads_k, head_dim), any
            page size; v_cache the same with a last dimension of its own.
        k, v: new keys and values (batch, seqlen_new, nheads_k, head_dim), or with ``cu_seqlens_k_new`` (batch + 1,) int32 packed
            (total_new, nheads_k, head_dim): written into the caches at ``cache_seqlens`` before anything is read, by one launch.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2): turns k at its positions, and q at its own: beside causal or a window each
            query at the next position, else all at the first. Positions begin at ``cache_seqlens``, or at ``rotary_seqlens`` (batch,).
        cache_seqlens: the keys of each sequence before the new ones, an int or (batch,) int32; by default the cache is full.
        cache_batch_idx: (batch,) integers: the entry of the cache that is each sequence's; by default the first ones in order.
        cache_leftpad: (batch,) int32: where each sequence's keys begin; ``cache_seqlens`` counts from the beginning of the cache.
        page_table: (batch, max_pages) int32: the pages of each sequence in order.
        cu_seqlens_q: (batch + 1,) int32, where each sequence's queries start; ``max_seqlen_q`` is the most of one sequence then.
        k_descale, v_descale: (batch, nheads_k) float32: what a key or value of a float8 or int8 cache is, over what is stored. q has 16
            bits an element beside it.
        softmax_scale, causal, window_size, softcap: as for `flash_attn_func`.
        rotary_interleaved: pairs of elements are neighbours; else half a rotary_dim apart.
        scheduler_metadata: what `get_scheduler_metadata` returned for such a call, or any plan of flashtile's: it is obeyed.
        num_splits: how many programs share a sequence's keys; 0 leaves it to the planner.
        pack_gqa: a hint that changes no result: `decode` always packs the query heads that share a key head.
        sm_margin: a hint that changes no result: no SMs are left free.
        return_softmax_lse: returns (out, softmax_lse, None, None) instead of out: partial results are not kept.

    Returns:
        out: (batch, seqlen_q, nheads, head_dim_v), or (total_q, nheads, head_dim_v).
        softmax_lse: (batch, nheads, seqlen_q) or (nheads, total_q) float32, natural logarithm; -inf for a query that sees no key.

    Raises:
        UnsupportedError: for qv, q_descale and attention_chunk.
    """
    if qv is not None or q_descale is not None or attention_chunk:
        check_supported("flash_attn_with_kvcache", qv=qv, q_descale=q_descale, attention_chunk=attention_chunk)
    if scheduler_metadata is not None:
        _check_plan(scheduler_metadata)
    out, lse = attend_cache(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, page_table, cu_seqlens_q,
        cu_seqlens_k_new, max_seqlen_q, rotary_seqlens, k_descale, v_descale, softmax_scale, causal, window_size, softcap,
        rotary_interleaved, None, scheduler_metadata, num_splits, return_softmax_lse,
    )  # fmt: skip
    return out if lse is None else (out, lse_of_three(lse, k_cache.shape[:2].numel()), None, None)


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: torch.Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> DecodePlan | ForwardPlan:
    """The plan of a call of `flash_attn_with_kvcache`, made ahead; ``cache_seqlens`` only says on which device.

    ``max_seqlen_k`` counts the new keys too, so that ``cu_seqlens_k_new`` and ``max_seqlen_k_new`` change nothing; pack_gqa and
    sm_margin are hints.

    Raises:
        UnsupportedError: no kernel can run the call, or attention_chunk is given.
    """
    check_supported("get_scheduler_metadata", attention_chunk=attention_chunk)
    device = Device.of(cache_seqlens)
    packed = cu_seqlens_q is not None
    dim, dim_v = headdim + -headdim % 8, headdim if headdim_v is None else headdim_v
    whole = cache_leftpad is None and num_splits <= 1 and prefers_attention(max_seqlen_q, batch_size * num_heads_q, device.num_sms)
    queries = query_bucket(max_seqlen_q) if packed or whole else max_seqlen_q
    facts = Problem(
        batch=batch_size, seqlen_q=queries, total_q=batch_size * queries, seqlen_k=length_bucket(max_seqlen_k), num_heads_q=num_heads_q,
        num_heads_kv=num_heads_kv, head_dim=dim, head_dim_v=dim_v + -dim_v % 8, dtype_q=str(qkv_dtype).removeprefix("torch."),
        band=Band.of(causal, window_of(window_size)), softcap=has_softcap, page_size=page_size or 0, ragged_q=packed,
        leftpad_k=cache_leftpad is not None,
    )  # fmt: skip
    if not whole:
        return plan_decode(facts, device, num_splits=num_splits or None)
    page = page_size or max_seqlen_k
    return plan_forward(facts.with_(operation="forward", ragged_q=True, seqused_k=True, lse=True, page_size=page), device)


def flash_attn_combine(
    out_partial: torch.Tensor, lse_partial: torch.Tensor, out: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention-3's function of this name, by `flashtile.merge`.

    Args:
        out_partial: (num_splits, batch, seqlen, nheads, head_dim_v), results over parts of the keys.
        lse_partial: (num_splits, batch, seqlen, nheads) float32; -inf where a part saw no key.
        out: where to write, (batch, seqlen, nheads, head_dim_v).
        out_dtype: of the result; by default out's, else out_partial's.

    Returns:
        out: (batch, seqlen, nheads, head_dim_v).
        softmax_lse: (batch, seqlen, nheads) float32, as a view of (batch, nheads, seqlen).
    """
    if out_partial.ndim != 5 or lse_partial.shape != out_partial.shape[:-1]:
        wanted = "(num_splits, batch, seqlen, nheads) beside out_partial (num_splits, batch, seqlen, nheads, head_dim_v)"
        got = f"shapes {tuple(lse_partial.shape)} and {tuple(out_partial.shape)}"
        raise ShapeError(message("lse_partial", wanted, got, "flashtile.merge takes one result after the other."))
    if out is not None and out_dtype is not None and out.dtype != out_dtype:
        raise DtypeError(message("out_dtype", f"out's, {out.dtype}, or None", out_dtype, "Leave one of them out."))
    merged, lse = merge(out_partial.unbind(), lse_partial.transpose(-1, -2).unbind())
    wanted_dtype = out_dtype or (out_partial if out is None else out).dtype
    if out is None:
        return merged.to(wanted_dtype), lse.transpose(-1, -2)
    return out.copy_(merged), lse.transpose(-1, -2)


def _check_plan(scheduler_metadata: object) -> None:
    if not isinstance(scheduler_metadata, (DecodePlan, ForwardPlan)):
        got = type(scheduler_metadata).__name__
        raise ArgumentError(message("scheduler_metadata", "a plan", got, "flashtile's own get_scheduler_metadata returns one."))
