"""FlashAttention-3's functions for training and prefill, by `flashtile.attention` and `flashtile.attention_varlen`."""

from __future__ import annotations

import torch

from flashtile.errors import ShapeError, message
from flashtile.flash_attn.attend import Packed, Scores, attend
from flashtile.flash_attn.conventions import count_of, lse_of_three
from flashtile.flash_attn.refusals import check_splits, check_supported


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention-3's function of this name.

    Args:
        q: (batch, seqlen_q, nheads, head_dim).
        k: (batch, seqlen_k, nheads_k, head_dim); v the same with a last dimension of its own.
        softmax_scale: by default ``head_dim ** -0.5``.
        causal: the mask is aligned to the bottom right corner.
        window_size: (left, right) keys that a query sees besides the one at its own position; -1 is unbounded.
        softcap: 0.0 is off.
        num_splits: 0 or 1.
        pack_gqa: a hint that changes no result; the planner lays rows out.
        deterministic: gradients come out the same to the last bit each time.
        return_attn_probs: returns (out, softmax_lse) instead of out.

    Returns:
        out: (batch, seqlen_q, nheads, head_dim_v).
        softmax_lse: (batch, nheads, seqlen_q) float32, natural logarithm; -inf for a query that sees no key, +inf where there is none.

    Raises:
        UnsupportedError: for qv, q_descale, k_descale, v_descale, attention_chunk, sm_margin and more than one split.
    """
    check_supported(
        "flash_attn_func",
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        attention_chunk=attention_chunk,
        sm_margin=sm_margin,
    )
    check_splits("flash_attn_func", num_splits)
    scores = Scores(softmax_scale, causal, window_size, softcap, deterministic=deterministic)
    return _returned(attend(q, k, v, None, scores, return_attn_probs), k)


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`flash_attn_func` with all three in one tensor: qkv (batch, seqlen, 3, nheads, head_dim), or (batch, seqlen, nheads + 2 * nheads_k,
    head_dim) with ``num_heads_q`` query heads first."""
    check_supported(
        "flash_attn_qkvpacked_func",
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        attention_chunk=attention_chunk,
        sm_margin=sm_margin,
    )
    q, k, v = _unpacked(qkv, num_heads_q)
    scores = Scores(softmax_scale, causal, window_size, softcap, deterministic=deterministic)
    return _returned(attend(q, k, v, None, scores, return_attn_probs), k)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention-3's function of this name: packed sequences of unlike lengths.

    Args:
        q: (total_q, nheads, head_dim); k and v: (total_k, nheads_k, head_dim), and for v a last dimension of its own.
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32: where each sequence's queries and keys start.
        max_seqlen_q, max_seqlen_k: the longest sequence, what it does not use included.
        seqused_q, seqused_k: (batch,) int32: how many of its queries and keys each sequence uses, the first ones. The other queries get
            out 0, lse -inf and no gradient.
        The rest are those of `flash_attn_func`.

    Returns:
        out: (total_q, nheads, head_dim_v).
        softmax_lse: (nheads, total_q) float32, as for `flash_attn_func`.
    """
    check_supported(
        "flash_attn_varlen_func",
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        attention_chunk=attention_chunk,
        sm_margin=sm_margin,
    )
    check_splits("flash_attn_varlen_func", num_splits)
    packed = Packed(cu_seqlens_q, cu_seqlens_k, count_of(max_seqlen_q), count_of(max_seqlen_k), None, seqused_k)
    if seqused_q is not None:
        packed = _with_unused_queries(packed, seqused_q)
    scores = Scores(softmax_scale, causal, window_size, softcap, deterministic=deterministic)
    return _returned(attend(q, k, v, packed, scores, return_attn_probs), k)


def _with_unused_queries(packed: Packed, seqused_q: torch.Tensor) -> Packed:
    """Twice as many sequences: behind each, one of its unused queries, which has no keys."""
    starts, keys = packed.cu_seqlens_q, packed.cu_seqlens_k
    if tuple(seqused_q.shape) != (starts.shape[0] - 1,) or seqused_q.dtype != torch.int32:
        got = f"shape {tuple(seqused_q.shape)} {seqused_q.dtype}"
        raise ShapeError(message("seqused_q", f"({starts.shape[0] - 1},) int32", got, "One length a sequence."))
    ends = torch.minimum(starts[:-1] + seqused_q.clamp(min=0), starts[1:])
    all_starts = torch.cat([torch.stack([starts[:-1], ends], dim=1).flatten(), starts[-1:]])
    all_keys = None if keys is None else torch.cat([keys[:1], keys[1:].repeat_interleave(2)])
    used = None if packed.seqused_k is None else torch.stack([packed.seqused_k, torch.zeros_like(packed.seqused_k)], dim=1).flatten()
    return packed._replace(cu_seqlens_q=all_starts, cu_seqlens_k=all_keys, seqused_k=used)


def _unpacked(qkv: torch.Tensor, num_heads_q: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if qkv.ndim == 5:
        q, k, v = qkv.unbind(dim=-3)
        return q, k, v
    heads = qkv.shape[-2]
    if qkv.ndim != 4 or num_heads_q is None or not 0 < num_heads_q < heads or (heads - num_heads_q) % 2:
        wanted = "(batch, seqlen, 3, heads, dim), or (batch, seqlen, heads_q + 2 * heads_kv, dim) beside num_heads_q"
        got = f"shape {tuple(qkv.shape)} and num_heads_q {num_heads_q}"
        raise ShapeError(message("qkv", wanted, got, "num_heads_q says how many of four dimensions' heads are q's."))
    each = (heads - num_heads_q) // 2
    q, k, v = torch.split(qkv, [num_heads_q, each, each], dim=-2)
    return q, k, v


def _returned(result: tuple[torch.Tensor, torch.Tensor | None], k: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    out, lse = result
    return out if lse is None else (out, lse_of_three(lse, k.shape[:-2].numel()))
