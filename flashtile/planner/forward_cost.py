"""What a forward plan costs, by the model of ``walk_cost.py``; and what the device needs at least."""

from __future__ import annotations

from flashtile.planner.catalog import GLUON_FORWARD_SM90, TRITON_FORWARD
from flashtile.planner.device import Device
from flashtile.planner.forward_footprint import held_dim
from flashtile.planner.forward_tiles import ForwardTileShape
from flashtile.planner.forward_work import visible_pairs
from flashtile.planner.resources import Footprint, product_rate
from flashtile.planner.walk_cost import SPECIALISED_LOSS, Walk, WalkCost, walk_cost
from flashtile.problem import DTYPE_BYTES, Problem

START_US = {GLUON_FORWARD_SM90: 3.0, TRITON_FORWARD: 3.0}  # launch, the first loads, the last rows written
ROW_TILE_US = {GLUON_FORWARD_SM90: 0.8, TRITON_FORWARD: 1.2}  # a tile's first scores and last values, which nothing overlaps
SCORE_OPERATIONS = 5  # vector instructions a score: scale, maximum, subtraction, sum, conversion
CPU_START_US = 15.0  # one call into the CPU engine


def forward_flops(problem: Problem) -> int:
    """Multiplications and additions of both products over visible pairs, as if all sequences were alike."""
    pairs = visible_pairs(problem) * problem.num_heads_q
    rows = problem.batch * problem.seqlen_q
    pairs = pairs * problem.total_q // problem.seqlen_q if problem.total_q < rows else pairs * problem.batch
    return 2 * pairs * (problem.head_dim + problem.head_dim_v)


def forward_bytes(problem: Problem) -> int:
    """Bytes that have to move once: q, k, v and out."""
    sizes = DTYPE_BYTES[problem.dtype_q] * problem.head_dim + DTYPE_BYTES[problem.dtype_out] * problem.head_dim_v
    return problem.total_q * problem.num_heads_q * sizes + problem.kv_bytes


def roofline_us(problem: Problem, device: Device) -> tuple[float, float, float]:
    """Microseconds that the device needs at least: for the products, for the exponentials, for the memory."""
    flops = forward_flops(problem)
    scores = flops / 2 / (problem.head_dim + problem.head_dim_v)
    return 1e6 * flops / product_rate(problem, device), 1e6 * scores / device.exp_rate, 1e6 * forward_bytes(problem) / device.bandwidth


def forward_cost(problem: Problem, tile: ForwardTileShape, footprint: Footprint, device: Device) -> WalkCost:
    """Tiles of rows walk their keys; on a CPU products and exponentials come one after the other, each on all threads."""
    if not device.is_gpu:
        matrix_us, exp_us, memory_us = roofline_us(problem, device)
        return WalkCost(memory_us, matrix_us, exp_us, matrix_us + exp_us - max(matrix_us, exp_us, memory_us), 0.0, CPU_START_US)
    walk = Walk(
        owned=tile.block_m,
        step=tile.block_n,
        repeats=1,
        dims=held_dim(problem.head_dim) + held_dim(problem.head_dim_v),
        operations=SCORE_OPERATIONS,
        row_bytes=problem.head_dim * DTYPE_BYTES[problem.dtype_k] + problem.head_dim_v * DTYPE_BYTES[problem.dtype_v],
        dram_bytes=forward_bytes(problem),
        start_us=START_US[tile.kernel],
        tile_us=ROW_TILE_US[tile.kernel],
    )
    loss = SPECIALISED_LOSS if tile.kernel == GLUON_FORWARD_SM90 else None
    return walk_cost(problem, walk, footprint, loss, tile.num_warps, device)
