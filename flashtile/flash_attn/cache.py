"""Attention over a key-value cache for both generations of ``flash_attn_with_kvcache``, by `decode` or by attention over pages.

`decode` packs the heads that share keys and can split the keys; attention has a program for each tile of one head's queries, which it
computes faster. So many queries are attention's, once its tiles give half of the GPU work.
"""

from __future__ import annotations

import torch

from flashtile.api import attention_varlen_with_lse, decode, decode_with_lse
from flashtile.errors import ArgumentError, ShapeError, UnsupportedError, message
from flashtile.flash_attn.appended import New, append, check_new
from flashtile.flash_attn.attend import Scores
from flashtile.flash_attn.conventions import cut, readable, scale_for, window_of
from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan, ForwardPlan

DECODE_ROWS = 128  # packed rows (query, head of the group) of decode's tallest tile
FORWARD_ROWS = 128  # queries of one head that a program of attention holds
_BUSY_SHARE = 2  # attention's tiles for one of so many SMs are enough: on an H200 the two predicted times cross there, give or take 20%


def attend_cache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: int | torch.Tensor | None,
    cache_batch_idx: torch.Tensor | None,
    cache_leftpad: torch.Tensor | None,
    page_table: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int | None,
    scores: Scores,
    num_splits: int,
    plan: DecodePlan | ForwardPlan | None,
    want_lse: bool,
    new: New,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """out, and lse in flashtile's convention where it is wanted; for inference, without gradients.

    ``cache_seqlens`` None means that the cache is full; ``num_splits`` 0 and ``plan`` None, that the planner chooses. ``new`` is written
    to the cache first.
    """
    appends = check_new(new, cache_seqlens)
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if cache_batch_idx is not None:
        page_table = _cache_as_pages(cache_batch_idx, page_table, batch)
    elif page_table is None and k_cache.shape[0] > batch:
        k_cache, v_cache = k_cache[:batch], v_cache[:batch]
    capacity = k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
    seqlens_k, hint = _lengths(cache_seqlens, capacity, batch, q.device)
    if appends:
        q, seqlens_k = append(new, q, k_cache, v_cache, seqlens_k, page_table, cu_seqlens_q, max_seqlen_q, scores, k_scale, v_scale)
        hint = None
    scale, head_dim_v = scale_for(q, scores.softmax_scale), v_cache.shape[-1]
    rows, k_cache, v_cache = readable(q), readable(k_cache), readable(v_cache)
    decode_alone = cache_leftpad is not None or k_cache.itemsize == 1
    if decode_alone and isinstance(plan, ForwardPlan):
        why = "attention over pages has no left padding, and reads no quantised keys"
        raise UnsupportedError("A plan of attention for what decode alone computes.", {plan.kernel: [why]})
    if not decode_alone and _is_prefill(q, cu_seqlens_q, max_seqlen_q, num_splits, plan):
        forward_plan = plan if isinstance(plan, ForwardPlan) else None
        with torch.no_grad():
            out, lse = _prefill(
                rows, k_cache, v_cache, seqlens_k, page_table, cu_seqlens_q, max_seqlen_q, hint, scores, scale, forward_plan, want_lse
            )
    else:
        decode_plan = plan if isinstance(plan, DecodePlan) else None
        run = decode_with_lse if want_lse else decode
        result = run(
            rows, k_cache, v_cache, seqlens_k, page_table=page_table, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
            max_seqlen_k=hint, causal=scores.causal, window=window_of(scores.window_size), softcap=scores.softcap, scale=scale,
            alibi_slopes=scores.alibi_slopes, k_scale=k_scale, v_scale=v_scale, leftpad_k=cache_leftpad,
            num_splits=num_splits or None, plan=decode_plan, after_append=appends,
        )  # fmt: skip
        out, lse = result if isinstance(result, tuple) else (result, None)
    return cut(out, head_dim_v), lse


def prefers_attention(seqlen_q: int, units: int, num_sms: int) -> bool:
    """Whether so many queries a sequence are better served by attention than by decode; ``units`` is sequences x query heads."""
    return seqlen_q >= FORWARD_ROWS and _BUSY_SHARE * units * -(-seqlen_q // FORWARD_ROWS) >= num_sms


def _is_prefill(
    q: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int | None,
    num_splits: int,
    plan: DecodePlan | ForwardPlan | None,
) -> bool:
    if plan is not None or num_splits > 1:
        return isinstance(plan, ForwardPlan)
    if cu_seqlens_q is None:
        batch, seqlen_q = q.shape[0], q.shape[1]
    else:
        batch, seqlen_q = cu_seqlens_q.shape[0] - 1, max_seqlen_q or 0
    return seqlen_q >= FORWARD_ROWS and prefers_attention(seqlen_q, batch * q.shape[-2], _num_sms(q.device))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _num_sms(device: torch.device) -> int:
    return Device.of(device).num_sms


def _prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seqlens_k: torch.Tensor,
    page_table: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    scores: Scores,
    scale: float,
    plan: ForwardPlan | None,
    want_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over pages, whose queries are packed; a cache without pages is one page a sequence."""
    if page_table is None:
        page_table = torch.arange(k_cache.shape[0], dtype=torch.int32, device=q.device)[:, None]
    packed, starts, longest = q, cu_seqlens_q, max_seqlen_q
    if starts is None:
        batch, longest = q.shape[0], q.shape[1]
        packed = q.reshape(-1, *q.shape[2:])
        starts = torch.arange(0, batch * longest + 1, longest, dtype=torch.int32, device=q.device)
    out, lse = attention_varlen_with_lse(
        packed, k_cache, v_cache, starts, None, longest, max_seqlen_k,  # type: ignore[arg-type]  # its check names max_seqlen_q
        page_table=page_table, seqused_k=seqlens_k, causal=scores.causal, window=window_of(scores.window_size), softcap=scores.softcap,
        scale=scale, alibi_slopes=scores.alibi_slopes, plan=plan,
    )  # fmt: skip
    if cu_seqlens_q is None:
        out = out.view(*q.shape[:-1], out.shape[-1])
        lse = lse.view(lse.shape[0], *q.shape[:2]).transpose(0, 1)
    return out, lse if want_lse else None


def _cache_as_pages(cache_batch_idx: torch.Tensor, page_table: torch.Tensor | None, batch: int) -> torch.Tensor:
    """The page table of sequences that lie anywhere in a cache without pages: each is one page, as long as the cache."""
    if page_table is not None:
        raise ArgumentError(
            message("cache_batch_idx", "None beside a page table", "both", "A page table says by itself where each sequence's keys are.")
        )
    if tuple(cache_batch_idx.shape) != (batch,):
        got = f"shape {tuple(cache_batch_idx.shape)}"
        raise ShapeError(message("cache_batch_idx", f"({batch},), an entry of the cache for each sequence", got, "Pass a row of ids."))
    return cache_batch_idx.to(torch.int32)[:, None]


def _lengths(cache_seqlens: int | torch.Tensor | None, capacity: int, batch: int, device: torch.device) -> tuple[torch.Tensor, int | None]:
    """(batch,) int32 on the device, and the longest length where the host knows it."""
    if isinstance(cache_seqlens, torch.Tensor):
        return cache_seqlens, None
    length = capacity if cache_seqlens is None else cache_seqlens
    return torch.full((batch,), length, dtype=torch.int32, device=device), min(length, capacity)
