"""FlashAttention-2's flash_attn_with_kvcache."""

from __future__ import annotations

import torch

from flashtile.flash_attn.cache import attend_cache
from flashtile.flash_attn.conventions import lse_of_two


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention-2's function of this name, by `flashtile.decode`; many queries by attention over pages. No gradients.

    Args:
        q: (batch, seqlen_q, nheads, head_dim).
        k_cache, v_cache: (batch_cache, capacity, nheads_k, head_dim), or with ``block_table`` (num_blocks, page_size, nheads_k,
            head_dim), any page size. A head_dim that is no multiple of 8 is padded, which copies the cache at every call.
        k, v: new keys and values (batch, seqlen_new, nheads_k, head_dim), written into the caches at ``cache_seqlens`` before anything
            is read, by one launch.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2): turns k at its positions, and q at its own: beside causal or a window each
            query at the next position from ``cache_seqlens`` on, else all at ``cache_seqlens``.
        cache_seqlens: the keys of each sequence before the new ones, an int or (batch,) int32; by default the cache is full.
        cache_batch_idx: (batch,) integers: the entry of the cache that is each sequence's; by default the first ones in order.
        cache_leftpad: (batch,) int32: where each sequence's keys begin; ``cache_seqlens`` counts from the beginning of the cache.
        block_table: (batch, max_blocks) int32: the pages of each sequence in order.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as for `flash_attn_func`.
        rotary_interleaved: pairs of elements are neighbours; else half a rotary_dim apart.
        num_splits: how many programs share a sequence's keys; 0 leaves it to the planner.
        return_softmax_lse: returns (out, softmax_lse) instead of out.

    Returns:
        out: (batch, seqlen_q, nheads, head_dim).
        softmax_lse: (batch, nheads, seqlen_q) float32, natural logarithm; +inf for a query that sees no key.
    """
    out, lse = attend_cache(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table, None, None, None,
        None, None, None, softmax_scale, causal, window_size, softcap, rotary_interleaved, alibi_slopes, None, num_splits,
        return_softmax_lse,
    )  # fmt: skip
    return out if lse is None else (out, lse_of_two(lse))
