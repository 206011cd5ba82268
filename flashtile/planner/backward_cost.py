"""What a backward plan costs: a kernel for delta, then both passes by the model of ``walk_cost.py``; and what the device needs at least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flashtile.planner.backward_footprint_gluon import padded_dim
from flashtile.planner.backward_tiles import PassTile
from flashtile.planner.backward_work import seen_by
from flashtile.planner.catalog import GLUON_BACKWARD_SM90, TRITON_BACKWARD
from flashtile.planner.device import Device
from flashtile.planner.forward_cost import CPU_START_US, forward_flops
from flashtile.planner.forward_footprint import held_dim
from flashtile.planner.forward_work import row_tiles
from flashtile.planner.resources import Footprint, product_rate
from flashtile.planner.walk_cost import SPECIALISED_LOSS, Walk, WalkCost, walk_cost
from flashtile.problem import DTYPE_BYTES, Problem

START_US = {GLUON_BACKWARD_SM90: 3.0, TRITON_BACKWARD: 3.0}  # launch of a pass, its first loads, its last rows written
TILE_US = {GLUON_BACKWARD_SM90: 1.0, TRITON_BACKWARD: 1.5}  # a tile's first and last step, which nothing overlaps
DELTA_START_US = 2.0  # launch of the kernel that computes delta
DQ_START_US = 2.0  # launch of what rounds dQ's sums; the kernel for delta zeroes them
DQ_SUM_ROWS = 128  # queries of a tile of such sums
DQ_SUM_BYTES = 4  # of an element of dQ as the programs of one pass add to it
ONE_PASS_LOSS = 0.7  # in the place of SPECIALISED_LOSS: gradients of scores pass through shared memory, which products read too
SCORE_OPERATIONS = 6  # vector instructions a score: scale, difference, its gradient's difference and product, two conversions
STATISTICS_BYTES = 8  # of a query: lse and delta


class BackwardCost(NamedTuple):
    """Microseconds of the kernels, one after the other. In one pass there is no cost of queries; then ``dq_us`` is that of zeroing
    dQ's sums and of rounding them."""

    delta_us: float
    keys: WalkCost
    queries: WalkCost | None
    dq_us: float = 0.0

    @property
    def total_us(self) -> float:
        return self.delta_us + self.keys.total_us + (self.queries.total_us if self.queries else self.dq_us)


def backward_flops(problem: Problem) -> int:
    """2.5 times the forward's: five products over visible pairs instead of two. What both passes compute twice does not count."""
    return 5 * forward_flops(problem) // 2


def backward_bytes(problem: Problem) -> int:
    """Bytes that have to move once: q, k, v, out, their gradients, lse."""
    dims = problem.head_dim + problem.head_dim_v
    rows = problem.total_q * problem.num_heads_q
    keys = seen_by(problem, "keys").total_q * problem.num_heads_kv
    return 2 * DTYPE_BYTES[problem.dtype_q] * dims * (rows + keys) + 4 * rows


def backward_roofline_us(problem: Problem, device: Device) -> tuple[float, float, float]:
    """Microseconds that the device needs at least: for the products, for the exponentials, for the memory."""
    flops = backward_flops(problem)
    scores = forward_flops(problem) / 2 / (problem.head_dim + problem.head_dim_v)
    return 1e6 * flops / product_rate(problem, device), 1e6 * scores / device.exp_rate, 1e6 * backward_bytes(problem) / device.bandwidth


def delta_us(problem: Problem, device: Device) -> float:
    """The kernel that reads out and dout, and writes one number a row."""
    rows = problem.total_q * problem.num_heads_q
    moved = rows * (2 * DTYPE_BYTES[problem.dtype_out] * problem.head_dim_v + 2 * STATISTICS_BYTES)
    return (DELTA_START_US if device.is_gpu else 0.0) + 1e6 * moved / device.bandwidth


def dq_sums(problem: Problem) -> int:
    """Elements of dQ as one pass holds its sums: whole tiles of queries, and dims as Hopper's kernel holds them."""
    return row_tiles(problem, DQ_SUM_ROWS) * DQ_SUM_ROWS * padded_dim(problem.head_dim)


def backward_workspace(problem: Problem, *, one_pass: bool) -> int:
    """Bytes that a call allocates beside its results: statistics of each query, and in one pass dQ's sums."""
    rows = problem.total_q * problem.num_heads_q
    return rows * STATISTICS_BYTES + (dq_sums(problem) * DQ_SUM_BYTES if one_pass else 0)


def dq_us(problem: Problem, device: Device) -> float:
    """What one pass needs beside it: zeros for the sums of dQ, and a kernel that rounds them."""
    moved = dq_sums(problem) * (2 * DQ_SUM_BYTES + DTYPE_BYTES[problem.dtype_q])
    return DQ_START_US + 1e6 * moved / device.bandwidth


def pass_cost(problem: Problem, tile: PassTile, footprint: Footprint, device: Device) -> WalkCost:
    """One pass: tiles of what it owns walk what sees it, or what it sees.

    The pass over keys has four products a score (scores, their gradient, dK and dV), and walks the queries of each head of the
    group; the pass over queries has three; one pass instead of both has five, and adds to dQ's sums. On a CPU, where one pass
    does it all, the pass over keys counts for both.
    """
    size, dim, dim_v = DTYPE_BYTES[problem.dtype_k], problem.head_dim, problem.head_dim_v
    over_keys = tile.owner == "keys"
    if not device.is_gpu:
        matrix_us, exp_us, memory_us = backward_roofline_us(problem, device) if over_keys else (0.0, 0.0, 0.0)
        exposed_us = matrix_us + exp_us - max(matrix_us, exp_us, memory_us)
        return WalkCost(memory_us, matrix_us, exp_us, exposed_us, 0.0, CPU_START_US if over_keys else 0.0)
    rows, keys = problem.total_q * problem.num_heads_q, seen_by(problem, "keys").total_q * problem.num_heads_kv
    read = rows * (size * (dim + dim_v) + STATISTICS_BYTES) + keys * size * (dim + dim_v)
    written = keys * size * (dim + dim_v) if over_keys else rows * size * dim
    products = (3 if tile.adds_dq else 2) * held_dim(dim) + (2 if over_keys else 1) * held_dim(dim_v)
    walk = Walk(
        owned=tile.owned,
        step=tile.step,
        repeats=problem.group if over_keys else 1,
        dims=products,
        operations=SCORE_OPERATIONS,
        row_bytes=size * (dim + dim_v) + (STATISTICS_BYTES if over_keys else 0) + (DQ_SUM_BYTES * held_dim(dim) if tile.adds_dq else 0),
        dram_bytes=read + written,
        start_us=START_US[tile.kernel],
        tile_us=TILE_US[tile.kernel],
    )
    loss = None
    if tile.kernel == GLUON_BACKWARD_SM90:
        loss = ONE_PASS_LOSS if tile.adds_dq else SPECIALISED_LOSS
    return walk_cost(seen_by(problem, tile.owner), walk, footprint, loss, tile.num_warps, device)


def backward_cost(problem: Problem, tiles: Sequence[PassTile], footprints: Sequence[Footprint], device: Device) -> BackwardCost:
    """A plan's kernels, by the tiles and footprints of its passes."""
    keys, *queries = (pass_cost(problem, tile, footprint, device) for tile, footprint in zip(tiles, footprints))
    return BackwardCost(delta_us(problem, device), keys, queries[0] if queries else None, 0.0 if queries else dq_us(problem, device))
