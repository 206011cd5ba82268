"""Query tiles of 64 and 128 rows: every warp has 16 rows of its own and sees all keys, by wgmma."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait


@gluon.constexpr_function
def own_rows_layout(num_warps, columns):
    """Of scores [rows, keys] and of the accumulator [rows, dim]."""
    return gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, columns, 16])


@gluon.jit
def row_scores(q_shared, k_tile, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, NUM_WARPS: gl.constexpr):
    """q k^T: [ROWS, BLOCK_N]."""
    zeros = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, own_rows_layout(NUM_WARPS, BLOCK_N))
    s = warpgroup_mma(q_shared, k_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=(s,))


@gluon.jit
def row_values(p, v_tile, acc, unseen, first, last, key, BLOCK_N: gl.constexpr, DIM: gl.constexpr, NUM_WARPS: gl.constexpr):
    """acc + p v. Values of ``unseen`` keys in the tile are overwritten by zeros: 0 x NaN of unwritten memory is NaN."""
    if unseen:
        BLOCKED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [NUM_WARPS, 1], [1, 0])
        at = key + gl.arange(0, BLOCK_N, gl.SliceLayout(1, BLOCKED))
        v_tile.store(gl.where(gl.expand_dims((at >= first) & (at < last), 1), v_tile.load(BLOCKED), 0.0))
        fence_async_shared()
    A: gl.constexpr = own_rows_layout(NUM_WARPS, DIM)
    operand = gl.convert_layout(p.to(v_tile.dtype), gl.DotOperandLayout(0, A, 2))
    result = warpgroup_mma(operand, v_tile, acc, is_async=True)
    return warpgroup_mma_wait(0, deps=(result,))
