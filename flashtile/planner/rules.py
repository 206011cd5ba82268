"""The rules of planning: functions of a problem and a device, which say what they minimise.

``infeasible`` says what cannot run, and why. ``choose_tile`` takes a tile of one kernel: the portable kernel's by predicted
time, Hopper's by its row blocks and units. ``splits.py`` shares the keys out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from math import gcd

from flashtile.planner.catalog import GLUON_SM90, TRITON
from flashtile.planner.cost import Work, cost_of, row_blocks_of, work_of
from flashtile.planner.device import Device
from flashtile.planner.footprint import footprint_of, mma_of, registers_per_thread, shared_memory_bytes
from flashtile.planner.footprint_gluon import owns_keys
from flashtile.planner.plans import BLOCK_MS, DecodePlan
from flashtile.planner.ranges import MAX_GRID_X, beyond, beyond_powers, beyond_warps, power_of_two
from flashtile.planner.resources import Footprint, registers_limit
from flashtile.planner.splits import (
    COMBINE_WARPS_FROM,
    MAX_SPLITS,
    MAX_STREAM_TILES,
    most_tiles,
    split_count,
    stream_programs,
)
from flashtile.planner.tiles import (
    LIMITS,
    MOST_GATHERED_KEYS,
    Limits,
    Tile,
    TileShape,
    Variant,
    candidates_of,
    shapes_of,
    variant_name,
    variants_in_words,
)
from flashtile.problem import Problem

Fit = tuple[Tile, Footprint]

MAX_BLOCK_N = 256
DEEP_RING_TILES = 16  # key tiles of a program from which a lone program on an SM gains by a deeper ring
DEEP_RING_STAGES = 4
LEAST_BLOCK_N = 32  # the fewest keys of a tile that the rule chooses
TILE_GAIN_PERCENT = 4  # what a tile must gain over those before it in SHAPES: less is within the model's error
VECTOR_ROWS = 2  # rows for which the vector units are tried beside matrix instructions
TALL_BLOCK_M = 64  # rows that read the keys once where fewer do not
ROW_BLOCKS_PERCENT = 150  # row blocks, each of which reads the keys, in percent of those of TALL_BLOCK_M rows: more want a taller tile


def infeasible(problem: Problem, plan: DecodePlan, device: Device) -> list[str]:
    """Why a plan cannot run this problem on this device: one sentence a reason, each with the number that decided it."""
    reasons = _malformed(plan, device)
    if reasons or not device.is_gpu:
        return reasons
    reasons = misfits(problem, plan, device)
    tiles = most_tiles(work_of(problem), plan)
    if plan.num_programs and tiles > MAX_STREAM_TILES:
        reasons.append(f"stream-K counts at most {MAX_STREAM_TILES} key tiles, and {problem.units} units have {tiles}: use a grid")
    grid_x = problem.units * -(-problem.rows // plan.block_m)
    if not plan.num_programs and grid_x > MAX_GRID_X:
        reasons.append(f"{problem.units} units x row blocks of {plan.block_m} rows are {grid_x} programs, and a grid holds {MAX_GRID_X}")
    return reasons


def misfits(problem: Problem, tile: TileShape, device: Device) -> list[str]:
    """Which resource of the device a tile exceeds: shared memory a program, or registers a thread."""
    reasons = []
    if problem.quantised and tile.kernel == GLUON_SM90 and not owns_keys(tile):
        return why_none_fits(problem, device, tile.kernel, (tile.block_m, tile.swapped))
    shared, limit = shared_memory_bytes(problem, tile, device), device.smem_per_block
    if shared > limit:
        reasons.append(
            f"{tile.num_stages} stages of {tile.block_n} keys take {shared} bytes of shared memory, "
            f"and a program of {device.name} has {limit}"
        )
    registers, most = registers_per_thread(problem, tile, device), registers_limit(tile.num_warps, device)
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
    reasons += beyond("num_splits", plan.num_splits, (1, MAX_SPLITS))
    # the device shares out tiles in 32 bits
    reasons += beyond("num_programs", plan.num_programs, (0, MAX_SPLITS if device.is_gpu else 0))
    if plan.keys_per_split < 0 or plan.min_keys_per_split < 0:
        reasons.append(f"keys_per_split {plan.keys_per_split} and min_keys_per_split {plan.min_keys_per_split} must not be negative")
    if min(plan.keys_per_split, plan.min_keys_per_split) and plan.min_keys_per_split > plan.keys_per_split:
        reasons.append(f"min_keys_per_split {plan.min_keys_per_split} exceeds keys_per_split {plan.keys_per_split}")
    if plan.kernel not in LIMITS:
        return reasons
    reasons += _beyond_limits(plan, LIMITS[plan.kernel], device)
    if not power_of_two(plan.combine_block_d):
        reasons.append(f"combine_block_d {plan.combine_block_d} is not a power of two")
    reasons += beyond_warps("combine_warps", plan.combine_warps, device)
    if plan.dependent_launch and not device.dependent_launch:
        reasons.append(f"dependent_launch needs sm_90 or newer, not {device.arch}")
    return reasons


def _beyond_limits(plan: DecodePlan, limits: Limits, device: Device) -> list[str]:
    """What the plan's kernel cannot be compiled for."""
    reasons = []
    variant = (plan.block_m, plan.swapped)
    if plan.block_m in BLOCK_MS and variant not in limits.variants:
        reasons.append(f"{plan.kernel} has no {variant_name(*variant)}, only {variants_in_words(plan.kernel)}: {limits.variants_why}")
    reasons += beyond_powers("block_n", plan.block_n, limits.block_n)
    warps = limits.warps.get(plan.block_m)
    if warps is not None and plan.num_warps not in warps:
        reasons.append(f"num_warps {plan.num_warps} is not {_one_of(warps)}, which block_m {plan.block_m} of {plan.kernel} takes")
    else:
        reasons += beyond_warps("num_warps", plan.num_warps, device)
    keys_each = limits.keys_per_warp.get(plan.block_m, 0)
    if plan.num_warps * keys_each > plan.block_n:
        reasons.append(f"block_n {plan.block_n} gives {plan.num_warps} warps fewer than {keys_each} keys each")
    return reasons + beyond("num_stages", plan.num_stages, limits.stages)


