"""Gradients through softmax, from scores that are computed again and the forward's lse. One orientation or the other: shapes broadcast.

With P = exp(s - lse), dP = dO V^T and delta = rowsum(out * dout) - dlse, the gradient of the scores is P * (dP - delta).
Source: FlashAttention-2 (Dao 2023), algorithm 2.
"""

import triton
import triton.language as tl

from flashtile.kernels.tile.softmax import LOG2E, softcapped


@triton.jit
def load_statistics(statistics, b, h, start, m, inside):
    """(rows,) lse in base 2 and delta of queries start + m. ``inside`` is None where every query is known to exist.

    Others get the lse inf, as those that saw no key have: their probabilities are 0.
    """
    base = b.to(tl.int64) * statistics.stride_b + h.to(tl.int64) * statistics.stride_h + start
    if inside is None:
        return tl.load(statistics.lse_log2 + base + m), tl.load(statistics.delta + base + m)
    else:
        lse_log2 = tl.load(statistics.lse_log2 + base + m, mask=inside, other=float("inf"))
        return lse_log2, tl.load(statistics.delta + base + m, mask=inside, other=0.0)


@triton.jit
def slope_of(scores, b, h):
    """The head's ALiBi slope in base 2; 0 where there is none."""
    if scores.slopes is not None:
        return tl.load(scores.slopes + b.to(tl.int64) * scores.slopes_stride_b + h.to(tl.int64)) * LOG2E
    else:
        return 0.0


@triton.jit
def probabilities(s, scores, slope, distance, visible, lse_log2):
    """P of a tile of products q.k, and its scores behind the softcap (base 2). ``visible`` is None where nothing is masked.

    ``distance`` is key - query position, ``slope`` the head's, in base 2; ``lse_log2`` broadcasts over the tile.
    """
    capped = s * scores.scale_log2
    if scores.softcap is not None:
        capped = softcapped(capped, scores.softcap * LOG2E)
    s = capped
    if scores.slopes is not None:
        s = s - slope * tl.abs(distance).to(tl.float32)
    if visible is not None:
        s = tl.where(visible, s, float("-inf"))
    return tl.exp2(s - lse_log2), capped


@triton.jit
def score_gradients(p, dp, capped, scores):
    """Gradients of the products q.k, short of the scale. ``dp`` is dP - delta."""
    ds = p * dp
    if scores.softcap is not None:
        # of cap * tanh(x / cap) by x
        tanh = capped / (scores.softcap * LOG2E)
        ds = ds * (1.0 - tanh * tanh)
    return ds
