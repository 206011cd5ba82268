"""Query tiles of 8 and 16 rows: every warp has keys of its own, and its own maximum, sum and accumulator.

Scores are [warps, 16 rows, keys of a warp] by mma.sync: no barrier and no exchange between warps inside a tile. At the
end the warps' results lie side by side in registers and merge there, once. A tile of 8 rows keeps half of the
instruction's 16.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mma_v2

from flashtile.kernels.gluon.quantised import columns_in_order, holds_codes, keys_as_half, values_as_half
from flashtile.kernels.tile.softmax import finite


@gluon.constexpr_function
def own_keys_layout(num_warps):
    """Of scores [warps, rows, keys] and of the accumulator [warps, rows, dim]."""
    return gl.NVMMADistributedLayout([2, 0], [num_warps, 1, 1], [1, 16, 8])


@gluon.jit
def repeated_rows(q_shared, ROWS: gl.constexpr, DIM: gl.constexpr, NUM_WARPS: gl.constexpr):
    """q [ROWS, DIM] as the first operand [warps, ROWS, DIM], the same for every warp."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, own_keys_layout(NUM_WARPS), 2)
    one = gl.expand_dims(q_shared.load(gl.SliceLayout(0, OPERAND)), 0)
    return gl.convert_layout(gl.broadcast(one, gl.full([NUM_WARPS, ROWS, DIM], 0.0, q_shared.dtype, OPERAND))[0], OPERAND)


@gluon.jit
def own_scores(q, k_tile, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, DIM: gl.constexpr, NUM_WARPS: gl.constexpr):
    """q k^T: [warps, ROWS, BLOCK_N / warps]."""
    S: gl.constexpr = own_keys_layout(NUM_WARPS)
    OWN: gl.constexpr = BLOCK_N // NUM_WARPS
    k = k_tile.reshape([NUM_WARPS, OWN, k_tile.shape[1]]).permute((0, 2, 1)).load(gl.DotOperandLayout(1, S, 2))
    if holds_codes(k.dtype):
        k = keys_as_half(k)
    return mma_v2(q, k, gl.full([NUM_WARPS, ROWS, OWN], 0.0, gl.float32, S))


@gluon.jit
def own_values(p, v_tile, acc, unseen, first, last, key, BLOCK_N: gl.constexpr, DIM: gl.constexpr, NUM_WARPS: gl.constexpr):
    """acc + p v. With ``unseen`` keys in the tile their values count as zeros: 0 x NaN of unwritten memory is NaN."""
    S: gl.constexpr = own_keys_layout(NUM_WARPS)
    OPERAND: gl.constexpr = gl.DotOperandLayout(1, S, 2)
    OWN: gl.constexpr = BLOCK_N // NUM_WARPS
    v = v_tile.reshape([NUM_WARPS, OWN, v_tile.shape[1]]).load(OPERAND)
    if unseen:
        warp = gl.arange(0, NUM_WARPS, gl.SliceLayout(1, gl.SliceLayout(2, OPERAND)))
        own = gl.arange(0, OWN, gl.SliceLayout(0, gl.SliceLayout(2, OPERAND)))
        at = key + gl.expand_dims(warp * OWN, 1) + gl.expand_dims(own, 0)
        v = gl.where(gl.expand_dims((at >= first) & (at < last), 2), v, gl.full([], 0, v.dtype))
    if holds_codes(v.dtype):
        v = values_as_half(v)
    return mma_v2(gl.convert_layout(p.to(v.dtype), gl.DotOperandLayout(0, S, 2)), v, acc)


@gluon.jit
def merge_warps(m, l, acc, QUANTISED: gl.constexpr, ROWS: gl.constexpr, DIM: gl.constexpr, NUM_WARPS: gl.constexpr):
    """The warps' (m, l, acc) as one: (ROWS,), (ROWS,), [ROWS, DIM], base 2, not normalised."""
    if QUANTISED:
        acc = columns_in_order(acc)
    SIDE_BY_SIDE: gl.constexpr = gl.BlockedLayout([NUM_WARPS, 1, 4], [1, 1, 32], [1, NUM_WARPS, 1], [2, 1, 0])
    if ROWS == 8:
        m, l = _first_rows(m, NUM_WARPS), _first_rows(l, NUM_WARPS)
        acc, _ = gl.split(gl.permute(gl.reshape(acc, [NUM_WARPS, 2, 8, DIM]), (0, 2, 3, 1)))
    acc = gl.convert_layout(acc, SIDE_BY_SIDE)
    m = gl.convert_layout(m, gl.SliceLayout(2, SIDE_BY_SIDE))
    l = gl.convert_layout(l, gl.SliceLayout(2, SIDE_BY_SIDE))
    m_all = gl.max(m, 0)
    weight = gl.exp2(m - gl.expand_dims(finite(m_all), 0))
    return m_all, gl.sum(l * weight, 0), gl.sum(acc * gl.expand_dims(weight, 2), 0)


@gluon.jit
def _first_rows(x, NUM_WARPS: gl.constexpr):
    """[warps, 16] -> [warps, 8], in registers."""
    kept, _ = gl.split(gl.permute(gl.reshape(x, [NUM_WARPS, 2, 8]), (0, 2, 1)))
    return kept