def choose_tile(problem: Problem, device: Device, kernel: str, block_m: int | None = None) -> Tile | None:
    """The tile of ``choose_tile_and_splits``; None where nothing fits."""
    chosen = choose_tile_and_splits(problem, device, kernel, block_m)
    return chosen[0] if chosen else None


def choose_tile_and_splits(problem: Problem, device: Device, kernel: str, block_m: int | None = None) -> tuple[Tile, int] | None:
    """A kernel's tile with its number of splits, by the kernel's own rule; None where no tile fits.

    ``block_m`` confines the choice to one query tile.
    """
    return TILE_RULES[kernel](problem, device, kernel, block_m)


def by_predicted_time(problem: Problem, device: Device, kernel: str, block_m: int | None) -> tuple[Tile, int] | None:
    """Minimises the predicted time, each tile with its own best number of splits.

    Time weighs what a larger tile wastes (rows of the instruction that nobody uses, longer steps, shared memory and
    registers that leave fewer programs on an SM) against what a smaller one repeats (every row block reads the keys
    again).
    """
    work = work_of(problem)
    tiles = fitting_tiles(problem, device, kernel)
    has_mma = any(footprint.mma for _, footprint in tiles)
    if block_m is None:
        tiles = tuple(fit for fit in tiles if worth_trying(fit[0], work.rows, has_mma)) or tiles
    else:
        tiles = tuple(fit for fit in tiles if fit[0].block_m == block_m)
    best = least_time(work, device, tiles)
    return best and with_half_tiles(problem, device, with_deep_ring(problem, device, *best), best[1])


def by_row_blocks(problem: Problem, device: Device, kernel: str, block_m: int | None) -> tuple[Tile, int] | None:
    """The smallest query tile whose row blocks read the keys hardly more often than the tile of TALL_BLOCK_M rows would.

    Rows of an instruction that nobody uses cost a kernel little that waits for memory; reading the keys again does, and row
    blocks that also convert quantised keys again are the fewest there can be. Taller tiles still spare reads of keys that are
    in L2 by then, and have to gain TILE_GAIN_PERCENT of the predicted time.
    """
    work = work_of(problem)
    tiles = [fit for fit in fitting_tiles(problem, device, kernel) if block_m in (None, fit[0].block_m)]
    if not tiles:
        return None
    usual = [fit for fit in tiles if fit[0].block_m <= TALL_BLOCK_M] or tiles
    fewest = min(row_blocks_of(work, tile.block_m) for tile, _ in usual)
    most_percent = 100 if problem.quantised else ROW_BLOCKS_PERCENT
    first = next(fit for fit in usual if 100 * row_blocks_of(work, fit[0].block_m) <= most_percent * fewest)
    taller = [fit for fit in tiles if fit[0].block_m > TALL_BLOCK_M and row_blocks_of(work, fit[0].block_m) < fewest]
    best = least_time(work, device, [first, *taller])
    return best and with_short_ring(problem, *with_usual_tiles(problem, device, *best))


