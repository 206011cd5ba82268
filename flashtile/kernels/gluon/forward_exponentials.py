"""Powers of two of a warpgroup's scores, some of them without the unit for exponentials.

At short head dims that unit, which takes 16 exponentials a cycle of an SM, is busy for as long as the matrix unit. So a share of the
columns may be computed by a polynomial on the units for multiply-add instead, which have time left. Source of the idea:
FlashAttention-4 (Dao et al. 2025); the polynomial is ours (tile/exponential.py).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.kernels.tile.exponential import exp2_by_polynomial

_ALL = gl.constexpr(16)
_CHUNK = gl.constexpr(8)  # columns of a product that four lanes share: which chunks a lane holds, is a matter of its registers


@gluon.jit
def exponentials(x, SIXTEENTHS: gl.constexpr, DEGREE: gl.constexpr):
    """2**x for scores x [rows, columns] less their maximum; so many sixteenths of the columns by a polynomial of that degree.

    Columns are halved, by chunks in turn, until a half goes one way as a whole; of 8 columns, which cannot be halved, all go the
    usual way.
    """
    if SIXTEENTHS <= 0 or (SIXTEENTHS < _ALL and x.shape[1] < 2 * _CHUNK):
        return gl.exp2(x)
    elif SIXTEENTHS >= _ALL:
        return exp2_by_polynomial(x, DEGREE)
    else:
        even, odd = _halves(x)
        if SIXTEENTHS * 2 >= _ALL:
            even = exp2_by_polynomial(even, DEGREE)
            odd = exponentials(odd, SIXTEENTHS * 2 - _ALL, DEGREE)
        else:
            even = gl.exp2(even)
            odd = exponentials(odd, SIXTEENTHS * 2, DEGREE)
        return _joined(even, odd, x)


@gluon.jit
def _halves(x):
    """The even and the odd chunks of columns, without moving any number between registers."""
    ROWS: gl.constexpr = x.shape[0]
    PAIRS: gl.constexpr = x.shape[1] // (2 * _CHUNK)
    even, odd = gl.split(gl.permute(gl.reshape(x, [ROWS, PAIRS, 2, _CHUNK]), (0, 1, 3, 2)))
    return gl.reshape(even, [ROWS, PAIRS * _CHUNK]), gl.reshape(odd, [ROWS, PAIRS * _CHUNK])


@gluon.jit
def _joined(even, odd, x):
    """What ``_halves`` took apart, laid out like ``x``."""
    ROWS: gl.constexpr = x.shape[0]
    PAIRS: gl.constexpr = x.shape[1] // (2 * _CHUNK)
    both = gl.join(gl.reshape(even, [ROWS, PAIRS, _CHUNK]), gl.reshape(odd, [ROWS, PAIRS, _CHUNK]))
    return gl.convert_layout(gl.reshape(gl.permute(both, (0, 1, 3, 2)), [ROWS, x.shape[1]]), x.type.layout, assert_trivial=True)
