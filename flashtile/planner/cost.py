"""What a decode plan costs: a small model with one named constant for each thing that takes time.

It is meant to rank plans and to say why one loses, not to replace a measurement. The constants are data
(``planner/constants.py``), measured on one H200; other devices scale by their figures.
"""

from __future__ import annotations

from typing import NamedTuple

from flashtile.planner.constants import Constants, constants_of
from flashtile.planner.device import Device
from flashtile.planner.footprint import footprint_of, padded
from flashtile.planner.footprint_gluon import merges_parts
from flashtile.planner.resources import Footprint
from flashtile.planner.tiles import TileShape
from flashtile.problem import DTYPE_BYTES, Problem

CPU_START_US = 15.0  # one call into the CPU engine
CPU_SPLIT_US = 4.0  # each split there


class Cost(NamedTuple):
    """Microseconds by cause. memory, matrix, vector and latency overlap: the longest of them is the bound.

    ``combine_us`` is what merging partial results takes, in a kernel of its own or by the programs that left them;
    ``overlap_loss`` the share of what runs beside the bound that shows all the same.
    """

    memory_us: float
    matrix_us: float
    vector_us: float
    latency_us: float
    start_us: float
    combine_us: float
    overlap_loss: float = 0.0

    @property
    def total_us(self) -> float:
        longest = max(self.memory_us, self.matrix_us, self.vector_us, self.latency_us)
        beside = self.memory_us + self.matrix_us + self.vector_us + self.latency_us - longest
        return self.start_us + longest + self.overlap_loss * beside + self.combine_us

    @property
    def bound(self) -> str:
        """What decides: "memory", "matrix", "exp" (vector arithmetic, of which exp2 is the narrowest), or "latency"."""
        waiting = self.latency_us + self.fixed_us
        causes = (("memory", self.memory_us), ("matrix", self.matrix_us), ("exp", self.vector_us), ("latency", waiting))
        return max(causes, key=lambda cause: cause[1])[0]

    @property
    def fixed_us(self) -> float:
        return self.start_us + self.combine_us


class Work(NamedTuple):
    """What a problem asks for, counted once for all plans."""

    rows: int  # packed rows of the longest query
    all_rows: int  # packed rows of all sequences, one key head
    batch: int
    num_heads_kv: int
    keys: int  # keys that a program's rows may see: a window counts, not the cache
    dim: int
    dim_v: int
    kv_bytes_per_key: int
    partial_bytes_per_row: int
    quantised: bool = False


def work_of(problem: Problem) -> Work:
    per_key = problem.head_dim * DTYPE_BYTES[problem.dtype_k] + problem.head_dim_v * DTYPE_BYTES[problem.dtype_v]
    return Work(
        problem.rows, problem.total_q * problem.group, problem.batch, problem.num_heads_kv, problem.keys_read,
        padded(problem.head_dim), padded(problem.head_dim_v), per_key, 4 * problem.head_dim_v + 4, problem.quantised,
    )  # fmt: skip


