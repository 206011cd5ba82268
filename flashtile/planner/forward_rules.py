"""The rules of forward plans: what cannot run and why, and which tile a kernel takes.

Hopper's kernel takes what measured best for the heads and the mean number of keys that a row sees; the portable kernel the
tallest tile of rows that the queries fill, for each tile reads all of its keys once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

from flashtile.planner.catalog import GLUON_FORWARD_SM90, TRITON_FORWARD
from flashtile.planner.device import Device
from flashtile.planner.forward_footprint import forward_mma, forward_registers, forward_registers_limit, forward_shared_memory
from flashtile.planner.forward_tiles import FORWARD_LIMITS, ForwardTile, ForwardTileShape, hopper_tiles, portable_tiles
from flashtile.planner.plans import ForwardPlan
from flashtile.planner.work import row_tiles
from flashtile.problem import Problem

MAX_GRID_X = 2**31 - 1
MAX_THREADS = 1024


def forward_infeasible(problem: Problem, plan: ForwardPlan, device: Device) -> list[str]:
    """Why a plan cannot run this problem on this device: one sentence a reason, each with the number that decided it."""
    if not device.is_gpu:
        return []
    reasons = _malformed(plan, device) or forward_misfits(problem, plan, device)
    tiles = row_tiles(problem, plan.block_m)
    if not reasons and not plan.num_programs and tiles > MAX_GRID_X:
        reasons.append(f"{tiles} tiles of {plan.block_m} rows want as many programs, and a grid holds {MAX_GRID_X}")
    return reasons


def _malformed(plan: ForwardPlan, device: Device) -> list[str]:
    """What the plan's kernel cannot be compiled for, whatever the problem."""
    limits = FORWARD_LIMITS[plan.kernel]
    reasons = []
    if plan.block_m not in limits.block_ms:
        return [f"block_m {plan.block_m} of {plan.kernel} is not one of {limits.block_ms}"]
    least, most = limits.block_n
    if not (_power_of_two(plan.block_n) and least <= plan.block_n <= most):
        reasons.append(f"block_n {plan.block_n} is not a power of two from {least} to {most}")
    warps = limits.warps.get(plan.block_m)
    if warps is not None and plan.num_warps not in warps:
        known = " or ".join(map(str, warps))
        reasons.append(f"num_warps {plan.num_warps} is not {known}, which block_m {plan.block_m} of {plan.kernel} takes")
    elif warps is None and not (_power_of_two(plan.num_warps) and plan.num_warps * device.warp_size <= MAX_THREADS):
        reasons.append(f"num_warps {plan.num_warps} is not a power of two of at most {MAX_THREADS // device.warp_size} warps")
    fewest, deepest = limits.stages
    if not fewest <= plan.num_stages <= deepest:
        reasons.append(f"num_stages {plan.num_stages} is not within {fewest} and {deepest}")
    if plan.num_programs < 0:
        reasons.append(f"num_programs {plan.num_programs} is negative")
    if plan.kernel != GLUON_FORWARD_SM90 and plan.num_programs:
        reasons.append(f"num_programs {plan.num_programs}: {plan.kernel} has a program for each tile, which is 0")
    return reasons


def forward_misfits(problem: Problem, tile: ForwardTileShape, device: Device) -> list[str]:
    """Which resource of the device a tile exceeds: shared memory a program, or registers a thread."""
    reasons = []
    shared, limit = forward_shared_memory(problem, tile, device), device.smem_per_block
    if shared > limit:
        reasons.append(
            f"{tile.num_stages} stages of {tile.block_n} keys beside {tile.block_m} rows take {shared} bytes of shared memory, "
            f"and a program of {device.name} has {limit}"
        )
    registers, most = forward_registers(problem, tile, device), forward_registers_limit(tile, device)
    if registers > most:
        how = "" if forward_mma(problem, tile, device) else " (as FMA: it has no matrix instruction)"
        reasons.append(
            f"block_m {tile.block_m} with head dims {problem.head_dim} and {problem.head_dim_v} wants {registers} registers a thread with "
            f"{tile.num_warps} warps, and {device.name} has {most}: it would spill{how}"
        )
    return reasons


def choose_forward_tile(problem: Problem, device: Device, kernel: str, block_m: int | None = None) -> ForwardTile | list[str]:
    """A kernel's tile by its own rule, or why it has none; ``block_m`` confines the choice to one."""
    fitting, against = forward_fits(problem, device, kernel)
    candidates = [tile for tile in fitting if block_m in (None, tile.block_m)]
    if not candidates:
        if block_m is not None and block_m not in FORWARD_LIMITS[kernel].block_ms:
            return [f"it has no block_m {block_m}, only {FORWARD_LIMITS[kernel].block_ms}"]
        return [reason for tile, reasons in against if block_m in (None, tile.block_m) for reason in reasons]
    return FORWARD_RULES[kernel](problem, candidates)


def _first(problem: Problem, tiles: list[ForwardTile]) -> ForwardTile:
    return tiles[0]


def _filled(problem: Problem, tiles: list[ForwardTile]) -> ForwardTile:
    """The smallest tile that holds all queries of a sequence, else the tallest."""
    return next((tile for tile in reversed(tiles) if tile.block_m >= problem.seqlen_q), tiles[0])


FORWARD_RULES: dict[str, Callable[[Problem, list[ForwardTile]], ForwardTile]] = {
    GLUON_FORWARD_SM90: _first,
    TRITON_FORWARD: _filled,
}

Against = tuple[tuple[ForwardTile, tuple[str, ...]], ...]


def forward_fits(problem: Problem, device: Device, kernel: str) -> tuple[tuple[ForwardTile, ...], Against]:
    """Of each block_m of a kernel the preferred shape that fits the device; and those that have none, each with its reasons."""
    head_dim = max(problem.head_dim, problem.head_dim_v)
    mean_keys = problem.keys_read / (2 if problem.band.right is not None else 1)
    kind = problem.with_(batch=1, seqlen_q=1, total_q=1, seqlen_k=1, num_heads_q=1, num_heads_kv=1)
    shapes: Iterable[tuple[ForwardTile, ...]] = (
        [(tile,) for tile in hopper_tiles(head_dim, mean_keys)] if kernel == GLUON_FORWARD_SM90 else portable_tiles(head_dim).values()
    )
    return _fits(kind, device, tuple(shapes))


@lru_cache(maxsize=1024)
def _fits(kind: Problem, device: Device, shapes: tuple[tuple[ForwardTile, ...], ...]) -> tuple[tuple[ForwardTile, ...], Against]:
    fitting, against = [], []
    for tiles in shapes:
        tile = next((tile for tile in tiles if not forward_misfits(kind, tile, device)), None)
        if tile is not None:
            fitting.append(tile)
        else:
            against.append((tiles[-1], tuple(forward_misfits(kind, tiles[-1], device))))
    return tuple(fitting), tuple(against)


def _power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0
