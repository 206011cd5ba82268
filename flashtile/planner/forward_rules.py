"""The rules of forward plans: what cannot run and why, and which tile a kernel takes.

Hopper's kernel takes what measured best for the heads and the mean number of keys that a query sees; the portable kernel the
tile of the least predicted time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from flashtile.planner.catalog import GLUON_FORWARD_SM90, TRITON_FORWARD
from flashtile.planner.device import Device
from flashtile.planner.forward_cost import forward_cost
from flashtile.planner.forward_footprint import (
    forward_footprint,
    forward_mma,
    forward_registers,
    forward_registers_limit,
    forward_shared_memory,
)
from flashtile.planner.forward_footprint_gluon import gluon_page_reasons
from flashtile.planner.forward_tiles import FORWARD_LIMITS, LONG_WALK, SHORT_HEAD, ForwardTile, ForwardTileShape, forward_candidates
from flashtile.planner.forward_work import mean_keys, row_tiles
from flashtile.planner.plans import ForwardPlan
from flashtile.planner.ranges import MAX_GRID_X, beyond, beyond_powers, beyond_warps
from flashtile.planner.resources import Footprint
from flashtile.problem import Problem

Fit = tuple[ForwardTile, Footprint]

WGMMA_ROWS = 64
ROWS_GAIN_PERCENT = 8  # what a tile of fewer rows must gain: less is within the model's error
PORTABLE_GAIN_PERCENT = 10  # what the portable kernel must gain over Hopper's


def forward_infeasible(problem: Problem, plan: ForwardPlan, device: Device) -> list[str]:
    """Why a plan cannot run this problem on this device: one sentence a reason, each with the number that decided it."""
    if plan.kernel not in FORWARD_LIMITS or not device.is_gpu:
        return []
    reasons = _malformed(plan, device) or forward_misfits(problem, plan, device)
    tiles = row_tiles(problem, plan.block_m)
    if not reasons and not plan.num_programs and tiles > MAX_GRID_X:
        reasons.append(f"{tiles} tiles of {plan.block_m} rows want as many programs, and a grid holds {MAX_GRID_X}")
    return reasons


def _malformed(plan: ForwardPlan, device: Device) -> list[str]:
    """What the plan's kernel cannot be compiled for, whatever the problem."""
    limits = FORWARD_LIMITS[plan.kernel]
    if plan.block_m not in limits.block_ms:
        return [f"block_m {plan.block_m} of {plan.kernel} is not one of {limits.block_ms}"]
    reasons = beyond_powers("block_n", plan.block_n, limits.block_n)
    warps = limits.warps.get(plan.block_m)
    if warps is None:
        reasons += beyond_warps("num_warps", plan.num_warps, device)
    elif plan.num_warps not in warps:
        known = " or ".join(map(str, warps))
        reasons.append(f"num_warps {plan.num_warps} is not {known}, which block_m {plan.block_m} of {plan.kernel} takes")
    reasons += beyond("num_stages", plan.num_stages, limits.stages)
    if plan.num_programs < 0:
        reasons.append(f"num_programs {plan.num_programs} is negative")
    if plan.kernel != GLUON_FORWARD_SM90 and plan.num_programs:
        reasons.append(f"num_programs {plan.num_programs}: {plan.kernel} has a program for each tile, which is 0")
    return reasons


def forward_misfits(problem: Problem, tile: ForwardTileShape, device: Device) -> list[str]:
    """Which resource of the device a tile exceeds: shared memory a program, or registers a thread; and pages that it cannot take."""
    reasons = gluon_page_reasons(problem, tile) if tile.kernel == GLUON_FORWARD_SM90 else []
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
    able = [fit for fit in forward_fits(problem, device, kernel).able if block_m in (None, fit[0].block_m)]
    return FORWARD_RULES[kernel](problem, device, able) if able else why_no_forward_tile(problem, device, kernel, block_m)


def why_no_forward_tile(problem: Problem, device: Device, kernel: str, block_m: int | None) -> list[str]:
    """Why a kernel has no tile at all, or none of ``block_m`` rows."""
    block_ms = FORWARD_LIMITS[kernel].block_ms
    if block_m is not None and block_m not in block_ms:
        return [f"it has no block_m {block_m}, only {', '.join(map(str, block_ms))}"]
    unable = forward_fits(problem, device, kernel).unable
    reasons = [reason for tile, against in unable if block_m in (None, tile.block_m) for reason in against]
    return reasons or [f"it has no block_m {block_m} for head dims {problem.head_dim} and {problem.head_dim_v}"]


def by_table(problem: Problem, device: Device, able: Sequence[Fit]) -> ForwardTile:
    """What measured best for the heads and the mean number of keys that a query sees: ``hopper_tiles`` has it first."""
    return able[0][0]


