"""Online softmax in base 2, and the merge of partial results.

A tile of scores has rows along one axis and keys along the other; KEYS_FIRST says that keys are axis 0 (operands swapped).
Source: Milakov & Gimelshein 2018; FlashAttention (Dao et al. 2022), algorithm 1.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def by_row(x, KEYS_FIRST: tl.constexpr):
    """(rows,) -> broadcastable over a tile."""
    if KEYS_FIRST:
        return x[None, :]
    else:
        return x[:, None]


@triton.jit
def by_key(x, KEYS_FIRST: tl.constexpr):
    """(keys,) -> broadcastable over a tile."""
    if KEYS_FIRST:
        return x[:, None]
    else:
        return x[None, :]


@triton.jit
def finite(m):
    """A maximum that exp2 can subtract: rows that have seen no key hold -inf, and -inf - -inf is NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def online_step(m, l, s, factor, KEY_AXIS: tl.constexpr):
    """One tile of scores s, base 2 once multiplied by ``factor`` >= 0 (so that scaling and subtracting are one FMA).

    Returns the new maximum and sum (base 2), the probabilities, and what the accumulator is scaled by.
    """
    m_new = tl.maximum(m, tl.max(s, KEY_AXIS) * factor)
    shift = finite(m_new)
    p = tl.exp2(s * factor - tl.expand_dims(shift, KEY_AXIS))
    alpha = tl.exp2(m - shift)
    return m_new, l * alpha + tl.sum(p, KEY_AXIS), p, alpha


@triton.jit
def join_sink(m, l, sink):
    """The sink (natural log) joins the denominator, once: the new maximum and sum (base 2), and the accumulator's factor."""
    m_new = tl.maximum(m, sink * LOG2E)
    shift = finite(m_new)
    alpha = tl.exp2(m - shift)
    return m_new, l * alpha + tl.exp2(sink * LOG2E - shift), alpha


@triton.jit
def normaliser(l):
    """1 / l, and 0 for a row that saw no key."""
    return tl.where(l > 0.0, 1.0 / l, 0.0)


@triton.jit
def natural_lse(m, l):
    """Natural log of the denominator; -inf for a row that saw no key."""
    return tl.where(l > 0.0, (m + tl.log2(l)) * LN2, float("-inf"))


@triton.jit
def softcapped(s, cap):
    """cap * tanh(s / cap), by exp: tanh(x) = 1 - 2 / (1 + exp(2x)) saturates without overflow to NaN."""
    return cap - 2.0 * cap / (1.0 + tl.exp2(s * (2.0 * LOG2E / cap)))
