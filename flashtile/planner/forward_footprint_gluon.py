"""What one program of Hopper's Gluon forward kernel takes of an SM: shared memory, registers. Estimates on the high side.

A program has consumers, warpgroups of 64 rows each, and a producer; setmaxnreg shares an SM's registers out among them.
"""

from __future__ import annotations

from flashtile.planner.footprint_gluon import box_dim
from flashtile.planner.forward_tiles import ForwardTileShape
from flashtile.problem import Problem

INPUT_BYTES = 2
WARPGROUP = 128  # threads, which hold 64 rows
ROWS = 64
LONG_HEAD = 128  # beyond, results leave through the place of q
SHARED_SCRATCH = 1024  # barriers, and the tile that the scheduler hands over
REGISTERS_BASE = 24  # addresses, barriers' phases, row statistics
REGISTERS_PER_SCORE = 1.5  # a score and its packed probability
REGISTERS_PER_FEATURE = 7  # each of softcap, ALiBi, paging and packed queries
CONSUMER_REGISTERS = {8: 240, 12: 160}  # what setmaxnreg leaves a consumer's threads, by the number of consumer warps


def gluon_forward_shared_memory(problem: Problem, tile: ForwardTileShape) -> int:
    """Bytes of shared memory: the ring of K and V tiles, q, and results on their way out, beside q or in its place."""
    dim, dim_v = box_dim(problem.head_dim), box_dim(problem.head_dim_v)
    ring = tile.num_stages * tile.block_n * (dim + dim_v) * INPUT_BYTES
    q_bytes, out_bytes = tile.block_m * dim * INPUT_BYTES, tile.block_m * dim_v * INPUT_BYTES
    return ring + SHARED_SCRATCH + (max(q_bytes, out_bytes) if max(dim, dim_v) > LONG_HEAD else q_bytes + out_bytes)


def gluon_forward_registers(problem: Problem, tile: ForwardTileShape) -> int:
    """32-bit registers that one thread of a consumer would like to have."""
    dim, dim_v = box_dim(problem.head_dim), box_dim(problem.head_dim_v)
    features = problem.softcap + problem.alibi + problem.ragged_q + (problem.page_size > 0)
    accumulator, scores = ROWS * dim_v / WARPGROUP, ROWS * tile.block_n / WARPGROUP
    q = ROWS * dim / 2 / WARPGROUP if tile.q_in_registers else 0.0
    return int(REGISTERS_BASE + REGISTERS_PER_FEATURE * features + accumulator + REGISTERS_PER_SCORE * scores + q)


def gluon_forward_registers_limit(tile: ForwardTileShape) -> int:
    """Registers that each thread of a consumer is given."""
    return CONSUMER_REGISTERS[tile.num_warps]
