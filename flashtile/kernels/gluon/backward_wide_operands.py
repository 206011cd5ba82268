"""Keys or values of a warpgroup as the first operand of products over wide heads: half in registers, half in shared memory.

Of 64 rows, 128 dims take 32 registers of a thread. What is left of the head dim is read from shared memory in each product.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from flashtile.kernels.gluon.backward_wide_parts import parts_of_tile
from flashtile.kernels.gluon.forward_memory import ROWS, main_dim, rest_dim
from flashtile.kernels.gluon.forward_scores import operand_layout, products_layout, start_scores

HELD = gl.constexpr(128)  # dims in registers


@gluon.constexpr_function
def products_over(dim):
    """How many asynchronous products ``start_products`` starts."""
    return 2 if main_dim(dim) > HELD.value or rest_dim(dim) > 0 else 1


@gluon.jit
def load_operand(tiles, BLOCK_M: gl.constexpr, DIM: gl.constexpr):
    """Rows in the one tile of ``tiles``: the first dims in registers, the others as they lie in shared memory."""
    main, rest = parts_of_tile(tiles, 0, DIM)
    if main_dim(DIM) > HELD:
        held = main.slice(0, HELD, dim=1)
        return held.load(operand_layout(BLOCK_M)), main.slice(HELD, main_dim(DIM) - HELD, dim=1)
    else:
        return main.load(operand_layout(BLOCK_M)), rest


@gluon.jit
def start_products(operand, ring, stage, BLOCK_M: gl.constexpr, DIM: gl.constexpr):
    """operand x^T [64, BLOCK_M] of the rows x in a stage of the ring, on its way."""
    if main_dim(DIM) > HELD:
        held, others = operand
        x = ring[1].index(stage)
        zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, products_layout(BLOCK_M))
        x_others = x.slice(HELD, main_dim(DIM) - HELD, dim=1).permute((1, 0))
        s = warpgroup_mma(others, x_others, zeros, use_acc=False, is_async=True)
        return warpgroup_mma(held, x.slice(0, HELD, dim=1).permute((1, 0)), s, is_async=True)
    else:
        return start_scores(operand, ring, stage, BLOCK_M, DIM)
