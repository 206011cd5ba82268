"""FlashAttention's ``layers.rotary``: rotary position embeddings of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

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
