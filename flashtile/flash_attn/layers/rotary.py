"""FlashAttention's ``layers.rotary``: rotary position embeddings of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from flashtile.errors import ShapeError, message
from flashtile.ops.rotary import rotary


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Turns pairs of each head's first ``rotary_dim`` elements by the angles of their token; in float32, rounded once.

    Differentiable in x. Tokens whose position is no row of the tables stay as they are.

    Args:
        x: (batch, seqlen, heads, dim), or packed (total, heads, dim) where ``cu_seqlens`` is given.
        cos, sin: (positions, rotary_dim / 2); rotary_dim is at most dim.
        interleaved: pairs are elements 2 i and 2 i + 1; otherwise i and i + rotary_dim / 2.
        inplace: writes to x, and returns it.
        seqlen_offsets: added to every position; an int, or (batch,) int32 or int64 for an offset of each sequence.
        cu_seqlens: (batch + 1,) int32, where each sequence starts in a packed x.
        max_seqlen: the most tokens of one sequence; needed with ``cu_seqlens``, since the device is not read for it.

    Returns:
        Like x; contiguous unless in place.
    """
    return rotary(
        x, cos, sin, interleaved=interleaved, in_place=inplace, offsets=seqlen_offsets, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
    )


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The same by torch's differentiable operations, in the tensors' own dtypes: cos and sin are (seqlen, rotary_dim / 2)."""
    pairs = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    head, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    first, second = (head[..., ::2], head[..., 1::2]) if interleaved else (head[..., :pairs], head[..., pairs:])
    turned = first * cos - second * sin, first * sin + second * cos
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat([joined, rest], dim=-1)


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """`apply_rotary_emb` of the queries and keys within one tensor, in place; differentiable in it.

    Args:
        qkv: (batch, seqlen, 3, heads, dim), or with ``num_heads_q`` (batch, seqlen, num_heads_q + 2 * heads_k, dim).
        cos_k, sin_k: tables of the keys; those of the queries where None.
        The rest are those of `apply_rotary_emb`.

    Returns:
        qkv itself.
    """
    if qkv.ndim == 5:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    elif qkv.ndim == 4 and num_heads_q is not None:
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : (qkv.shape[2] + num_heads_q) // 2]
    else:
        wanted = "(batch, seqlen, 3, heads, dim), or (batch, seqlen, heads, dim) beside num_heads_q"
        raise ShapeError(message("qkv", wanted, f"shape {tuple(qkv.shape)}", "num_heads_q says how many heads are q's."))
    apply_rotary_emb(q, cos, sin, interleaved, True, seqlen_offsets)
    apply_rotary_emb(k, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k, interleaved, True, seqlen_offsets)
    return qkv


def apply_rotary_emb_kv_(kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0) -> Tensor:
    """`apply_rotary_emb` of the keys within kv (batch, seqlen, 2, heads, dim), in place; differentiable in it. Returns kv itself."""
    apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, True, seqlen_offsets)
    return kv
