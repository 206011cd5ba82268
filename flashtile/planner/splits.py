"""How the keys are shared out: the number of splits, stream-K's number of programs, and the shape of the combine.

A lone sequence has a grid: its row blocks and key heads (units) times a number of splits. Several sequences may be of
unlike length, which only the device knows: there a number of programs shares the key tiles of the whole batch (stream-K).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from flashtile.planner.catalog import GLUON_SM90, TRITON
from flashtile.planner.constants import constants_of
from flashtile.planner.cost import Work, combine_us, cost_of, row_blocks_of, work_of
from flashtile.planner.device import Device
from flashtile.planner.footprint import footprint_of
from flashtile.planner.footprint_gluon import owns_keys
from flashtile.planner.resources import Footprint
from flashtile.planner.tiles import SPLIT_UNITS_PERCENT, TileShape
from flashtile.problem import Problem

MAX_SPLITS = 65_535  # the grid's second dimension
# of a sequence, up to which whole units are left to the hardware to hand out: on an H200 the line costs 64 sequences of 512 keys 14 to
# 22 % and 8 of them 8 to 32 %, by tile and kernel (benchmarks/results/study.json), about what it could even out
SHORT_UNIT_KEYS = 512
MAX_STREAM_TILES = 2**31 - 1  # the device counts a batch's key tiles in 32 bits
MANY_WAVES = 2  # waves of units from which cutting few of them matters more than beginning few of them
FULL_ENOUGH_WAVES = 1.5  # the same where several blocks read the keys again, which neighbours find in L2: not measured
SPLIT_COMPUTING_PERCENT = 50  # units in percent of the SMs up to which such blocks are split; not measured either
GATHERING_PROGRAMS_PER_SM = (
    2  # gathered keys keep the threads that ask for them at work: one program's asking hides behind another's products
)
PROGRAMS_A_WAVE = 2  # resident programs of an SM that splits may fill: more only make waves and partials
SPLIT_GAIN_PERCENT = 4  # what more splits must gain: partials and their combine have costs beyond the model
TALL_SPLIT_GAIN_PERCENT = 8  # the same of tiles that share out rows: 64 rows and more are as many partials
COMBINE_COLUMNS = 32  # of a combine program, while there are few rows
COMBINE_ROW_COLUMNS = 128  # what one warp holds of up to COMBINE_ROW_SPLITS splits
COMBINE_ROW_SPLITS = 16
COMBINE_PROGRAMS_PER_SM = 16  # more programs of COMBINE_COLUMNS than this are rows enough
COMBINE_WARPS_FROM = 64  # splits beyond which a row is combined by four warps


class Splits(NamedTuple):
    """The part of a plan that says who reads which keys; ``num_programs`` is 0 where there is a grid."""

    keys_per_split: int
    min_keys_per_split: int
    num_splits: int
    num_programs: int = 0


def choose_splits(problem: Problem, device: Device, tile: TileShape) -> Splits:
    """The splits of a tile: see the kernel's rule in ``SPLIT_RULES`` for what the number minimises."""
    footprint = footprint_of(problem, tile, device)
    return schedule(problem, device, tile, footprint, split_count(work_of(problem), tile, footprint, device))


def schedule(problem: Problem, device: Device, tile: TileShape, footprint: Footprint, num_splits: int) -> Splits:
    """A number of splits as a grid for a lone sequence, as stream-K for several."""
    programs = stream_programs(work_of(problem), tile, footprint, num_splits, device)
    return even_splits(problem, tile.block_n, num_splits)._replace(num_programs=programs)


