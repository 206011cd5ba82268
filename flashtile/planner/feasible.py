"""What cannot run a problem, or not with a plan, and why: one sentence a reason, each with the number that decided it."""

from __future__ import annotations

from flashtile.planner.catalog import GLUON_SM90
from flashtile.planner.cost import work_of
from flashtile.planner.device import Device
from flashtile.planner.footprint import footprint_of, mma_of, registers_per_thread, shared_memory_bytes
from flashtile.planner.footprint_gluon import owns_keys
from flashtile.planner.plans import BLOCK_MS, DecodePlan
from flashtile.planner.ranges import MAX_GRID_X, beyond, beyond_powers, beyond_warps, power_of_two
from flashtile.planner.resources import registers_limit
from flashtile.planner.splits import MAX_SPLITS, MAX_STREAM_TILES, most_tiles
from flashtile.planner.tiles import LIMITS, Limits, TileShape, Variant, candidates_of, variant_name, variants_in_words
from flashtile.problem import Problem


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


def why_none_fits(problem: Problem, device: Device, kernel: str, variant: Variant) -> list[str]:
    """What stands against even the smallest shape of a kernel's query tile (block_m, swapped)."""
    candidates = candidates_of(kernel, variant, problem.quantised, problem.page_size)
    if not candidates:
        return [f"quantised keys pass through registers, and {variant_name(*variant)} multiplies keys from shared memory"]
    smallest = min(candidates, key=lambda tile: footprint_of(problem, tile, device)[:2])
    return misfits(problem, smallest, device)


def _one_of(numbers: tuple[int, ...]) -> str:
    return f"one of {numbers}" if len(numbers) > 1 else str(numbers[0])