def row_blocks_of(work: Work, block_m: int) -> int:
    """Row blocks of one key head over all sequences.

    Packed queries of unlike lengths count as one block a sequence plus what all their rows would fill: a batch of single
    tokens with one long chunk is not a batch of long chunks.
    """
    even = work.batch * -(-work.rows // block_m)
    return min(even, work.batch + -(-work.all_rows // block_m)) if work.rows else 0


def predict_us(problem: Problem, plan: TileShape, device: Device, num_splits: int | None = None) -> Cost:
    """The cost of a plan (or of a tile with ``num_splits``), in microseconds."""
    splits = getattr(plan, "num_splits", 1) if num_splits is None else num_splits
    programs = getattr(plan, "num_programs", 0) if num_splits is None else 0
    return cost_of(work_of(problem), plan, footprint_of(problem, plan, device), splits, device, programs)


def cost_of(
    work: Work,
    tile: TileShape,
    footprint: Footprint,
    num_splits: int,
    device: Device,
    num_programs: int = 0,
    constants: Constants | None = None,
) -> Cost:
    """The same with work and footprint at hand: a program walks its key tiles, an SM serves its programs, DRAM serves all.

    ``num_programs``, where it is not 0, shares the key tiles out evenly (stream-K), as if all lengths were alike. ``constants`` are
    the device's, unless others are being tried.
    """
    if not device.is_gpu:
        return _cpu_cost(work, tile.block_m, num_splits, device)
    c = constants or constants_of(device.name)
    block_n, sms = tile.block_n, device.num_sms
    units = row_blocks_of(work, tile.block_m) * work.num_heads_kv
    tiles = -(-work.keys // block_n)
    programs = num_programs or units * num_splits
    tiles_per_program = -(-units * tiles // programs) if num_programs else -(-tiles // num_splits)
    programs_per_sm = -(-programs // sms)
    walked = programs_per_sm * tiles_per_program
    rounds = -(-programs_per_sm // footprint.resident)

    matrix_us, vector_us, chain_us = _iteration(work, tile, footprint, device, c)
    step_us = _alone(tile, matrix_us, vector_us, chain_us)
    latency_us = rounds * (tiles_per_program * step_us + c.extra_warp_us * max(0, tile.num_warps - 4))

    # everything once from DRAM, what other row blocks read again from L2; no SM beyond its share and its bytes in flight
    streams = work.batch * work.num_heads_kv
    once = streams * work.keys * work.kv_bytes_per_key
    again = max(0, units - streams) * work.keys * work.kv_bytes_per_key
    tile_bytes = block_n * work.kv_bytes_per_key
    in_flight = min(footprint.resident, max(1, programs_per_sm)) * max(1, tile.num_stages - 1) * tile_bytes
    sm_bytes_per_us = min(c.sm_bandwidth_share[tile.kernel] * device.bandwidth / sms * 1e-6, in_flight / c.dram_latency_us)
    sm_once = walked * tile_bytes * min(1.0, streams / max(1, units))
    read_us = max(once / device.bandwidth * 1e6, sm_once / sm_bytes_per_us) + again / (c.l2_bandwidth_share * device.bandwidth) * 1e6
    return Cost(
        memory_us=c.dram_latency_us + read_us + step_us,
        matrix_us=walked * matrix_us,
        vector_us=walked * vector_us,
        latency_us=c.dram_latency_us + latency_us,
        start_us=c.start_us[tile.kernel],
        combine_us=_merging_us(work, tile, units, num_splits, num_programs, device, c),
        overlap_loss=c.overlap_loss,
    )


def iteration_us(work: Work, tile: TileShape, footprint: Footprint, device: Device) -> float:
    """How long one key tile takes a program that has an SM for itself; on a CPU, a key for one thread."""
    if not device.is_gpu:
        return 2e6 * tile.block_m * (work.dim + work.dim_v) * device.num_sms / device.matrix_rate
    return _alone(tile, *_iteration(work, tile, footprint, device, constants_of(device.name)))


def _alone(tile: TileShape, matrix_us: float, vector_us: float, chain_us: float) -> float:
    """The parts of one key tile one after the other; fewer than four warps leave some of an SM's four schedulers idle."""
    return chain_us + matrix_us + vector_us * max(1.0, 4.0 / tile.num_warps)


def _iteration(work: Work, tile: TileShape, footprint: Footprint, device: Device, c: Constants) -> tuple[float, float, float]:
    """One key tile of one program: microseconds of an SM's matrix units, of its vector units, and of waiting in between."""
    mma = footprint.mma
    rows = tile.block_m if tile.swapped or mma is None else max(tile.block_m, mma.m // mma.warps)  # an instruction computes all of its rows
    scores = rows * tile.block_n
    dims = work.dim + work.dim_v
    sm_instructions_per_us = device.vector_rate / 2 / device.num_sms * 1e-6
    operations = scores * c.score_operations * (c.swapped_score_factor if tile.swapped else 1)
    operations += c.quantised_key_operations * tile.block_n * dims if work.quantised else 0
    exp_us = scores * device.num_sms / device.exp_rate * 1e6
    if tile.block_m == 1:
        operations += c.vector_key_operations * tile.block_n * dims
        return 0.0, operations / sm_instructions_per_us + exp_us, c.vector_iteration_us
    operations += c.quantised_operand_operations[tile.kernel] * tile.block_n * dims if work.quantised else 0
    rate = device.vector_rate * c.fma_efficiency if mma is None else device.matrix_rate * mma.rate
    matrix_us = 2.0 * scores * dims * device.num_sms / rate * 1e6
    chain_us = c.matrix_iteration_us + (c.swapped_iteration_us if tile.swapped else 0.0)
    if mma is not None and not tile.swapped:
        rows_at_once = mma.m * max(1, tile.num_warps // mma.warps) if mma.warps > 1 else mma.m
        chain_us += c.row_fragment_us * max(0, tile.block_m // rows_at_once - 1)
    return matrix_us, operations / sm_instructions_per_us + exp_us, chain_us


def _merging_us(work: Work, tile: TileShape, units: int, num_splits: int, num_programs: int, device: Device, constants: Constants) -> float:
    """What merging takes by whoever does it; programs that do it themselves share no unit where each has as many whole ones."""
    if not num_programs:
        return combine_us(work, num_splits, device, constants)
    if merges_parts(tile, max(work.dim, work.dim_v), num_splits, num_programs):
        return 0.0 if units % num_programs == 0 else _meeting_us(work, tile.block_m, num_programs, device, constants)
    return device.launch_us + _meeting_us(work, tile.block_m, num_programs, device, constants) if num_programs > 1 else 0.0


def combine_us(work: Work, num_splits: int, device: Device, constants: Constants | None = None) -> float:
    """Each partial row is written once and read once; a warp walks a row's splits one after the other."""
    if num_splits <= 1:
        return 0.0
    c = constants or constants_of(device.name)
    moved = 2 * work.all_rows * work.num_heads_kv * num_splits * work.partial_bytes_per_row
    return device.launch_us + c.combine_us + c.combine_split_us * num_splits + 1e6 * moved / (c.l2_bandwidth_share * device.bandwidth)


def _meeting_us(work: Work, block_m: int, num_programs: int, device: Device, c: Constants) -> float:
    """Two programs meet in a unit at each boundary between programs, and leave a partial each."""
    moved = 4 * num_programs * min(block_m, work.rows) * work.partial_bytes_per_row
    return c.combine_us + 2 * c.combine_split_us + 1e6 * moved / (c.l2_bandwidth_share * device.bandwidth)


def _cpu_cost(work: Work, block_m: int, num_splits: int, device: Device) -> Cost:
    row_blocks = row_blocks_of(work, block_m)
    units = row_blocks * work.num_heads_kv
    read = units * work.keys * work.kv_bytes_per_key
    scores = units * block_m * work.keys
    busy = min(1.0, units * num_splits / device.num_sms) or 1.0
    return Cost(
        memory_us=1e6 * read / device.bandwidth / busy,
        matrix_us=1e6 * 2.0 * scores * (work.dim + work.dim_v) / device.matrix_rate / busy,
        vector_us=1e6 * scores / device.exp_rate / busy,
        latency_us=0.0,
        start_us=CPU_START_US,
        combine_us=CPU_SPLIT_US * (num_splits - 1) if num_splits > 1 else 0.0,
    )