def even_splits(problem: Problem, block_n: int, num_splits: int) -> Splits:
    """A grid with a wanted number of splits, in whole key tiles; a shorter sequence may be cut as fine as a key tile."""
    tiles = max(1, -(-problem.keys_read // block_n))
    keys_per_split = -(-tiles // num_splits) * block_n
    return Splits(keys_per_split, block_n, -(-tiles * block_n // keys_per_split))


def stream_programs(work: Work, tile: TileShape, footprint: Footprint, num_splits: int, device: Device) -> int:
    """Programs that share all key tiles of a batch: as many as an even grid would have, at most what is resident at once.

    Hopper's kernel lets batches of more than MANY_WAVES waves have a program for each unit all the same: measured on an
    H200, that is 5 to 6 % faster where lengths are alike, and 2 to 3 % slower where they are not. So do rows in several blocks that
    read the keys again, from FULL_ENOUGH_WAVES on: a program with two blocks of one sequence would read the keys twice, too late for
    L2, and 8 x 8192 keys with 512 units of 64 rows take 385 us by 264 programs where a grid takes 269.
    0, which asks for the grid, where a lone sequence leaves nothing to even out, where no unit has two tiles to share, where a unit
    of SHORT_UNIT_KEYS is all that a program could wait for, and where the tiles are too many to count.
    """
    tiles = -(-work.keys // tile.block_n)
    units = row_blocks_of(work, tile.block_m) * work.num_heads_kv
    short = num_splits == 1 and work.keys <= SHORT_UNIT_KEYS and work.all_rows == work.batch * work.rows
    if work.batch <= 1 or tiles <= 1 or units == 0 or short or most_tiles(work, tile) > MAX_STREAM_TILES:
        return 0
    programs, resident = units * num_splits, device.num_sms * footprint.resident
    shared_up_to = FULL_ENOUGH_WAVES if reads_again(work, tile) else MANY_WAVES
    if tile.kernel == GLUON_SM90 and not resident < programs <= shared_up_to * resident:
        return min(programs, MAX_SPLITS)
    return min(programs, resident)


def reads_again(work: Work, tile: TileShape) -> bool:
    """Whether several blocks of rows read the same keys for longer than DRAM takes: tall ones, and those that convert quantised keys."""
    return (work.quantised or not owns_keys(tile)) and row_blocks_of(work, tile.block_m) > work.batch


def most_tiles(work: Work, tile: TileShape) -> int:
    """Key tiles of a batch whose sequences all have the longest query and the most keys."""
    return work.batch * work.num_heads_kv * -(-work.rows // tile.block_m) * -(-work.keys // tile.block_n)


def split_count(work: Work, tile: TileShape, footprint: Footprint, device: Device) -> int:
    """The number of splits by the rule of the tile's kernel; 1 where there is nothing to split."""
    tiles = -(-work.keys // tile.block_n)
    units = row_blocks_of(work, tile.block_m) * work.num_heads_kv
    if tiles <= 1 or units == 0:
        return 1
    return min(SPLIT_RULES[tile.kernel](work, tile, footprint, device, units, tiles), MAX_SPLITS)


def _by_time(work: Work, tile: TileShape, footprint: Footprint, device: Device, units: int, tiles: int) -> int:
    """Minimises microseconds of reading and combining.

    Reading takes as long as DRAM needs for all keys, or the busiest SM for its own. While one wave of resident programs
    holds everything, tried are no split and as many splits as give each SM one program or two: more only lose. Beyond one
    wave nothing is split.
    """
    if units > device.num_sms * footprint.resident:
        return 1
    best, best_us = 1, reading_us(work, tile, units, tiles, device)
    for wave in range(1, min(PROGRAMS_A_WAVE, footprint.resident) + 1):
        tiles_each = -(-tiles // max(1, min(tiles, device.num_sms * wave // units)))
        splits = -(-tiles // tiles_each)
        us = reading_us(work, tile, units * splits, tiles_each, device) + combine_us(work, splits, device)
        if us * 100 < best_us * (100 - SPLIT_GAIN_PERCENT):
            best, best_us = splits, us
    return best


def _by_units(work: Work, tile: TileShape, footprint: Footprint, device: Device, units: int, tiles: int) -> int:
    """One program for each SM while units leave two of three SMs free, else no split; two for each SM where threads gather keys.

    On an H200 with head dim 128, 64 units on 64 SMs reach 93 % of a plain read, and a combine would cost what more SMs gain. Several
    blocks of quantised rows compute for longer than they read, and are split while that gives each SM a program. Tiles that share
    out rows compute as long as an SM's share of a read takes, and may be split further.
    """
    if footprint.gathers:
        return max(1, min(tiles, GATHERING_PROGRAMS_PER_SM * device.num_sms // units))
    most_percent = SPLIT_COMPUTING_PERCENT if owns_keys(tile) and reads_again(work, tile) else SPLIT_UNITS_PERCENT
    splits = min(tiles, device.num_sms // units) if units * 100 <= most_percent * device.num_sms else 1
    return splits if owns_keys(tile) else _more_where_predicted(work, tile, footprint, device, units, tiles, splits)


def _more_where_predicted(work: Work, tile: TileShape, footprint: Footprint, device: Device, units: int, tiles: int, splits: int) -> int:
    """So many splits, or as many as give each SM a program or all that it holds, if that is predicted to gain TALL_SPLIT_GAIN_PERCENT.

    On an H200, 8 x 8192 keys with 8 key heads and 64 rows take 116 us by 64 programs, and two programs on an SM finish 1.6 times as many
    tiles as one (benchmarks/results/study.json).
    """
    filling = (min(tiles, wave * device.num_sms // units) for wave in range(1, footprint.resident + 1))
    tried = [splits, *(more for more in filling if more > splits)]
    best, best_us = splits, float("inf")
    for count in tried if len(tried) > 1 else ():
        programs = stream_programs(work, tile, footprint, count, device)
        us = cost_of(work, tile, footprint, count, device, programs).total_us
        if us * 100 < best_us * (100 - TALL_SPLIT_GAIN_PERCENT):
            best, best_us = count, us
    return best


SplitRule = Callable[[Work, TileShape, Footprint, Device, int, int], int]
SPLIT_RULES: dict[str, SplitRule] = {TRITON: _by_time, GLUON_SM90: _by_units}


def reading_us(work: Work, tile: TileShape, programs: int, tiles_each: int, device: Device) -> float:
    """DRAM's time for all keys, or the busiest SM's for the programs of one wave that it holds, whichever is longer."""
    even_us = 1e6 * tile.block_n * work.kv_bytes_per_key / device.bandwidth
    constants = constants_of(device.name)
    tile_us = max(constants.matrix_iteration_us, even_us * device.num_sms / constants.sm_bandwidth_share[tile.kernel])
    all_us = even_us * work.batch * work.num_heads_kv * (-(-work.keys // tile.block_n))
    return max(all_us, -(-programs // device.num_sms) * tiles_each * tile_us)


def combine_shape(problem: Problem, device: Device, splits: Splits) -> tuple[int, int]:
    """(combine_block_d, combine_warps): a program of combine folds all partial results of one row over some columns.

    Few rows want many small programs; many rows and few splits want a row whole; many splits are folded by four warps.
    """
    if splits.num_splits > COMBINE_WARPS_FROM:
        return COMBINE_COLUMNS, 4
    rows = problem.total_q * problem.num_heads_q
    programs = rows * -(-problem.head_dim_v // COMBINE_COLUMNS)
    if splits.num_splits > COMBINE_ROW_SPLITS or programs <= COMBINE_PROGRAMS_PER_SM * device.num_sms:
        return COMBINE_COLUMNS, 1
    return min(COMBINE_ROW_COLUMNS, max(COMBINE_COLUMNS, 1 << (problem.head_dim_v - 1).bit_length())), 1
