"""The key of a decode call, and how a hint that grows keeps it."""

from __future__ import annotations

import torch

from flashtile.arguments.counts import MOST_TOKENS
from flashtile.facts.features import Key, out_has_a_key, scale_facts, vector_facts, window_facts
from flashtile.planner.plans import DecodePlan
from flashtile.rounding import alignment_of, length_bucket, query_bucket


def decode_key(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seqlens_k: torch.Tensor,
    page_table: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    softcap: float,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    leftpad_k: torch.Tensor | None,
    out: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    block_m: int | None,
    num_splits: int | None,
    plan: DecodePlan | None,
    allow_tf32: bool,
    after_append: bool,
    lse: bool,
) -> Key | None:
    """The key of one call, in about 2 us of host time; None where the call is wrong or so rare that it is checked each time."""
    try:
        shape_q, dtype, device, dtype_kv = q.shape, q.dtype, q.device, k_cache.dtype
        stored, size, heads_kv, head_dim = k_cache.shape
        stored_v, size_v, heads_v, head_dim_v = v_cache.shape
        if (
            stored_v != stored or size_v != size or heads_v != heads_kv
            or v_cache.dtype is not dtype_kv or seqlens_k.dtype is not torch.int32
            or k_cache.device != device or v_cache.device != device or seqlens_k.device != device
            or causal.__class__ is not bool or allow_tf32.__class__ is not bool
            or after_append.__class__ is not bool
            or not seqlens_k.is_contiguous()
        ):  # fmt: skip
            return None

        table_rows: int | None = None
        page_size, capacity = 0, size
        if page_table is not None:
            if page_table.dtype is not torch.int32 or page_table.device != device or page_table.stride(-1) != 1 or stored > MOST_TOKENS:
                return None
            table_rows, max_pages = page_table.shape
            page_size, capacity, stored = size, max_pages * size, stored > 0

        packed: torch.Size | None = None
        queries: tuple[int, ...] = shape_q
        if cu_seqlens_q is not None:
            total_q, heads_q, head_dim_q = shape_q
            if (
                cu_seqlens_q.dtype is not torch.int32 or cu_seqlens_q.device != device or not cu_seqlens_q.is_contiguous()
                or max_seqlen_q.__class__ is not int or not 0 <= max_seqlen_q <= total_q
            ):  # fmt: skip
                return None
            packed = cu_seqlens_q.shape
            queries = (query_bucket(max_seqlen_q), query_bucket(total_q), heads_q, head_dim_q)
        elif max_seqlen_q is not None and (max_seqlen_q.__class__ is not int or max_seqlen_q != shape_q[1]):
            return None

        seqlen_k = capacity
        if max_seqlen_k is not None:
            if max_seqlen_k.__class__ is not int or not 0 <= max_seqlen_k <= capacity <= MOST_TOKENS:
                return None
            seqlen_k = max_seqlen_k or min(capacity, 1)

        if window is not None:
            window = window_facts(window)

        chosen: Key | None = None
        if block_m is not None or num_splits is not None or plan is not None:
            if (
                (block_m is not None and block_m.__class__ is not int)
                or (num_splits is not None and num_splits.__class__ is not int)
                or (plan is not None and plan.__class__ is not DecodePlan)
            ):
                return None
            chosen = (block_m, num_splits, plan)

        per_head: Key | None = None
        if sinks is not None or alibi_slopes is not None:
            per_head = (vector_facts(sinks, device), vector_facts(alibi_slopes, device))

        scales = scale_facts(k_scale, v_scale, device)

        if leftpad_k is not None and (
            leftpad_k.dtype is not torch.int32 or leftpad_k.device != device or leftpad_k.shape != seqlens_k.shape
            or not leftpad_k.is_contiguous()
        ):  # fmt: skip
            return None

        dtype_out = out_dtype
        if out is not None:
            if not out_has_a_key(out, shape_q, head_dim_v, device):
                return None
            dtype_out = (out.dtype, out_dtype)  # type: ignore[assignment]
        if out_dtype is not None and out_dtype.__class__ is not torch.dtype:
            return None

        alignment = alignment_of(q, k_cache, v_cache, out)
        if not alignment:
            return None
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        # Not tensors, ranks that cannot be, layouts without strides: the checks of Problem.decode say what is wrong.
        return None
    return (
        queries, dtype, dtype_kv, device, stored, page_size, length_bucket(seqlen_k), heads_kv, head_dim, head_dim_v, alignment,
        seqlens_k.shape, table_rows, packed, causal, window, softcap != 0.0, per_head, scales, leftpad_k is None, dtype_out, chosen,
        allow_tf32, after_append, lse,
    )  # fmt: skip


def rounded_hint(max_seqlen_k: object, k_cache: torch.Tensor, page_table: torch.Tensor | None, token_dim: int = 1) -> object:
    """A hint that plans like this one and is valid if it is, so that a hint that grows by a token a step rarely changes.

    What is no hint, and one whose bucket ends beyond the cache, comes back as it is. ``token_dim`` is the one of k_cache's dimensions
    that counts a sequence's keys, or a page's.
    """
    if max_seqlen_k.__class__ is not int or max_seqlen_k <= 0:
        return max_seqlen_k
    rounded = length_bucket(max_seqlen_k)
    try:
        capacity = k_cache.shape[token_dim] if page_table is None else k_cache.shape[token_dim] * page_table.shape[1]
    except (AttributeError, IndexError, TypeError):
        return max_seqlen_k
    return rounded if rounded <= capacity else max_seqlen_k
