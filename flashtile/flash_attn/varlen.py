"""flash_attn_varlen_func and its packed forms: FlashAttention-2's attention of sequences of unlike lengths."""

from __future__ import annotations

import torch

from flashtile.flash_attn.attend import Packed, Scores, attend
from flashtile.flash_attn.conventions import count_of
from flashtile.flash_attn.dense import WithProbs, as_returned


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor | WithProbs:
    """FlashAttention-2's function of this name, by `flashtile.attention_varlen`.

    Args:
        q: (total_q, nheads, head_dim), sequence after sequence.
        k, v: (total_k, nheads_k, head_dim); with ``block_table`` (num_blocks, page_size, nheads_k, head_dim), any page size.
        cu_seqlens_q: (batch + 1,) int32: where each sequence's queries start.
        cu_seqlens_k: (batch + 1,) int32: where each sequence's keys start; with ``block_table`` its differences are lengths.
        max_seqlen_q: the most queries of one sequence.
        max_seqlen_k: the most keys of one sequence.
        block_table: (batch, max_blocks) int32: the pages of each sequence in order. There are no gradients then.
        The rest are those of `flash_attn_func`.

    Returns:
        out: (total_q, nheads, head_dim).
        softmax_lse: (nheads, total_q) float32, natural logarithm; +inf for a query that sees no key.
    """
    scores = Scores(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, deterministic)
    packed = lengths_of_two(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table)
    return as_returned(attend(q, k, v, packed, scores, return_attn_probs))


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor | WithProbs:
    """`flash_attn_varlen_func` with k and v in one tensor: kv (total_k, 2, nheads_k, head_dim)."""
    k, v = kv.unbind(dim=-3)
    scores = Scores(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, deterministic)
    packed = lengths_of_two(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return as_returned(attend(q, k, v, packed, scores, return_attn_probs))


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor | WithProbs:
    """`flash_attn_varlen_func` with all three in one tensor: qkv (total, 3, nheads, head_dim)."""
    q, k, v = qkv.unbind(dim=-3)
    scores = Scores(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, deterministic)
    packed = lengths_of_two(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return as_returned(attend(q, k, v, packed, scores, return_attn_probs))


def lengths_of_two(
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_table: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
) -> Packed:
    """FlashAttention-2's arguments of packed sequences: with pages, cu_seqlens_k says how many keys each has, unless seqused_k does."""
    max_seqlen_q, max_seqlen_k = count_of(max_seqlen_q), count_of(max_seqlen_k)
    if block_table is None:
        return Packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, seqused_k)
    lengths = cu_seqlens_k[1:] - cu_seqlens_k[:-1] if seqused_k is None else seqused_k
    return Packed(cu_seqlens_q, None, max_seqlen_q, max_seqlen_k, block_table, lengths)
