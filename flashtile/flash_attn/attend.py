"""Attention of whole sequences for every drop-in function: FlashAttention's arguments on their way to flashtile's operations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from flashtile.api import attention, attention_varlen, attention_varlen_with_lse, attention_with_lse
from flashtile.arguments import check_differentiable, needs_gradient
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
    """out, and lse in flashtile's convention where it is wanted. Head dims that are no multiples of 8 are padded, and cut again.

    Keys in pages have no gradient, which is an error only where one is asked for: as with FlashAttention, a call may have leaves.
    """
    if packed is not None and packed.page_table is not None and needs_gradient(q, k, v) and not torch.compiler.is_compiling():
        with torch.no_grad():
            paged, its_lse = attend(q, k, v, packed, scores, want_lse)
        return OfPages.apply(paged, q, k, v), its_lse  # type: ignore[no-untyped-call]
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


class OfPages(torch.autograd.Function):
    """A result over keys in pages, of which a gradient is an error."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *depends_on: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> None:
        check_differentiable(page_table=True, alibi_slopes=None, out=None)
