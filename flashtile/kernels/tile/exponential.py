"""Powers of two by multiply-add: Cody and Waite's reduction, and a polynomial for what is left."""

import triton
import triton.language as tl

_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: added to a small number, it leaves the nearest integer in the last bits
_LOWEST = tl.constexpr(-127.0)
_MANTISSA = tl.constexpr(23)


@triton.jit
def exp2_by_polynomial(x, DEGREE: tl.constexpr):
    """2**x for x < 128 in float32, with a relative error of at most 2**-13.2 at degree 3 and 2**-18.3 at degree 4.

    Rounding to bfloat16 costs 36 times the former, rounding to float16 more than 100 times the latter. Whole numbers from -126 on
    are exact. What lies below 2**-126 may come out as anything from 0 to that, and from -127 on down, -inf included, it
    is 0: hidden keys add nothing. Of NaN comes a number that 16-bit floats cannot hold, so that results are not finite.

    The integer next to x goes into the exponent; the polynomial is 2**f for the rest f in [-0.5, 0.5], exact at 0 and with the
    least largest relative error elsewhere.
    """
    x = tl.maximum(x, _LOWEST, propagate_nan=tl.PropagateNan.ALL)
    rounded = x + _ROUNDER
    f = x - (rounded - _ROUNDER)
    if DEGREE == 3:
        p = tl.fma(f, 0.05500893294811249, 0.2422109693288803)
        p = tl.fma(f, p, 0.6932829022407532)
    else:
        tl.static_assert(DEGREE == 4, "a polynomial of degree 3 or 4")
        p = tl.fma(f, 0.009582852944731712, 0.055906426161527634)
        p = tl.fma(f, p, 0.24024099111557007)
        p = tl.fma(f, p, 0.6931241750717163)
    p = tl.fma(f, p, 1.0)
    exponent = rounded.to(tl.int32, bitcast=True) << _MANTISSA
    return (p.to(tl.int32, bitcast=True) + exponent).to(tl.float32, bitcast=True)
