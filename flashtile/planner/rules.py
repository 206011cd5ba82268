"""The rules that choose a tile of one kernel: functions of a problem and a device, which say what they minimise.

The portable kernel's tile is chosen by predicted time, Hopper's by its row blocks and units. ``splits.py`` shares the keys out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flashtile.planner.catalog import GLUON_SM90, TRITON
from flashtile.planner.cost import Work, cost_of, row_blocks_of, work_of
from flashtile.planner.device import Device
from flashtile.planner.feasible import misfits
from flashtile.planner.fitting import Fit, fitting_tiles
from flashtile.planner.splits import COMBINE_WARPS_FROM, split_count, stream_programs
from flashtile.planner.tiles import LIMITS, Tile
from flashtile.problem import Problem

DEEP_RING_TILES = 16  # key tiles of a program from which a lone program on an SM gains by a deeper ring
DEEP_RING_STAGES = 4
LEAST_BLOCK_N = 32  # the fewest keys of a tile that the rule chooses
TILE_GAIN_PERCENT = 4  # what a tile must gain over those before it in SHAPES: less is within the model's error
VECTOR_ROWS = 2  # rows for which the vector units are tried beside matrix instructions
TALL_BLOCK_M = 64  # rows that read the keys once where fewer do not
ROW_BLOCKS_PERCENT = 150  # row blocks, each of which reads the keys, in percent of those of TALL_BLOCK_M rows: more want a taller tile


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
