"""Keys and values that are stored in one byte: what a byte means, and rows of q that meet them in float16.

float16 holds every e4m3 and every int8 value exactly, and weights of the softmax better than bfloat16 does: so products with
quantised keys and values are float16's, whatever q is. Scales never meet elements: a key's joins the scale of scores, a
value's the result.
"""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq


@triton.jit
def key_scale(kv_scales, b, h):
    """What stored keys of sequence b and key head h are multiplied by."""
    if kv_scales.k is None:
        return 1.0
    else:
        return tl.load(kv_scales.k + b.to(tl.int64) * kv_scales.k_stride_b + h.to(tl.int64) * kv_scales.k_stride_h)


@triton.jit
def value_scale(kv_scales, b, h):
    """What stored values of sequence b and key head h are multiplied by."""
    if kv_scales.v is None:
        return 1.0
    else:
        return tl.load(kv_scales.v + b.to(tl.int64) * kv_scales.v_stride_b + h.to(tl.int64) * kv_scales.v_stride_h)


@triton.constexpr_function
def is_quantised(dtype):
    """Whether elements of that type are codes: bytes for e4m3, int8 for themselves."""
    return dtype == tl.uint8 or dtype == tl.int8


@triton.jit
def as_half(codes):
    """The float16 values of a tile of codes: uint8 for e4m3 (without infinities), int8 for integers. Exact; a NaN stays one."""
    if codes.dtype == tl.int8:
        # 0x6400 + n is 1024 + n in float16
        biased = (codes.to(tl.int16) & 0xFF) ^ 0x6480
        return biased.to(tl.float16, bitcast=True) - 1152.0
    elif cuda_capability_geq(8, 9):
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        # sign, exponent and mantissa to float16's places, where the exponent's bias is greater by 8; subnormals come out right
        wide = codes.to(tl.int8, bitcast=True).to(tl.int16)
        half = ((wide << 7) & -0x4080).to(tl.float16, bitcast=True) * 256.0
        return tl.where((wide & 0x7F) == 0x7F, float("nan"), half)


@triton.jit
def as_codes(x, dtype: tl.constexpr):
    """The codes of a float32 tile, uint8 for e4m3 or int8: the nearest value, ties to even, and beyond the range its end."""
    if dtype == tl.int8:
        # what is added leaves no bits for fractions
        nearest = tl.minimum(tl.maximum(x, -128.0), 127.0) + 12582912.0
        return (nearest.to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)
    else:
        size = tl.minimum(tl.abs(x), 448.0)
        bits = size.to(tl.int32, bitcast=True)
        # three bits of mantissa, and the exponent with a bias that is less by 120; below 2**-6, multiples of 2**-9
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(size < 0.015625, small, normal)
        code = tl.where(x == x, code, 0x7F)
        return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def stored(x, scale, dtype: tl.constexpr):
    """x as a cache of ``dtype`` holds it: over its scale, where there are codes; ``scale`` is None where there are none."""
    if scale is None:
        return x.to(dtype)
    else:
        return as_codes(tl.div_rn(x.to(tl.float32), tl.broadcast_to(scale, x.shape)), dtype)


@triton.jit
def rows_as_half(q):
    """(q in float16, factor (rows,)) with q = half * factor: bfloat16's rows, each moved by a power of two into float16's range.

    The largest finite value of a row comes to 2**14 at least, where that is within reach: what is 2**-32 of it still has all
    of bfloat16's bits, and what is lost below is less than float32 loses in the sum.
    """
    wide = q.to(tl.float32)
    size = tl.abs(wide)
    largest = tl.max(tl.where(size < float("inf"), size, 0.0), 1)
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 15)
    to_half = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    factor = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    return (wide * to_half[:, None]).to(tl.float16), factor
