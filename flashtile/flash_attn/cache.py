"""Attention over a key-value cache for both generations of ``flash_attn_with_kvcache``, by `decode` or by attention over pages.

`decode` packs the heads that share keys and can split the keys; attention has a program for each tile of one head's queries, which it
computes faster. So many queries are attention's, once its tiles give half of the GPU work.
"""

from __future__ import annotations

import torch

from flashtile.api import append_kv, attention_varlen_with_lse, decode, decode_with_lse
from flashtile.arguments import is_int
from flashtile.errors import ArgumentError, ShapeError, UnsupportedError, message
from flashtile.flash_attn.conventions import Sides, cut, readable, scale_for, window_of, with_rows
from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan, ForwardPlan

DECODE_ROWS = 128  # packed rows (query, head of the group) of decode's tallest tile
FORWARD_ROWS = 128  # queries of one head that a program of attention holds
_BUSY_SHARE = 2  # attention's tiles for one of so many SMs are enough: on an H200 the two predicted times cross there, give or take 20%


def attend_cache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
    cache_seqlens: int | torch.Tensor | None,
    cache_batch_idx: torch.Tensor | None,
    cache_leftpad: torch.Tensor | None,
    page_table: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k_new: torch.Tensor | None,
    max_seqlen_q: int | None,
    rotary_seqlens: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    rotary_interleaved: bool,
    alibi_slopes: torch.Tensor | None,
    plan: DecodePlan | ForwardPlan | None,
    num_splits: int,
    want_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """out, and lse in flashtile's convention where it is wanted; for inference, without gradients.

    Arguments are the third generation's, and the second's ``alibi_slopes``. ``cache_seqlens`` None means that the cache is full;
    ``num_splits`` 0 and ``plan`` None, that the planner chooses. New keys and values are written to the cache first.
    """
    # A GPU may be done with a decode step sooner than the host with all this: facts of tensors, each some 0.2 us, are read once, and
    # nothing is called that usually has nothing to do.
    if not (_is_tensor(k_cache) and _is_tensor(v_cache)):
        name, cache = ("v_cache", v_cache) if _is_tensor(k_cache) else ("k_cache", k_cache)
        raise ArgumentError(message(name, "a tensor (batch or pages, keys, heads, head_dim)", repr(cache), "Allocate the cache first."))
    appends = _appends(k, v, cache_seqlens, rotary_cos, rotary_sin, cu_seqlens_k_new, rotary_seqlens)
    shape_q, head_dim_v = q.shape, v_cache.shape[-1]
    batch, queries = (shape_q[0], shape_q[1]) if cu_seqlens_q is None else (cu_seqlens_q.shape[0] - 1, max_seqlen_q or 0)
    if cache_batch_idx is not None:
        page_table = _cache_as_pages(cache_batch_idx, page_table, batch)
    elif page_table is None and k_cache.shape[0] > batch:
        k_cache, v_cache = k_cache[:batch], v_cache[:batch]
    hint: int | None = None
    if isinstance(cache_seqlens, torch.Tensor):
        seqlens_k = cache_seqlens
    else:
        capacity = k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
        seqlens_k, hint = _lengths(cache_seqlens, capacity, batch, q.device)
    window = None if window_size == (-1, -1) else window_of(window_size)
    if k is not None and v is not None:
        local = causal or (window is not None and window != (None, None))  # else all queries stand at the first new position
        scaled = (k_scale is not None or v_scale is not None) and k.dtype != k_cache.dtype  # codes come as they are stored
        turns = rotary_cos is not None
        seqlens_k, turned = append_kv(
            k_cache, v_cache, with_rows(k), with_rows(v), seqlens_k, page_table=page_table, cu_seqlens_k_new=cu_seqlens_k_new,
            q=with_rows(q) if turns else None, cu_seqlens_q=cu_seqlens_q if turns else None, max_seqlen_q=max_seqlen_q if turns else None,
            rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_seqlens=rotary_seqlens, rotary_interleaved=rotary_interleaved,
            queries_advance=local, k_scale=k_scale if scaled else None, v_scale=v_scale if scaled else None,
        )  # fmt: skip
        q, hint = q if turned is None else turned, None
    padded = shape_q[-1] % 8 or head_dim_v % 8
    if padded:
        softmax_scale = scale_for(q, softmax_scale)
        q, k_cache, v_cache = readable(q), readable(k_cache), readable(v_cache)
    elif q.stride()[-1] != 1 or k_cache.stride()[-1] != 1 or v_cache.stride()[-1] != 1:
        q, k_cache, v_cache = with_rows(q), with_rows(k_cache), with_rows(v_cache)
    if (queries >= FORWARD_ROWS or plan is not None) and _is_prefill(q, k_cache, cache_leftpad, batch, queries, num_splits, plan):
        forward_plan = plan if isinstance(plan, ForwardPlan) else None
        with torch.no_grad():
            out, lse = _prefill(
                q, k_cache, v_cache, seqlens_k, page_table, cu_seqlens_q, max_seqlen_q, hint, causal, window, softcap, softmax_scale,
                alibi_slopes, forward_plan, want_lse,
            )  # fmt: skip
    else:
        run = decode_with_lse if want_lse else decode
        result = run(
            q, k_cache, v_cache, seqlens_k, page_table=page_table, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
            max_seqlen_k=hint, causal=causal, window=window, softcap=softcap, scale=softmax_scale, alibi_slopes=alibi_slopes,
            k_scale=k_scale, v_scale=v_scale, leftpad_k=cache_leftpad, num_splits=num_splits or None,
            plan=plan if isinstance(plan, DecodePlan) else None, after_append=appends,
        )  # fmt: skip
        out, lse = result if isinstance(result, tuple) else (result, None)
    return cut(out, head_dim_v) if padded else out, lse