def by_forward_time(problem: Problem, device: Device, able: Sequence[Fit]) -> ForwardTile:
    """Minimises the predicted time; a tile of fewer rows than those before it has to gain ROWS_GAIN_PERCENT.

    Tall tiles read the keys less often; small ones leave fewer rows and SMs empty, and fewer masked scores at a diagonal. A
    tile that would be more than half empty is left out where a smaller one fits.
    """
    filled = [fit for fit in able if fit[0].block_m < 2 * problem.seqlen_q] or able[-1:]
    best, best_us = filled[0][0], float("inf")
    for tile, footprint in filled:
        us = forward_cost(problem, tile, footprint, device).total_us
        if us * 100 < best_us * (100 - ROWS_GAIN_PERCENT):
            best, best_us = tile, us
    return best


ForwardRule = Callable[[Problem, Device, Sequence[Fit]], ForwardTile]
FORWARD_RULES: dict[str, ForwardRule] = {GLUON_FORWARD_SM90: by_table, TRITON_FORWARD: by_forward_time}


def leaves_to_portable(problem: Problem, device: Device, tile: ForwardTile) -> list[str]:
    """Why Hopper's kernel leaves a problem that it can run to the portable one: most of its smallest tile's rows would be empty.

    That has smaller tiles; it has to gain PORTABLE_GAIN_PERCENT of the predicted time.
    """
    if tile.kernel != GLUON_FORWARD_SM90 or 2 * problem.seqlen_q > tile.block_m:
        return []
    able = forward_fits(problem, device, TRITON_FORWARD).able
    if not able:
        return []
    other = by_forward_time(problem, device, able)
    us = forward_cost(problem, tile, forward_footprint(problem, tile, device), device).total_us
    its_us = forward_cost(problem, other, forward_footprint(problem, other, device), device).total_us
    if its_us * 100 >= us * (100 - PORTABLE_GAIN_PERCENT):
        return []
    return [f"{problem.seqlen_q} queries fill few of its {tile.block_m} rows: {us:.1f} us against {its_us:.1f} with {other.block_m} rows"]


class Fits(NamedTuple):
    """Of each block_m of a kernel the preferred tile that fits the device; and the last of those of which none does, with its reasons."""

    able: tuple[Fit, ...]
    unable: tuple[tuple[ForwardTile, tuple[str, ...]], ...]


def forward_fits(problem: Problem, device: Device, kernel: str) -> Fits:
    """What fits of a kernel's tiles for problems of this kind, best first."""
    head_dim = max(problem.head_dim, problem.head_dim_v)
    long_walk = kernel == GLUON_FORWARD_SM90 and head_dim <= SHORT_HEAD and mean_keys(problem) >= LONG_WALK
    heads = (problem.head_dim, problem.head_dim_v, problem.dtype_q, problem.dtype_k, problem.dtype_v, problem.dtype_out)
    features = (problem.softcap, problem.alibi, problem.ragged_q, problem.page_size > 0, problem.allow_tf32, problem.dropout)
    return _fits(device, kernel, long_walk, heads, features, problem.page_size, problem.alignment)


@lru_cache(maxsize=1024)
def _fits(
    device: Device,
    kernel: str,
    long_walk: bool,
    heads: tuple[int, int, str, str, str, str],
    features: tuple[bool, bool, bool, bool, bool, bool],
    page_size: int,
    alignment: int,
) -> Fits:
    head_dim, head_dim_v, dtype_q, dtype_k, dtype_v, dtype_out = heads
    softcap, alibi, ragged_q, _, allow_tf32, dropout = features
    kind = Problem(
        operation="forward", head_dim=head_dim, head_dim_v=head_dim_v, dtype_q=dtype_q, dtype_k=dtype_k, dtype_v=dtype_v,
        dtype_out=dtype_out, softcap=softcap, alibi=alibi, ragged_q=ragged_q, page_size=page_size, alignment=alignment,
        allow_tf32=allow_tf32, dropout=dropout,
    )  # fmt: skip
    able, unable = [], []
    tall = forward_mma(kind, ForwardTile(128, 64, 8, 2), device)
    for tiles in forward_candidates(kernel, head_dim, head_dim_v, tall, long_walk):
        tile = next((tile for tile in tiles if not forward_misfits(kind, tile, device)), None)
        if tile is None:
            unable.append((tiles[-1], tuple(forward_misfits(kind, tiles[-1], device))))
        else:
            able.append((tile, forward_footprint(kind, tile, device)))
    return Fits(tuple(_pairs_first(able)), tuple(unable))


def _pairs_first(able: list[Fit]) -> list[Fit]:
    """Tiles in order of preference: first one that wgmma takes whole, and two of which share an SM with nothing given up.

    One's products then hide the other's exponentials: on an H200, 4 x 4096 tokens with 16 heads of 128 run at 507 TFLOP/s by 64
    rows (causal 456), and at 484 (433) by 128.
    """

    def pairs(fit: Fit) -> bool:
        tile, footprint = fit
        whole = tile.kernel == TRITON_FORWARD and tile.block_m == WGMMA_ROWS and tile.block_n >= WGMMA_ROWS
        return whole and footprint.mma is not None and footprint.mma.name == "wgmma" and footprint.resident > 1

    return sorted(able, key=pairs, reverse=True)
