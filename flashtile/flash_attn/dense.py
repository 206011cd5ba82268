"""flash_attn_func and its packed forms: FlashAttention-2's attention of sequences of one length."""

from __future__ import annotations

import torch

from flashtile.flash_attn.attend import Scores, attend
from flashtile.flash_attn.conventions import lse_of_two

WithProbs = tuple[torch.Tensor, torch.Tensor, None]


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor | WithProbs:
    """FlashAttention-2's function of this name, by `flashtile.attention`.

    Args:
        q: (batch, seqlen_q, nheads, head_dim).
        k, v: (batch, seqlen_k, nheads_k, head_dim); nheads is a multiple of nheads_k.
        dropout_p: the share of the softmax that is dropped. 0.0 in evaluation.
        softmax_scale: by default ``head_dim ** -0.5``.
        causal: the mask is aligned to the bottom right corner.
        window_size: (left, right) keys that a query sees besides the one at its own position; -1 is unbounded.
        softcap: 0.0 is off.
        alibi_slopes: (nheads,) or (batch, nheads) float32.
        deterministic: gradients come out the same to the last bit each time.
        return_attn_probs: returns (out, softmax_lse, None) instead of out.

    Returns:
        out: (batch, seqlen_q, nheads, head_dim).
        softmax_lse: (batch, nheads, seqlen_q) float32, natural logarithm; +inf for a query that sees no key.
    """
    scores = Scores(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, deterministic)
    return as_returned(attend(q, k, v, None, scores, return_attn_probs))


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor | WithProbs:
    """`flash_attn_func` with k and v in one tensor: kv (batch, seqlen_k, 2, nheads_k, head_dim)."""
    k, v = kv.unbind(dim=-3)
    scores = Scores(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, deterministic)
    return as_returned(attend(q, k, v, None, scores, return_attn_probs))


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor | WithProbs:
    """`flash_attn_func` with all three in one tensor: qkv (batch, seqlen, 3, nheads, head_dim)."""
    q, k, v = qkv.unbind(dim=-3)
    scores = Scores(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, deterministic)
    return as_returned(attend(q, k, v, None, scores, return_attn_probs))


def as_returned(result: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor | WithProbs:
    """out; or (out, softmax_lse, None) where lse was asked for: the third, with dropout the probabilities, is never made."""
    out, lse = result
    return out if lse is None else (out, lse_of_two(lse), None)