def _is_tensor(x: object) -> bool:
    return isinstance(x, torch.Tensor)


def _appends(
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cache_seqlens: object,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
    cu_seqlens_k_new: torch.Tensor | None,
    rotary_seqlens: torch.Tensor | None,
) -> bool:
    """Whether there are new keys and values; raises ArgumentError for one without the other, and for what makes no sense without them."""
    if k is not None and v is not None:
        if cache_seqlens is None:
            fix = "A cache without lengths is full, and has no room for new keys."
            raise ArgumentError(message("cache_seqlens", "the keys of each sequence so far, beside k and v", None, fix))
        return True
    if k is not None or v is not None:
        raise ArgumentError(message("k and v", "both or neither", "one of them", "Both caches grow by the same tokens."))
    if rotary_cos is not None or rotary_sin is not None or cu_seqlens_k_new is not None or rotary_seqlens is not None:
        given = {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "cu_seqlens_k_new": cu_seqlens_k_new, "rotary_seqlens": rotary_seqlens}
        name = next(name for name, value in given.items() if value is not None)
        fix = "flashtile.flash_attn.layers.rotary turns tensors by themselves."
        raise ArgumentError(message(name, "None without new keys k and v", "a tensor", fix))
    return False


def prefers_attention(seqlen_q: int, units: int, num_sms: int) -> bool:
    """Whether so many queries a sequence are better served by attention than by decode; ``units`` is sequences x query heads."""
    return seqlen_q >= FORWARD_ROWS and _BUSY_SHARE * units * -(-seqlen_q // FORWARD_ROWS) >= num_sms


def _is_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    cache_leftpad: torch.Tensor | None,
    batch: int,
    queries: int,
    num_splits: int,
    plan: DecodePlan | ForwardPlan | None,
) -> bool:
    """Whether attention over pages computes the call; raises UnsupportedError for a plan of it where it cannot."""
    if cache_leftpad is not None or k_cache.itemsize == 1:
        if isinstance(plan, ForwardPlan):
            why = "attention over pages has no left padding, and reads no quantised keys"
            raise UnsupportedError("A plan of attention for what decode alone computes.", {plan.kernel: [why]})
        return False
    if plan is not None or num_splits > 1:
        return isinstance(plan, ForwardPlan)
    return queries >= FORWARD_ROWS and prefers_attention(queries, batch * q.shape[-2], _num_sms(q.device))


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
    causal: bool,
    window: Sides | None,
    softcap: float,
    scale: float | None,
    alibi_slopes: torch.Tensor | None,
    plan: ForwardPlan | None,
    want_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over pages, whose queries are packed; a cache without pages is one page a sequence."""
    if page_table is None:
        page_table = torch.arange(k_cache.shape[0], dtype=torch.int32, device=q.device)[:, None]
    packed, starts, longest = q, cu_seqlens_q, max_seqlen_q
    if starts is None:
        batch, longest = q.shape[0], q.shape[1]
        packed = q.flatten(0, 1)
        if longest:
            starts = torch.arange(0, batch * longest + 1, longest, dtype=torch.int32, device=q.device)
        else:
            starts = torch.zeros(batch + 1, dtype=torch.int32, device=q.device)
    out, lse = attention_varlen_with_lse(
        packed, k_cache, v_cache, starts, None, longest, max_seqlen_k,  # type: ignore[arg-type]  # its check names max_seqlen_q
        page_table=page_table, seqused_k=seqlens_k, causal=causal, window=window, softcap=softcap, scale=scale,
        alibi_slopes=alibi_slopes, plan=plan,
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


def _lengths(cache_seqlens: int | None, capacity: int, batch: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """(batch,) int32 on the device of one length for all, by default what the cache holds, and the keys that there are of it."""
    length = capacity if cache_seqlens is None else cache_seqlens
    if not is_int(length) or length < 0:
        raise ArgumentError(
            message("cache_seqlens", "an int that is not negative, or a tensor (batch,) int32", repr(length), "It counts keys.")
        )
    return torch.full((batch,), length, dtype=torch.int32, device=device), min(length, capacity)
