"""What one program of Hopper's Gluon backward kernels takes of an SM: shared memory, registers. Estimates on the high side.

A program has two consumers, warpgroups of 64 rows each, and a producer; setmaxnreg shares an SM's registers out among them. Tiles
lie in shared memory as panels of 64 columns, a power of two of them.
"""

from __future__ import annotations

from flashtile.planner.backward_tiles import WIDE_HEAD, PassTile
from flashtile.planner.forward_footprint import held_dim
from flashtile.planner.forward_footprint_gluon import panels_of
from flashtile.problem import Problem

PANEL = 64
BYTES = 2  # of an element
STATISTICS_BYTES = 8  # of a query: lse and delta
SHARED_SCRATCH = 1024  # barriers, and what the producer tells about a tile
SHARED_DQ = 8192  # numbers of dQ that two warpgroups share; of fewer a third one computes all
SUM_BLOCKS, SUM_BYTES = 2, 4  # its blocks on their way, and bytes of a number
SCORE_BYTES = 4  # of a probability that one warpgroup leaves for the other
SCORE_BUFFERS = 2  # of these
WARPGROUP = 128  # threads, which hold 64 rows
ROWS = 64
CONSUMER_REGISTERS = 240  # what setmaxnreg leaves a consumer's threads
REGISTERS_BASE = 42  # addresses, barriers' phases, row statistics
REGISTERS_PER_SCORE = {"keys": 1.0, "queries": 1.1}  # scores and their gradient: of both, what is live at a time, and packed operands


def padded_dim(dim: int) -> int:
    """A head dim as these kernels hold it."""
    return max(PANEL, 1 << (dim - 1).bit_length())


def gluon_pass_shared_memory(problem: Problem, tile: PassTile) -> int:
    """Bytes of shared memory: what a program owns, whose place its results take (or one as large), a ring of what it walks; in one pass
    also one of gradients of scores, from which dQ is computed, and blocks of dQ on their way where a third warpgroup computes it."""
    if max(problem.head_dim, problem.head_dim_v) > WIDE_HEAD:
        return _wide_shared_memory(problem, tile)
    dims = padded_dim(problem.head_dim) + padded_dim(problem.head_dim_v)
    over_keys = tile.owner == "keys"
    owned = tile.owned * dims * BYTES * (tile.key_slots if over_keys else 1)
    if tile.adds_dq:
        owned += tile.num_stages * tile.owned * tile.step * BYTES
        owned += 0 if padded_dim(problem.head_dim) * tile.step >= SHARED_DQ else SUM_BLOCKS * ROWS * PANEL * SUM_BYTES
    return owned + tile.num_stages * tile.step * (dims * BYTES + (STATISTICS_BYTES if over_keys else 0)) + SHARED_SCRATCH


def _wide_shared_memory(problem: Problem, tile: PassTile) -> int:
    """Of heads that are held in two parts: keys and values take a tile as wide as the larger of their dims, since results of either
    dim take the place of both, and probabilities lie beside them; of values a ring has a stage less than of keys."""
    dim, dim_v = (panels_of(dim) * PANEL for dim in (problem.head_dim, problem.head_dim_v))
    if tile.owner == "queries":
        return (tile.owned * (dim + dim_v) + tile.step * (tile.num_stages * dim + (tile.num_stages - 1) * dim_v)) * BYTES + SHARED_SCRATCH
    owned = 2 * tile.owned * padded_dim(max(dim, dim_v)) * BYTES + SCORE_BUFFERS * tile.owned * tile.step * SCORE_BYTES
    return owned + tile.num_stages * tile.step * ((dim + dim_v) * BYTES + STATISTICS_BYTES) + SHARED_SCRATCH


def gluon_pass_registers(problem: Problem, tile: PassTile) -> int:
    """32-bit registers that one thread of a consumer would like to have: accumulators, scores and their gradients.

    In one pass a part of dQ takes the place of scores that are done with. Of wide heads a warpgroup holds dK or dV, not both.
    """
    dim, dim_v = padded_dim(problem.head_dim), padded_dim(problem.head_dim_v)
    held = dim + dim_v if tile.owner == "keys" else dim
    if max(dim, dim_v) > WIDE_HEAD and not tile.adds_dq:
        dim, dim_v = held_dim(problem.head_dim), held_dim(problem.head_dim_v)
        held = max(dim, dim_v) if tile.owner == "keys" else dim
    need = REGISTERS_BASE + ROWS * (held + 2 * REGISTERS_PER_SCORE[tile.owner] * tile.step) / WARPGROUP
    return int(need)
