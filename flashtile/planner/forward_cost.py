"""What a forward plan costs: a small model with one named constant for each thing that takes time.

It is meant to rank tiles and to say what limits them, not to replace a measurement. Fitted to one H200 (bfloat16, 16,384
tokens at 1k to 16k keys, head dims 64, 128 and 256); other devices scale by their figures.
"""

from __future__ import annotations

from typing import NamedTuple

from flashtile.planner.catalog import GLUON_FORWARD_SM90, TRITON_FORWARD
from flashtile.planner.device import Device
from flashtile.planner.figures import EXP_PER_CLOCK
from flashtile.planner.footprint import Footprint
from flashtile.planner.forward_footprint import held_dim
from flashtile.planner.forward_tiles import ForwardTileShape
from flashtile.planner.forward_work import row_tiles, visible_pairs, walked_tiles
from flashtile.problem import DTYPE_BYTES, Problem

START_US = {GLUON_FORWARD_SM90: 3.0, TRITON_FORWARD: 3.0}  # launch, the first loads, the last rows written
ROW_TILE_US = {GLUON_FORWARD_SM90: 0.8, TRITON_FORWARD: 1.2}  # a tile's first scores and last values, which nothing overlaps
SCORE_OPERATIONS = 5  # vector instructions a score: scale, maximum, subtraction, sum, conversion
MASK_OPERATIONS = 4  # more of them in a tile of keys that only some rows see
ALONE_LOSS = 1.0  # share of the exponentials that products do not hide where one program has an SM of Triton's kernel,
TOGETHER_LOSS = 0.2  # where several share it, so that one computes while another takes exponentials,
INTERLEAVED_LOSS = 0.4  # where each warp issues its own products and a scheduler has two warps or more,
SPECIALISED_LOSS = 0.07  # and where warpgroups of one program take turns; also what copies beside the products cost
SCHEDULERS = 4  # of an SM
L2_BYTES_PER_CLOCK = 32  # what an SM reads of L2 while all of them do
FMA_EFFICIENCY = 0.5  # share of the vector rate that an FMA dot reaches
UNEVEN_TAIL = 0.5  # of a mean row tile: what SMs wait for the last ones where tiles are unlike, longest first
CPU_START_US = 15.0  # one call into the CPU engine


class ForwardCost(NamedTuple):
    """Microseconds by cause. memory, matrix and exp are what the device needs for each alone; exposed is what does not overlap
    with the longest of them, tail is the time in which SMs have no tile left, start is launch, first loads and row tiles' ends."""

    memory_us: float
    matrix_us: float
    exp_us: float
    exposed_us: float
    tail_us: float
    start_us: float

    @property
    def total_us(self) -> float:
        return max(self.memory_us, self.matrix_us, self.exp_us) + self.exposed_us + self.tail_us + self.start_us

    @property
    def limiter(self) -> str:
        """What takes longest: "memory", "matrix", "exp" (exp2 and the vector arithmetic around it), "tail" or "start"."""
        causes = (
            ("matrix", self.matrix_us), ("exp", self.exp_us), ("memory", self.memory_us), ("tail", self.tail_us), ("start", self.start_us),
        )  # fmt: skip
        return max(causes, key=lambda cause: cause[1])[0]


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
    return 1e6 * flops / device.matrix_rate, 1e6 * scores / device.exp_rate, 1e6 * forward_bytes(problem) / device.bandwidth


def forward_cost(problem: Problem, tile: ForwardTileShape, footprint: Footprint, device: Device) -> ForwardCost:
    """Row tiles go to SMs, each walks its key tiles; products, exponentials and copies of a key tile overlap in part."""
    if not device.is_gpu:
        return _cpu_cost(problem, device)
    block_m, block_n, sms = tile.block_m, tile.block_n, device.num_sms
    tiles = row_tiles(problem, block_m)
    per_head = -(-problem.seqlen_q // block_m)
    if not tiles or not problem.seqlen_k:
        return ForwardCost(0.0, 0.0, 0.0, 0.0, 0.0, START_US[tile.kernel])
    mean_walk = walked_tiles(problem, block_m, block_n) / per_head

    mma = footprint.mma
    rows = block_m if mma is None else max(block_m, mma.m)
    scores = rows * block_n
    dims = held_dim(problem.head_dim) + held_dim(problem.head_dim_v)
    rate = device.vector_rate * FMA_EFFICIENCY if mma is None else device.matrix_rate * mma.rate
    operations_per_us = device.vector_rate / 2 / sms * 1e-6
    sides = (problem.band.left is not None) + (problem.band.right is not None)
    masked_share = min(1.0, sides * max(1.0, block_m / block_n) / mean_walk) if mean_walk else 0.0
    # of one key tile on one SM
    matrix_us = 2.0 * scores * dims * sms / rate * 1e6
    exp_us = scores * (sms / device.exp_rate * 1e6 + (SCORE_OPERATIONS + MASK_OPERATIONS * masked_share) / operations_per_us)
    copy_us = block_n * _kv_bytes(problem) * EXP_PER_CLOCK * sms / (L2_BYTES_PER_CLOCK * device.exp_rate) * 1e6

    tiles_per_sm = -(-tiles // sms)
    loss = _overlap_loss(tile, footprint, min(footprint.resident, tiles_per_sm))
    compute_us = max(matrix_us, exp_us) + loss * min(matrix_us, exp_us)
    step_us = max(compute_us, copy_us) + SPECIALISED_LOSS * min(compute_us, copy_us)

    even_walk = tiles * mean_walk / sms
    if problem.band.is_full:
        busiest = tiles_per_sm * mean_walk
    else:
        longest = -(-min(problem.seqlen_k, problem.keys_read) // block_n)
        busiest = min(max(float(longest), even_walk + UNEVEN_TAIL * mean_walk), tiles_per_sm * float(longest))
    dram_us = 1e6 * forward_bytes(problem) / device.bandwidth
    memory_us = max(dram_us, even_walk * copy_us)
    longest_us = max(even_walk * matrix_us, even_walk * exp_us, memory_us)
    resident = max(1, min(footprint.resident, tiles_per_sm))
    return ForwardCost(
        memory_us=memory_us,
        matrix_us=even_walk * matrix_us,
        exp_us=even_walk * exp_us,
        exposed_us=max(0.0, even_walk * step_us - longest_us),
        tail_us=max(0.0, busiest - even_walk) * step_us,
        start_us=START_US[tile.kernel] + ROW_TILE_US[tile.kernel] * tiles_per_sm / resident,
    )


def _overlap_loss(tile: ForwardTileShape, footprint: Footprint, programs: int) -> float:
    """Share of the shorter of products and exponentials that shows, with so many programs on an SM."""
    if tile.kernel == GLUON_FORWARD_SM90:
        return SPECIALISED_LOSS
    if footprint.mma is not None and footprint.mma.warps == 1:
        return INTERLEAVED_LOSS if programs * tile.num_warps >= 2 * SCHEDULERS else ALONE_LOSS
    return TOGETHER_LOSS if programs > 1 else ALONE_LOSS


def _kv_bytes(problem: Problem) -> int:
    return problem.head_dim * DTYPE_BYTES[problem.dtype_k] + problem.head_dim_v * DTYPE_BYTES[problem.dtype_v]


def _cpu_cost(problem: Problem, device: Device) -> ForwardCost:
    """Products and exponentials one after the other, each on all threads."""
    matrix_us, exp_us, memory_us = roofline_us(problem, device)
    return ForwardCost(memory_us, matrix_us, exp_us, matrix_us + exp_us - max(matrix_us, exp_us, memory_us), 0.0, CPU_START_US)
