"""Attention of whole sequences for every drop-in function: FlashAttention's arguments on their way to flashtile's operations."""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashtile.api import attention, attention_varlen, attention_varlen_with_lse, attention_with_lse
from flashtile.flash_attn.conventions import cut, readable, scale_for, window_of


class Packed(NamedTuple):
    """Where packed sequences begin, or how many keys of a paged cache they use: `attention_varlen`'s own arguments."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int | None
    page_table: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None


class Scores(NamedTuple):
    """What becomes of q.k, as FlashAttention's functions are told. ``deterministic=False`` leaves the matter to torch's own switch."""

    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    alibi_slopes: torch.Tensor | None = None
    dropout_p: float = 0.0
    deterministic: bool = False


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed | None, scores: Scores, want_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """out, and lse in flashtile's convention where it is wanted. Head dims that are no multiples of 8 are padded, and cut again."""
    scale, window = scale_for(q, scores.softmax_scale), window_of(scores.window_size)
    head_dim_v, deterministic = v.shape[-1], scores.deterministic or None
    q, k, v = readable(q), readable(k), readable(v)
    lse: torch.Tensor | None = None
    if packed is None:
        if want_lse:
            out, lse = attention_with_lse(
                q, k, v, causal=scores.causal, window=window, softcap=scores.softcap, scale=scale, alibi_slopes=scores.alibi_slopes,
                dropout_p=scores.dropout_p, deterministic=deterministic,
            )  # fmt: skip
        else:
            out = attention(
                q, k, v, causal=scores.causal, window=window, softcap=scores.softcap, scale=scale, alibi_slopes=scores.alibi_slopes,
                dropout_p=scores.dropout_p, deterministic=deterministic,
            )  # fmt: skip
    else:
        starts = packed.cu_seqlens_q, packed.cu_seqlens_k, packed.max_seqlen_q, packed.max_seqlen_k
        if want_lse:
            out, lse = attention_varlen_with_lse(
                q, k, v, *starts, page_table=packed.page_table, seqused_k=packed.seqused_k, causal=scores.causal, window=window,
                softcap=scores.softcap, scale=scale, alibi_slopes=scores.alibi_slopes, dropout_p=scores.dropout_p,
                deterministic=deterministic,
            )  # fmt: skip
        else:
            out = attention_varlen(
                q, k, v, *starts, page_table=packed.page_table, seqused_k=packed.seqused_k, causal=scores.causal, window=window,
                softcap=scores.softcap, scale=scale, alibi_slopes=scores.alibi_slopes, dropout_p=scores.dropout_p,
                deterministic=deterministic,
            )  # fmt: skip
    return cut(out, head_dim_v), lse
