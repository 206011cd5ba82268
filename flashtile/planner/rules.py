"""The rules of planning: integer functions of a problem and a device, which say what they maximise.

``infeasible`` says what cannot run, and why. ``choose_tile`` minimises the predicted time over one tile shape for each
query tile; ``choose_splits`` minimises the busiest SM's share of the key tiles plus the cost of combining.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import NamedTuple

from flashtile.planner.cost import (
    MATRIX_ITERATION_US,
    SM_BANDWIDTH_SHARE,
    Work,
    combine_us,
    cost_of,
    row_blocks_of,
    work_of,
)
from flashtile.planner.device import Device
from flashtile.planner.footprint import (
    Footprint,
    TileShape,
    footprint_of,
    mma_of,
    registers_limit,
    registers_per_thread,
    shared_memory_bytes,
)
from flashtile.planner.plans import BLOCK_MS, DecodePlan
from flashtile.problem import Problem

MAX_SPLITS = 65_535  # the grid's second dimension
MAX_GRID_X = 2**31 - 1
MIN_BLOCK_N = 16  # the second product's inner dimension
MAX_BLOCK_N = 256
MAX_THREADS = 1024
MAX_STAGES = 8
SWAPPED_BLOCK_MS = (8, 16)
PROGRAMS_A_WAVE = 2  # resident programs of an SM that splits may fill: more only make waves and partials
SPLIT_GAIN_PERCENT = 4  # what more splits must gain: partials and their combine have costs beyond the model
MANY_WAVES_KEYS = 1024  # what a program reads where programs make more than one wave
MANY_WAVES_ROWS = 4  # rows up to which this holds: partial results grow with the rows, and more rows want longer programs
MANY_WAVES_SPLITS = 16  # and the most splits for that: those of shorter sequences only start and end
DEEP_RING_TILES = 16  # key tiles of a program from which a lone program on an SM gains by a deeper ring
DEEP_RING_STAGES = 4
LEAST_BLOCK_N = 32  # the fewest keys of a tile that the rule chooses
TAIL_KEYS = 5120  # with several sequences one may be far longer than the rest: the most keys that a program reads
MIN_KEYS_FEW_UNITS = 256  # the least keys of a split with several sequences, while they do not fill the device often
MIN_KEYS_MANY_UNITS = 512
MANY_UNITS_PER_SM = 4
COMBINE_COLUMNS = 32  # of a combine program, while there are few rows
COMBINE_ROW_COLUMNS = 128  # what one warp holds of up to COMBINE_ROW_SPLITS splits
COMBINE_ROW_SPLITS = 16
COMBINE_PROGRAMS_PER_SM = 16  # more programs of COMBINE_COLUMNS than this are rows enough
COMBINE_WARPS_FROM = 64  # splits beyond which a row is combined by four warps
TILE_GAIN_PERCENT = 4  # what a tile must gain over those before it in SHAPES: less is within the model's error
VECTOR_ROWS = 2  # rows for which the vector units are tried beside matrix instructions


class Tile(NamedTuple):
    """The shape of one program: its rows, how they meet the matrix instruction, keys a step, warps, ring stages."""

    block_m: int
    swapped: bool
    block_n: int
    num_warps: int
    num_stages: int


# For each query tile, shapes in order of preference: the first that fits is taken. Measured on sm_90 with bfloat16 and head
# dim 128; the later ones are for longer heads, wider types, less shared memory and tensors that are not aligned.
_LAST = ((16, 4, 1), (16, 8, 1))
_FEW_ROWS = (
    (64, 4, 3), (32, 2, 4), (64, 4, 2), (32, 4, 3), (64, 8, 3), (32, 2, 2), (32, 4, 2), (64, 8, 2), (32, 8, 2), (32, 8, 1), *_LAST,
)  # fmt: skip
_ONE_ROW = (
    (64, 4, 3), (64, 8, 3), (32, 8, 3), (32, 8, 2), (64, 16, 2), (32, 16, 2), (32, 4, 2), (16, 4, 2), (16, 8, 2), *_LAST, (16, 16, 1),
)  # fmt: skip
_MANY_ROWS = (
    (64, 4, 3), (64, 4, 2), (64, 8, 3), (32, 4, 3), (64, 8, 2), (32, 8, 3), (32, 4, 2), (32, 8, 2), (32, 8, 1), (16, 8, 1),
)  # fmt: skip
SHAPES: dict[tuple[int, bool], tuple[tuple[int, int, int], ...]] = {
    (16, False): _FEW_ROWS,
    # with four warps the keys' fragments take 172 registers, which spills on sm_80
    (8, True): ((64, 8, 3), (32, 4, 3), *_FEW_ROWS),
    (1, False): _ONE_ROW,
    (16, True): _FEW_ROWS,
    (32, False): _MANY_ROWS,
    (64, False): _MANY_ROWS,
    (128, False): ((64, 8, 3), (64, 8, 2), (32, 8, 3), (32, 8, 2), (32, 8, 1)),
}
CANDIDATES: dict[tuple[int, bool], tuple[Tile, ...]] = {
    variant: tuple(Tile(*variant, *shape) for shape in shapes) for variant, shapes in SHAPES.items()
}


def infeasible(problem: Problem, plan: DecodePlan, device: Device) -> list[str]:
    """Why a plan cannot run this problem on this device: one sentence a reason, each with the number that decided it."""
    reasons = _malformed(plan, device)
    if reasons or not device.is_gpu:
        return reasons
    reasons = misfits(problem, plan, device)
    grid_x = problem.units * -(-problem.rows // plan.block_m)
    if grid_x > MAX_GRID_X:
        reasons.append(f"{problem.units} units x row blocks of {plan.block_m} rows are {grid_x} programs, and a grid holds {MAX_GRID_X}")
    return reasons


def misfits(problem: Problem, tile: TileShape, device: Device) -> list[str]:
    """Which resource of the device a tile exceeds: shared memory a program, or registers a thread."""
    reasons = []
    shared, limit = shared_memory_bytes(problem, tile, device), device.smem_per_block
    if shared > limit:
        reasons.append(
            f"{tile.num_stages} stages of {tile.block_n} keys take {shared} bytes of shared memory, "
            f"and a program of {device.name} has {limit}"
        )
    registers, most = registers_per_thread(problem, tile, device), registers_limit(tile, device)
    if registers > most:
        how = "" if tile.block_m == 1 or mma_of(problem, tile, device) else f" ({_without_mma(problem, device)}, so it runs as FMA)"
        reasons.append(
            f"block_m {tile.block_m} with head dims {problem.head_dim} and {problem.head_dim_v} wants {registers} registers a thread with "
            f"{tile.num_warps} warps, and {device.name} has {most}: it would spill{how}"
        )
    return reasons


def _without_mma(problem: Problem, device: Device) -> str:
    if problem.dtype_k == "float32" and device.has_mma:
        return "IEEE float32 has no matrix instruction"
    return f"Triton emits no fitting matrix instruction on {device.arch}"


def _malformed(plan: DecodePlan, device: Device) -> list[str]:
    """What no device could run, whatever the problem."""
    reasons = []
    if plan.block_m not in BLOCK_MS:
        reasons.append(f"block_m {plan.block_m} is not one of {BLOCK_MS}")
    if not 1 <= plan.num_splits <= MAX_SPLITS:
        reasons.append(f"num_splits {plan.num_splits} is not within 1 and {MAX_SPLITS}")
    if plan.keys_per_split < 0 or plan.min_keys_per_split < 0:
        reasons.append(f"keys_per_split {plan.keys_per_split} and min_keys_per_split {plan.min_keys_per_split} must not be negative")
    if not device.is_gpu:
        return reasons
    if plan.swapped and plan.block_m not in SWAPPED_BLOCK_MS:
        reasons.append(f"swapped operands need block_m {SWAPPED_BLOCK_MS[0]} or {SWAPPED_BLOCK_MS[1]}, not {plan.block_m}")
    if plan.block_m == 8 and not plan.swapped:
        reasons.append("block_m 8 needs swapped operands: a matrix instruction's row side takes 16 rows at least")
    if not (_power_of_two(plan.block_n) and MIN_BLOCK_N <= plan.block_n <= MAX_BLOCK_N):
        reasons.append(f"block_n {plan.block_n} is not a power of two from {MIN_BLOCK_N} to {MAX_BLOCK_N}")
    if not (_power_of_two(plan.num_warps) and plan.num_warps * device.warp_size <= MAX_THREADS):
        reasons.append(f"num_warps {plan.num_warps} is not a power of two of at most {MAX_THREADS // device.warp_size} warps")
    if not 1 <= plan.num_stages <= MAX_STAGES:
        reasons.append(f"num_stages {plan.num_stages} is not within 1 and {MAX_STAGES}")
    if not (_power_of_two(plan.combine_block_d) and plan.combine_block_d >= 1):
        reasons.append(f"combine_block_d {plan.combine_block_d} is not a power of two")
    if not (_power_of_two(plan.combine_warps) and plan.combine_warps * device.warp_size <= MAX_THREADS):
        reasons.append(f"combine_warps {plan.combine_warps} is not a power of two of at most {MAX_THREADS // device.warp_size} warps")
    if min(plan.keys_per_split, plan.min_keys_per_split) and plan.min_keys_per_split > plan.keys_per_split:
        reasons.append(f"min_keys_per_split {plan.min_keys_per_split} exceeds keys_per_split {plan.keys_per_split}")
    if plan.dependent_launch and not device.dependent_launch:
        reasons.append(f"dependent_launch needs sm_90 or newer, not {device.arch}")
    return reasons


def choose_tile(problem: Problem, device: Device, block_m: int | None = None) -> Tile | None:
    """The tile of ``choose_tile_and_splits``; None where nothing fits."""
    chosen = choose_tile_and_splits(problem, device, block_m)
    return chosen[0] if chosen else None


def choose_tile_and_splits(problem: Problem, device: Device, block_m: int | None = None) -> tuple[Tile, int] | None:
    """Minimises the predicted time, each tile with its own best number of splits.

    Time weighs what a larger tile wastes (rows of the instruction that nobody uses, longer steps, shared memory and
    registers that leave fewer programs on an SM) against what a smaller one repeats (every row block reads the keys
    again). None where nothing fits; ``block_m`` confines the search to one query tile.
    """
    work = work_of(problem)
    tiles = fitting_tiles(problem, device)
    has_mma = any(footprint.mma for _, footprint in tiles)
    if block_m is None:
        tiles = tuple(fit for fit in tiles if worth_trying(fit[0], work.rows, has_mma)) or tiles
    else:
        tiles = tuple(fit for fit in tiles if fit[0].block_m == block_m)
    best, best_us = None, float("inf")
    for tile, footprint in tiles:
        splits = split_count(work, tile, footprint, device)
        us = cost_of(work, tile, footprint, splits, device).total_us
        if us * 100 < best_us * (100 - TILE_GAIN_PERCENT):
            best, best_us = (tile, splits), us
    return best and with_half_tiles(problem, device, with_deep_ring(problem, device, *best), best[1])


def with_half_tiles(problem: Problem, device: Device, tile: Tile, num_splits: int) -> tuple[Tile, int]:
    """Halves the key tile where every program has one tile and half of the SMs have none: then twice as many read.

    On an H200, 1 x 512 keys with 8 key heads take 5.0 us instead of 5.2.
    """
    work = work_of(problem)
    units = row_blocks_of(work, tile.block_m) * work.num_heads_kv
    halved = tile._replace(block_n=tile.block_n // 2)
    alone = num_splits > 1 and num_splits == -(-work.keys // tile.block_n) and 2 * units * num_splits <= device.num_sms
    if not alone or halved.block_n < LEAST_BLOCK_N or 2 * num_splits > COMBINE_WARPS_FROM or misfits(problem, halved, device):
        return tile, num_splits
    return halved, -(-work.keys // halved.block_n)


def with_deep_ring(problem: Problem, device: Device, tile: Tile, num_splits: int) -> Tile:
    """More stages for a program that has an SM to itself and many key tiles to walk, if they fit.

    Then nothing but the ring hides DRAM's latency: on an H200, 4 stages instead of 3 gain 2 to 5 % from 16 tiles on, and
    lose as much at 4 tiles.
    """
    work = work_of(problem)
    programs = row_blocks_of(work, tile.block_m) * work.num_heads_kv * num_splits
    tiles = -(-work.keys // tile.block_n) // num_splits
    deeper = tile._replace(num_stages=max(tile.num_stages, DEEP_RING_STAGES))
    gains = device.architecture.async_copies and programs <= device.num_sms and tiles >= DEEP_RING_TILES and tile.num_stages > 1
    return deeper if gains and not misfits(problem, deeper, device) else tile


def worth_trying(tile: Tile, rows: int, has_mma: bool) -> bool:
    """Leaves out query tiles that are far from the rows: the cost can only grow in that direction."""
    if tile.block_m == 1:
        return rows <= VECTOR_ROWS or not has_mma
    return tile.block_m < 4 * max(rows, 8) and (min(rows, 128) <= 4 * tile.block_m or not has_mma)


def fitting_tiles(problem: Problem, device: Device) -> tuple[tuple[Tile, Footprint], ...]:
    """For each query tile the preferred shape that fits the device; query tiles without one are left out."""
    kind = (problem.head_dim, problem.head_dim_v, problem.dtype_q, problem.dtype_k, problem.dtype_v, problem.allow_tf32)
    features = (problem.softcap, problem.alibi, problem.ragged_q)
    # of a page's size only its powers of two matter, for keys are gathered where it is no multiple of block_n
    return _fitting_tiles(device, kind, features, gcd(problem.page_size, MAX_BLOCK_N) if problem.page_size else 0, problem.alignment)


@lru_cache(maxsize=1024)
def _fitting_tiles(
    device: Device, kind: tuple[int, int, str, str, str, bool], features: tuple[bool, bool, bool], page_size: int, alignment: int
) -> tuple[tuple[Tile, Footprint], ...]:
    head_dim, head_dim_v, dtype_q, dtype_k, dtype_v, allow_tf32 = kind
    softcap, alibi, ragged_q = features
    problem = Problem(
        head_dim=head_dim, head_dim_v=head_dim_v, dtype_q=dtype_q, dtype_k=dtype_k, dtype_v=dtype_v, allow_tf32=allow_tf32,
        softcap=softcap, alibi=alibi, ragged_q=ragged_q, page_size=page_size, alignment=alignment,
    )  # fmt: skip
    firsts = (next((tile for tile in tiles if not misfits(problem, tile, device)), None) for tiles in CANDIDATES.values())
    return tuple((tile, footprint_of(problem, tile, device)) for tile in firsts if tile is not None)


def choose_splits(problem: Problem, device: Device, tile: TileShape) -> tuple[int, int, int]:
    """(keys_per_split, min_keys_per_split, num_splits) of a tile: see ``split_count`` for what the number minimises."""
    count = split_count(work_of(problem), tile, footprint_of(problem, tile, device), device)
    return splits_of(problem, device, tile.block_n, count)


def splits_of(problem: Problem, device: Device, block_n: int, num_splits: int) -> tuple[int, int, int]:
    """(keys_per_split, min_keys_per_split, num_splits) for a wanted number of splits, in whole key tiles.

    A lone sequence may be cut as fine as a key tile. Several may be of unlike length, so short ones are not cut below a
    few hundred keys, where combining would cost more than it gains.
    """
    tiles = max(1, -(-problem.keys_read // block_n))
    keys_per_split = -(-tiles // num_splits) * block_n
    if problem.batch <= 1:
        least = block_n
    else:
        many = problem.units * num_splits > MANY_UNITS_PER_SM * device.num_sms
        least = MIN_KEYS_MANY_UNITS if many else MIN_KEYS_FEW_UNITS
    return keys_per_split, min(keys_per_split, -(-least // block_n) * block_n), -(-tiles * block_n // keys_per_split)


def split_count(work: Work, tile: TileShape, footprint: Footprint, device: Device) -> int:
    """Minimises microseconds of reading and combining.

    Reading takes as long as DRAM needs for all keys, or the busiest SM for its own. While one wave of resident programs
    holds everything, tried are no split and as many splits as give each SM one program or two: more only lose. Beyond one
    wave the programs that are left over pack onto the SMs that are free first, and a batch's lengths may be unlike (they
    live on the device): programs of MANY_WAVES_KEYS end together. With several sequences none reads more than TAIL_KEYS.
    """
    tiles = -(-work.keys // tile.block_n)
    units = row_blocks_of(work, tile.block_m) * work.num_heads_kv
    if tiles <= 1 or units == 0:
        return 1
    least = -(-work.keys // TAIL_KEYS) if work.batch > 1 else 1
    if units * least > device.num_sms * footprint.resident:
        return min(max(1, least, min(MANY_WAVES_SPLITS, work.keys // (MANY_WAVES_KEYS * max(1, work.rows // MANY_WAVES_ROWS)))), MAX_SPLITS)
    best, best_us = 1, reading_us(work, tile, units, tiles, device)
    for wave in range(1, min(PROGRAMS_A_WAVE, footprint.resident) + 1):
        tiles_each = -(-tiles // max(1, min(tiles, device.num_sms * wave // units)))
        splits = -(-tiles // tiles_each)
        us = reading_us(work, tile, units * splits, tiles_each, device) + combine_us(work, splits, device)
        if us * 100 < best_us * (100 - SPLIT_GAIN_PERCENT):
            best, best_us = splits, us
    return min(max(best, least), MAX_SPLITS)


def reading_us(work: Work, tile: TileShape, programs: int, tiles_each: int, device: Device) -> float:
    """DRAM's time for all keys, or the busiest SM's for the programs of one wave that it holds, whichever is longer."""
    even_us = 1e6 * tile.block_n * work.kv_bytes_per_key / device.bandwidth
    tile_us = max(MATRIX_ITERATION_US, even_us * device.num_sms / SM_BANDWIDTH_SHARE)
    all_us = even_us * work.batch * work.num_heads_kv * (-(-work.keys // tile.block_n))
    return max(all_us, -(-programs // device.num_sms) * tiles_each * tile_us)


def combine_shape(problem: Problem, device: Device, num_splits: int) -> tuple[int, int]:
    """(combine_block_d, combine_warps): a program of combine folds all splits of one row over some columns.

    Few rows want many small programs; many rows and few splits want a row whole; many splits are folded by four warps.
    """
    if num_splits > COMBINE_WARPS_FROM:
        return COMBINE_COLUMNS, 4
    programs = problem.total_q * problem.num_heads_q * -(-problem.head_dim_v // COMBINE_COLUMNS)
    if num_splits > COMBINE_ROW_SPLITS or programs <= COMBINE_PROGRAMS_PER_SM * device.num_sms:
        return COMBINE_COLUMNS, 1
    return min(COMBINE_ROW_COLUMNS, max(COMBINE_COLUMNS, 1 << (problem.head_dim_v - 1).bit_length())), 1


def _power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0