def with_usual_tiles(problem: Problem, device: Device, tile: Tile, num_splits: int) -> tuple[Tile, int]:
    """Tiles of as many keys as others have, in the place of a quantised problem's larger ones that leave half of the SMs without any."""
    work = work_of(problem)
    units = row_blocks_of(work, tile.block_m) * work.num_heads_kv
    halved = tile._replace(block_n=tile.block_n // 2, num_warps=tile.num_warps // 2)
    alone = 1 < num_splits == -(-work.keys // tile.block_n) and 2 * units * num_splits <= device.num_sms
    if not problem.quantised or not alone or misfits(problem, halved, device):
        return tile, num_splits
    return halved, -(-work.keys // halved.block_n)


def with_short_ring(problem: Problem, tile: Tile, num_splits: int) -> tuple[Tile, int]:
    """A ring no deeper than the tiles that a lone sequence's programs have: stages cost a program's start.

    On an H200, 1 x 512 keys with 8 key heads take 4.65 us with 2 stages instead of 4.82 with 3.
    """
    work = work_of(problem)
    tiles = -(-work.keys // tile.block_n)
    tiles_each = -(-tiles // num_splits)
    fewest, _ = LIMITS[tile.kernel].stages
    if work.batch == 1:
        tile = tile._replace(num_stages=min(tile.num_stages, max(fewest, tiles_each)))
    return tile, num_splits


def least_time(work: Work, device: Device, tiles: Iterable[Fit]) -> tuple[Tile, int] | None:
    """The tile of the least predicted time with its splits; a later one has to gain TILE_GAIN_PERCENT."""
    best, best_us = None, float("inf")
    for tile, footprint in tiles:
        splits = split_count(work, tile, footprint, device)
        programs = stream_programs(work, tile, footprint, splits, device)
        us = cost_of(work, tile, footprint, splits, device, programs).total_us
        if us * 100 < best_us * (100 - TILE_GAIN_PERCENT):
            best, best_us = (tile, splits), us
    return best


TileRule = Callable[[Problem, Device, str, int | None], tuple[Tile, int] | None]
TILE_RULES: dict[str, TileRule] = {TRITON: by_predicted_time, GLUON_SM90: by_row_blocks}


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


def fitting_tiles(problem: Problem, device: Device, kernel: str) -> tuple[Fit, ...]:
    """For each query tile of a kernel the preferred shape that fits the device; query tiles without one are left out."""
    kind = (problem.head_dim, problem.head_dim_v, problem.dtype_q, problem.dtype_k, problem.dtype_v, problem.allow_tf32)
    features = (problem.softcap, problem.alibi, problem.ragged_q, problem.batch > 1)
    # of a page's size only its powers of two matter, for keys are gathered where it is no multiple of block_n
    page_size = gcd(problem.page_size, MAX_BLOCK_N) if problem.page_size else 0
    work = work_of(problem)
    fitting = []
    for block_m, regimes in _fitting_tiles(device, kernel, kind, features, page_size, problem.alignment):
        units = row_blocks_of(work, block_m) * work.num_heads_kv
        fit = next(fit for most_percent, fit in regimes if 100 * units <= most_percent * device.num_sms)
        if fit is not None:
            fitting.append(fit)
    return tuple(fitting)


@lru_cache(maxsize=1024)
def _fitting_tiles(
    device: Device,
    kernel: str,
    kind: tuple[int, int, str, str, str, bool],
    features: tuple[bool, bool, bool, bool],
    page_size: int,
    alignment: int,
) -> tuple[tuple[int, tuple[tuple[int, Fit | None], ...]], ...]:
    """For each query tile and regime of units the first shape that fits, if one does."""
    head_dim, head_dim_v, dtype_q, dtype_k, dtype_v, allow_tf32 = kind
    softcap, alibi, ragged_q, several = features
    problem = Problem(
        batch=2 if several else 1,  # whether programs may share tiles
        head_dim=head_dim, head_dim_v=head_dim_v, dtype_q=dtype_q, dtype_k=dtype_k, dtype_v=dtype_v, allow_tf32=allow_tf32,
        softcap=softcap, alibi=alibi, ragged_q=ragged_q, page_size=page_size, alignment=alignment,
    )  # fmt: skip

    def first(variant: Variant, shapes: tuple[tuple[int, int, int], ...]) -> Fit | None:
        fits = [
            (tile, footprint_of(problem, tile, device))
            for tile in (Tile(*variant, *shape, kernel) for shape in shapes)
            if not misfits(problem, tile, device)
        ]
        if kernel == GLUON_SM90:
            copied = [fit for fit in fits if not fit[1].gathers]
            fits = copied or [fit for fit in fits if fit[0].block_n <= MOST_GATHERED_KEYS]
        return fits[0] if fits else None

    return tuple(
        (variant[0], tuple((regime.most_units_percent, first(variant, regime.shapes)) for regime in regimes))
        for variant, regimes in shapes_of(kernel, problem.quantised, page_size).items()
    )


def why_none_fits(problem: Problem, device: Device, kernel: str, variant: Variant) -> list[str]:
    """What stands against even the smallest shape of a kernel's query tile (block_m, swapped)."""
    candidates = candidates_of(kernel, variant, problem.quantised, problem.page_size)
    if not candidates:
        return [f"quantised keys pass through registers, and {variant_name(*variant)} multiplies keys from shared memory"]
    smallest = min(candidates, key=lambda tile: footprint_of(problem, tile, device)[:2])
    return misfits(problem, smallest, device)


def _one_of(numbers: tuple[int, ...]) -> str:
    return f"one of {numbers}" if len(numbers) > 1 else str(numbers[0])
