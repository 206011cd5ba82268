"""What one program of Hopper's Gluon backward kernels takes of an SM: shared memory, registers. Estimates on the high side.

A program has two consumers, warpgroups of 64 rows each, and a producer; setmaxnreg shares an SM's registers out among them. Tiles
lie in shared memory as panels of 64 columns, a power of two of them.
"""

from __future__ import annotations

from flashtile.planner.backward_tiles import PassTile
from flashtile.problem import Problem

PANEL = 64
BYTES = 2  # of an element
STATISTICS_BYTES = 8  # of a query: lse and delta
SHARED_SCRATCH = 1024  # barriers, and what the producer tells about a tile
SCORE_BUFFERS = 2  # of gradients of scores, through which both warpgroups reach them in one pass
KEY_SLOTS = 2  # tiles of keys that lie in shared memory: the next one comes while results of the last one leave
WARPGROUP = 128  # threads, which hold 64 rows
ROWS = 64
CONSUMER_REGISTERS = 240  # what setmaxnreg leaves a consumer's threads
REGISTERS_BASE = 42  # addresses, barriers' phases, row statistics
REGISTERS_PER_SCORE = {"keys": 1.0, "queries": 1.1}  # scores and their gradient: of both, what is live at a time, and packed operands


def padded_dim(dim: int) -> int:
    """A head dim as these kernels hold it."""
    return max(PANEL, 1 << (dim - 1).bit_length())


def gluon_pass_shared_memory(problem: Problem, tile: PassTile) -> int:
    """Bytes of shared memory: what a program owns, whose place its results take, a ring of what it walks; in one pass also two
    buffers of gradients of scores, from which dQ is computed."""
    dims = padded_dim(problem.head_dim) + padded_dim(problem.head_dim_v)
    over_keys = tile.owner == "keys"
    owned = tile.owned * dims * BYTES * (KEY_SLOTS if over_keys else 1)
    owned += SCORE_BUFFERS * tile.owned * tile.step * BYTES if tile.adds_dq else 0
    return owned + tile.num_stages * tile.step * (dims * BYTES + (STATISTICS_BYTES if over_keys else 0)) + SHARED_SCRATCH


def gluon_pass_registers(problem: Problem, tile: PassTile) -> int:
    """32-bit registers that one thread of a consumer would like to have: accumulators, scores and their gradients.

    In one pass a part of dQ takes the place of scores that are done with.
    """
    dim, dim_v = padded_dim(problem.head_dim), padded_dim(problem.head_dim_v)
    held = dim + dim_v if tile.owner == "keys" else dim
    need = REGISTERS_BASE + ROWS * (held + 2 * REGISTERS_PER_SCORE[tile.owner] * tile.step) / WARPGROUP
    return int(need)
