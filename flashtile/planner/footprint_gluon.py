"""What one program of Hopper's Gluon kernel takes of an SM: matrix instruction, shared memory, registers. Estimates on the high side.

Tiles are padded to powers of two of at least 64 columns. With 8 and 16 rows each warp owns keys of a tile and has an
accumulator of 16 rows, the matrix instruction's; with 64 and 128 rows each warp owns 16 rows.
"""

from __future__ import annotations

from flashtile.planner.figures import Architecture, Mma
from flashtile.planner.tiles import TileShape
from flashtile.problem import Problem

MIN_BOX_DIM = 64  # 128 bytes of 16-bit values: the width that shared memory is swizzled in
INPUT_BYTES = 2
INSTRUCTION_ROWS = 16  # of mma.sync, and of each warp of a wgmma
SHARED_SCRATCH = 1024  # barriers and alignment of the ring
REGISTERS_BASE = 32  # addresses, barriers' phases, row statistics of the mma.sync tiles
REGISTERS_PER_OWN_KEY = 1.9  # scores, probabilities and fragments, a key that a warp owns
WGMMA_REGISTERS_BASE = 48
REGISTERS_PER_SCORE = 1.5  # wgmma: a score and its packed probability
REGISTERS_PER_FEATURE = 7  # each of softcap, ALiBi, paging and packed queries
WARP = 32


def box_dim(dim: int) -> int:
    """A head dim as shared memory holds it: the next power of two, at least 64."""
    return max(MIN_BOX_DIM, 1 << (dim - 1).bit_length())


def owns_keys(tile: TileShape) -> bool:
    """Whether a tile's warps own keys (mma.sync) rather than rows (wgmma)."""
    return tile.block_m <= INSTRUCTION_ROWS


def gluon_mma(tile: TileShape, arch: Architecture) -> Mma | None:
    """mma.sync where warps own keys, else wgmma, whatever Triton would prefer."""
    return next((mma for mma in arch.mmas if (mma.warps == 1) == owns_keys(tile)), None)


def gluon_shared_memory(problem: Problem, tile: TileShape) -> int:
    """Bytes of shared memory: the ring, in which the warps' accumulators may meet at the end, the query tile, barriers."""
    dim, dim_v = box_dim(problem.head_dim), box_dim(problem.head_dim_v)
    ring = tile.num_stages * tile.block_n * (dim + dim_v) * INPUT_BYTES
    merge = tile.num_warps * tile.block_m * dim_v * 4 if owns_keys(tile) else 0
    q_bytes = max(INSTRUCTION_ROWS, tile.block_m) * dim * INPUT_BYTES
    return max(ring, merge) + q_bytes + SHARED_SCRATCH


def gluon_registers(problem: Problem, tile: TileShape, features: int) -> int:
    """32-bit registers that one thread would like to have, for a kernel with so many features."""
    dim, dim_v = box_dim(problem.head_dim), box_dim(problem.head_dim_v)
    accumulator = INSTRUCTION_ROWS * dim_v / WARP
    if owns_keys(tile):
        q = INSTRUCTION_ROWS * dim * INPUT_BYTES / 4 / WARP
        work = q + REGISTERS_PER_OWN_KEY * tile.block_n / tile.num_warps + REGISTERS_BASE
    else:
        work = REGISTERS_PER_SCORE * INSTRUCTION_ROWS * tile.block_n / WARP + WGMMA_REGISTERS_BASE
    return int(accumulator + work + REGISTERS_PER_FEATURE * features)
