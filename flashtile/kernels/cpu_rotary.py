"""Rotary position embeddings in torch's own operations, for the CPU; the definition that the GPU's kernel is tested against."""

from __future__ import annotations

import torch


def rotate(
    x: torch.Tensor,
    out: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    offsets: torch.Tensor | None,
    offset: int,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    interleaved: bool,
    conjugate: bool,
) -> None:
    """Writes the rotated ``x`` to ``out``, which may be ``x`` itself. Arguments are those of the GPU's `rotate`."""
    pairs = cos.shape[-1]
    cos_of, sin_of, real = _of_tokens(x, cos, sin, offsets, offset, cu_seqlens)
    if conjugate:
        sin_of = -sin_of
    head = x[..., : 2 * pairs].float()
    first, second = (head[..., ::2], head[..., 1::2]) if interleaved else (head[..., :pairs], head[..., pairs:])
    # [..., heads, pairs]
    rotated = first * cos_of - second * sin_of, first * sin_of + second * cos_of
    joined = torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    if out is not x:
        out.copy_(x)
    out[..., : 2 * pairs] = torch.where(real, joined.to(x.dtype), x[..., : 2 * pairs])


def _of_tokens(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    offsets: torch.Tensor | None,
    offset: int,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """cos and sin of each token, ([batch,] seqlen, 1, pairs) float32, 1 and 0 beyond the tables; and which tokens belong to a sequence."""
    if cu_seqlens is None:
        positions = torch.arange(x.shape[1], device=x.device)[None, :]
        positions = positions + (offset if offsets is None else offsets.long()[:, None])
        real = torch.ones_like(positions, dtype=torch.bool)
    else:
        tokens = torch.arange(x.shape[0], device=x.device)
        starts = cu_seqlens.long()
        sequence = torch.searchsorted(starts, tokens, right=True) - 1
        real = (sequence >= 0) & (sequence < len(starts) - 1)
        sequence = sequence.clamp(0, max(0, len(starts) - 2))
        positions = tokens - starts[sequence] + (offset if offsets is None else offsets.long()[sequence])
    known = (positions >= 0) & (positions < cos.shape[0])
    at = positions.clamp(0, max(0, cos.shape[0] - 1))

    def table(values: torch.Tensor, beyond: float) -> torch.Tensor:
        if not values.shape[0]:
            return torch.full((*at.shape, 1, values.shape[1]), beyond, device=x.device)
        return torch.where(known[..., None], values[at].float(), beyond).unsqueeze(-2)

    return table(cos, 1.0), table(sin, 0.0), real[..., None, None]
