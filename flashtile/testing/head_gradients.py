"""Gradients of one key head of one sequence in float64, a block of queries at a time: what long sequences are held to."""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashtile.band import Band

_ROWS = 2048  # queries at once: a block of scores is that times the keys
# Relative L2 error of a head's gradients: that of out (tolerance.py) half as much again, for gradients of scores are rounded as weights
# are, and delta carries the rounding of out.
GRADIENT_LIMITS = {torch.bfloat16: 7.5e-3, torch.float16: 1.5e-3, torch.float32: 3e-5}


class HeadGradients(NamedTuple):
    """dq (seqlen_q, group, d), dk (seqlen_k, d) and dv (seqlen_k, dv), float64."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def head_gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, band: Band, scale: float | None = None
) -> HeadGradients:
    """The gradients of q (seqlen_q, group, d), k (seqlen_k, d) and v (seqlen_k, dv) from that of out, dout (seqlen_q, group, dv).

    ``band`` says which keys a query sees; ``scale`` is head_dim ** -0.5 unless given. Memory grows with the lengths, not their product.
    """
    q, k, v, dout = (tensor.double() for tensor in (q, k, v, dout))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    keys, offset = torch.arange(len(k), device=k.device), len(k) - len(q)
    for start in range(0, len(q), _ROWS):
        rows = slice(start, min(start + _ROWS, len(q)))
        distance = keys - torch.arange(rows.start, rows.stop, device=k.device)[:, None] - offset
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if band.left is not None:
            hidden |= distance < -band.left
        if band.right is not None:
            hidden |= distance > band.right
        for head in range(q.shape[1]):
            queries, of_out = q[rows, head], dout[rows, head]
            weights = (queries @ k.T * scale).masked_fill_(hidden, -torch.inf).softmax(-1).nan_to_num_(0.0)
            of_weights = of_out @ v.T
            of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * scale
            dq[rows, head] = of_scores @ k
            dk += of_scores.T @ queries
            dv += weights.T @ of_out
    return HeadGradients(dq, dk, dv)
