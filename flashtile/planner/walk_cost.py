"""What it costs that programs own tiles of rows and walk tiles of the others: the model behind forward and both backward passes.

It is meant to rank tiles and to say what limits them, not to replace a measurement. Fitted to the forward kernels on one H200
(bfloat16, 16,384 tokens at 1k to 16k keys, head dims 64, 128 and 256); other devices scale by their figures.
"""

from __future__ import annotations

from typing import NamedTuple

from flashtile.planner.device import Device
from flashtile.planner.figures import EXP_PER_CLOCK, Mma
from flashtile.planner.forward_work import row_tiles, walked_tiles
from flashtile.planner.resources import Footprint
from flashtile.problem import Problem

MASK_OPERATIONS = 4  # more vector instructions a score in a tile that only some rows see
DROPOUT_OPERATIONS = 18  # and with dropout: ten rounds of Philox for four scores
ALONE_LOSS = 1.0  # share of the exponentials that products do not hide where one program has an SM of Triton's kernel,
TOGETHER_LOSS = 0.2  # where several share it, so that one computes while another takes exponentials,
INTERLEAVED_LOSS = 0.4  # where each warp issues its own products and a scheduler has two warps or more,
SPECIALISED_LOSS = 0.07  # and where warpgroups of one program take turns; also what copies beside the products cost
SCHEDULERS = 4  # of an SM
L2_BYTES_PER_CLOCK = 32  # what an SM reads of L2 while all of them do
FMA_EFFICIENCY = 0.5  # share of the vector rate that an FMA dot reaches
UNEVEN_TAIL = 0.5  # of a mean walk: what SMs wait for the last ones where walks are unlike, longest first


class WalkCost(NamedTuple):
    """Microseconds by cause. memory, matrix and exp are what the device needs for each alone; exposed is what does not overlap
    with the longest of them, tail is the time in which SMs have no tile left, start is launch, first loads and tiles' ends."""

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
    def bound(self) -> str:
        """What takes longest: "memory", "matrix", "exp" (exp2 and the vector arithmetic around it), "tail" or "start"."""
        causes = (
            ("matrix", self.matrix_us), ("exp", self.exp_us), ("memory", self.memory_us), ("tail", self.tail_us), ("start", self.start_us),
        )  # fmt: skip
        return max(causes, key=lambda cause: cause[1])[0]


class Walk(NamedTuple):
    """What the programs of one kernel do: rows that a tile owns, rows of a step, how many times each step is walked, and what a step costs.

    ``dims`` are those of all its products together; ``operations`` are vector instructions a score without a mask; ``row_bytes``
    those of a walked row; ``dram_bytes`` what moves once in all; ``tile_us`` a tile's first and last step, which nothing overlaps.
    """

    owned: int
    step: int
    repeats: int
    dims: int
    operations: float
    row_bytes: int
    dram_bytes: int
    start_us: float
    tile_us: float


def walk_cost(problem: Problem, walk: Walk, footprint: Footprint, loss: float | None, num_warps: int, device: Device) -> WalkCost:
    """Tiles of the problem's queries go to SMs, each walks its key tiles; products, exponentials and copies of a step overlap in part.

    ``loss`` is the share of the shorter of products and exponentials that shows; None where that follows from the programs on an SM.
    """
    sms = device.num_sms
    tiles = row_tiles(problem, walk.owned)
    if not tiles or not problem.seqlen_k:
        return WalkCost(0.0, 0.0, 0.0, 0.0, 0.0, walk.start_us)
    mean_walk = walk.repeats * walked_tiles(problem, walk.owned, walk.step) / -(-problem.seqlen_q // walk.owned)

    mma = footprint.mma
    scores = (walk.owned if mma is None else max(walk.owned, mma.m)) * walk.step
    operations_per_us = device.vector_rate / 2 / sms * 1e-6
    sides = (problem.band.left is not None) + (problem.band.right is not None)
    masked_share = min(1.0, walk.repeats * sides * max(1.0, walk.owned / walk.step) / mean_walk) if mean_walk else 0.0
    # of one step on one SM
    matrix_us = 2.0 * scores * walk.dims * sms / _product_rate(mma, device) * 1e6
    operations = walk.operations + MASK_OPERATIONS * masked_share + DROPOUT_OPERATIONS * problem.dropout
    exp_us = scores * (sms / device.exp_rate * 1e6 + operations / operations_per_us)
    copy_us = walk.step * walk.row_bytes * EXP_PER_CLOCK * sms / (L2_BYTES_PER_CLOCK * device.exp_rate) * 1e6

    tiles_per_sm = -(-tiles // sms)
    resident = max(1, min(footprint.resident, tiles_per_sm))
    loss = _overlap_loss(mma, resident, num_warps) if loss is None else loss
    compute_us = max(matrix_us, exp_us) + loss * min(matrix_us, exp_us)
    step_us = max(compute_us, copy_us) + SPECIALISED_LOSS * min(compute_us, copy_us)

    even_walk = tiles * mean_walk / sms
    if problem.band.is_full:
        busiest = tiles_per_sm * mean_walk
    else:
        longest = float(walk.repeats * -(-min(problem.seqlen_k, problem.keys_read) // walk.step))
        busiest = min(max(longest, even_walk + UNEVEN_TAIL * mean_walk), tiles_per_sm * longest)
    memory_us = max(1e6 * walk.dram_bytes / device.bandwidth, even_walk * copy_us)
    longest_us = max(even_walk * matrix_us, even_walk * exp_us, memory_us)
    return WalkCost(
        memory_us=memory_us,
        matrix_us=even_walk * matrix_us,
        exp_us=even_walk * exp_us,
        exposed_us=max(0.0, even_walk * step_us - longest_us),
        tail_us=max(0.0, busiest - even_walk) * step_us,
        start_us=walk.start_us + walk.tile_us * tiles_per_sm / resident,
    )


def _product_rate(mma: Mma | None, device: Device) -> float:
    return device.vector_rate * FMA_EFFICIENCY if mma is None else device.matrix_rate * mma.rate


def _overlap_loss(mma: Mma | None, programs: int, num_warps: int) -> float:
    """Share of the shorter of products and exponentials that shows in a kernel of Triton's, with so many programs on an SM."""
    if mma is not None and mma.warps == 1:
        return INTERLEAVED_LOSS if programs * num_warps >= 2 * SCHEDULERS else ALONE_LOSS
    return TOGETHER_LOSS if programs > 1 else ALONE_LOSS
