"""append_kv: new keys and values into a cache, ahead of decode."""

from __future__ import annotations

import torch

from flashtile import ops
from flashtile.ops.tracing import is_traced


def append_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seqlens_k: torch.Tensor,
    *,
    page_table: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    q: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_seqlens: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    queries_advance: bool = True,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Writes new keys and values into a cache behind those that are there, in one launch; `decode` takes what it returns.

    With ``rotary_cos`` the keys, and ``q``, are turned on the way: the first ``2 * pairs`` elements of each head, by the angle of
    the token's position. Neither k nor q is changed.

    Args:
        k_cache: (batch, capacity, num_heads_kv, head_dim), or with ``page_table`` (num_pages, page_size, num_heads_kv, head_dim);
            written in place. Any strides with a contiguous last dimension, any head_dim.
        v_cache: the same with a last dimension (head_dim_v) of its own.
        k, v: the new ones, (batch, seqlen_new, num_heads_kv, head_dim or head_dim_v), of the caches' dtype, or floating beside
            caches of float8_e4m3fn or int8, which hold the nearest code of k over k_scale, within their range; or with
            ``cu_seqlens_k_new`` packed (total_new, num_heads_kv, ...).
        seqlens_k: (batch,) int32: the keys of each sequence so far. Clamped on the device to what the cache holds: ``capacity``, or
            ``max_pages * page_size``. New keys beyond that are dropped.
        page_table: (batch, max_pages) int32: the pages of each sequence in order, those for the new keys included. Keys on a page
            whose id lies outside the cache are not written. Sequences that lie anywhere in a cache without pages have a table of one
            page each. No two sequences may write to one page.
        cu_seqlens_k_new: (batch + 1,) int32: where each sequence's new keys start in packed k and v.
        q: the queries of the new tokens, (batch, seqlen_q, num_heads_q, head_dim), or with ``cu_seqlens_q`` (batch + 1,) int32 and
            ``max_seqlen_q`` packed (total_q, num_heads_q, head_dim); k's dtype.
        rotary_cos, rotary_sin: (positions, pairs), float16, bfloat16 or float32. A token beyond the tables is not turned.
        rotary_seqlens: (batch,) int32: the position of each sequence's first new token; ``seqlens_k`` where None.
        rotary_interleaved: pairs are neighbours, elements 2 i and 2 i + 1; else i and i + pairs.
        queries_advance: query i stands i positions behind the first, as it does where attention is causal or local; else all stand
            at the first new position.
        k_scale, v_scale: as for `decode`: float32 of one element, (num_heads_kv,) or (batch, num_heads_kv), 1 where None.

    Returns:
        seqlens_k: (batch,) int32: the keys of each sequence from now on, at most what the cache holds.
        q: turned, contiguous; q itself without ``rotary_cos``, None where no q was given.

    Raises:
        ShapeError, DtypeError, ArgumentError: an argument is wrong; the message names it. Values on the device are not read:
            `flashtile.checked` does that on request.
        UnsupportedError: the device has no kernel, or the tables require a gradient.

    No gradient flows through it. Work goes to the current stream of the caches' device, and nothing waits for it.
    """
    run = torch.ops.flashtile.append_kv if is_traced(k_cache, k, k if q is None else q) else ops.append.append
    seqlens, turned_q = run(
        k_cache, v_cache, k, v, seqlens_k, page_table, cu_seqlens_k_new, q, cu_seqlens_q, max_seqlen_q, rotary_cos, rotary_sin,
        rotary_seqlens, rotary_interleaved, queries_advance, k_scale, v_scale,
    )  # fmt: skip
    return seqlens, q if q is None or rotary_cos is None else turned_q
