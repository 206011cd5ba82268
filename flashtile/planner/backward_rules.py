"""The rules of backward plans: what cannot run and why, and which tiles a kernel's two passes take.

Each pass takes the tile of the least predicted time, for nothing that one does binds the other. Whether there is one pass or two,
and whether programs stay, follows from what a query sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from flashtile.band import Band
from flashtile.planner.backward_cost import pass_cost
from flashtile.planner.backward_footprint import (
    family_of,
    pass_footprint,
    pass_mma,
    pass_registers,
    pass_registers_limit,
    pass_shared_memory,
)
from flashtile.planner.backward_tiles import (
    BACKWARD_LIMITS,
    OWNERS,
    WIDE_HEAD,
    Owner,
    PassTile,
    hopper_whole_tile,
    limits_of,
    pass_candidates,
    pass_tiles,
    plan_of_passes,
)
from flashtile.planner.backward_work import owned_tiles, seen_by, typical_keys
from flashtile.planner.catalog import GLUON_BACKWARD_SM90
from flashtile.planner.device import Device
from flashtile.planner.forward_tiles import SHORT_HEAD
from flashtile.planner.plans import BackwardPlan
from flashtile.planner.ranges import MAX_GRID_X, beyond, beyond_powers, beyond_warps
from flashtile.planner.resources import Footprint
from flashtile.problem import Problem

OWNED_GAIN_PERCENT = 8  # what a tile that owns less must gain: less is within the model's error
# On an H200, 16384 tokens in sequences of one length, 2048 / head dim heads, by the keys that a query sees on average:
UNEVEN_WALK = 4096  # under a mask, programs that stay lost from here on: 0.91x at 16384 keys, causal; 1.15x at 1024, 1.00x at 4096 (of
# wide heads 0.92x at 4096 already)
ONE_PASS_KEYS = 1024  # one pass won from here on, by 3 to 13%; with fewer keys what it needs beside the pass ate that up (1% lost at 512)
ONE_PASS_SHORT_KEYS = 512  # the same with heads of 64 dims, by 16 and 17% at 512 and 1024; fewer were not measured
ONE_PASS_UNLIKE_KEYS = 2048  # with sequences of log-uniform lengths it lost 3% at 1024; windows were not measured
MAX_ONE_PASS_DIM = 128  # beyond it, registers hold no part of dQ beside dK and dV

Fit = tuple[PassTile, Footprint]


def backward_infeasible(problem: Problem, plan: BackwardPlan, device: Device) -> list[str]:
    """Why a plan cannot run this problem on this device: one sentence a reason, each with the number that decided it."""
    reasons = why_not_one_pass(problem, plan.kernel) if plan.one_pass else []
    if reasons or plan.kernel not in BACKWARD_LIMITS or not device.is_gpu:
        return reasons
    if plan.num_programs < 0:
        reasons.append(f"num_programs {plan.num_programs} is negative")
    if plan.kernel != GLUON_BACKWARD_SM90 and plan.num_programs:
        reasons.append(f"num_programs {plan.num_programs}: {plan.kernel} has a program for each tile, which is 0")
    for tile in pass_tiles(plan):
        against = _malformed(problem, tile, device) or pass_misfits(problem, tile, device)
        tiles = 0 if against else owned_tiles(problem, tile)
        if tiles > MAX_GRID_X and not plan.num_programs:
            against = [f"{tiles} tiles of {tile.owned} {tile.owner} want as many programs, and a grid holds {MAX_GRID_X}"]
        reasons += [f"the pass that owns {tile.owner}: {reason}" for reason in against]
    return reasons


def why_not_one_pass(problem: Problem, kernel: str) -> list[str]:
    """Why a kernel cannot compute all gradients of the problem in one pass: empty where it can."""
    if kernel != GLUON_BACKWARD_SM90:
        return [f"one_pass: {kernel} sums dQ in a pass of its own"]
    reasons = []
    if max(problem.head_dim, problem.head_dim_v) > MAX_ONE_PASS_DIM:
        dims = f"head dims {problem.head_dim} and {problem.head_dim_v}"
        reasons.append(f"one_pass: {dims} leave no registers for dQ; each is at most {MAX_ONE_PASS_DIM}")
    if problem.deterministic:
        reasons.append("one_pass: dQ is summed in no fixed order, and the same bits are wanted each time (deterministic)")
    return reasons


def _malformed(problem: Problem, tile: PassTile, device: Device) -> list[str]:
    """What the tile's kernel cannot be compiled for, or is not for heads of these dims."""
    limits = limits_of(problem, tile)
    owned, step = ("block_n", "block_m") if tile.owner == "keys" else ("dq_block_m", "dq_block_n")
    prefix = "" if tile.owner == "keys" else "dq_"
    return [
        *beyond_powers(owned, tile.owned, limits.owned),
        *beyond_powers(step, tile.step, limits.step),
        *_warps_against(f"{prefix}num_warps", tile, limits.warps, device),
        *beyond(f"{prefix}num_stages", tile.num_stages, limits.stages[tile.owner]),
    ]


def _warps_against(name: str, tile: PassTile, warps: int, device: Device) -> list[str]:
    """Against warps that the tile's kernel does not take: ``warps`` alone, where that is not 0."""
    if not warps:
        return beyond_warps(name, tile.num_warps, device)
    return [] if tile.num_warps == warps else [f"{name} {tile.num_warps} is not {warps}, which {tile.kernel} takes"]


def pass_misfits(problem: Problem, tile: PassTile, device: Device) -> list[str]:
    """Which resource of the device a tile exceeds: shared memory a program, or registers a thread."""
    reasons = []
    walked = "queries" if tile.owner == "keys" else "keys"
    shared, limit = pass_shared_memory(problem, tile, device), device.smem_per_block
    if shared > limit:
        reasons.append(
            f"{tile.num_stages} stages of {tile.step} {walked} beside {tile.owned} {tile.owner} take {shared} bytes of shared memory, "
            f"and a program of {device.name} has {limit}"
        )
    registers, most = pass_registers(problem, tile, device), pass_registers_limit(tile, device)
    if registers > most:
        how = "" if pass_mma(problem, tile, device) else " (as FMA: it has no matrix instruction)"
        reasons.append(
            f"{tile.owned} {tile.owner} and {tile.step} {walked} a step with head dims {problem.head_dim} and {problem.head_dim_v} want "
            f"{registers} registers a thread with {tile.num_warps} warps, and {device.name} has {most}: it would spill{how}"
        )
    return reasons


def choose_backward_plan(problem: Problem, device: Device, kernel: str) -> BackwardPlan | list[str]:
    """A kernel's plan by its rule, or why it has none."""
    if not device.is_gpu:
        rows = max(1, problem.seqlen_q)
        return BackwardPlan(kernel, rows, 1, 1, 1, rows, 1, 1, 1)
    if typical_keys(problem) >= one_pass_keys(problem):
        plan = one_pass_plan(problem, device, kernel)
        if not backward_infeasible(problem, plan, device):
            return plan
    chosen = [choose_pass(problem, device, kernel, owner) for owner in OWNERS]
    reasons = [reason for tile in chosen if isinstance(tile, list) for reason in tile]
    if reasons:
        return reasons
    keys, queries = (tile for tile in chosen if isinstance(tile, PassTile))
    plan = plan_of_passes(keys, queries, _programs(problem, device, (keys, queries)))
    return backward_infeasible(problem, plan, device) or plan


def one_pass_keys(problem: Problem) -> int:
    """From how many keys a query on one pass is faster than two."""
    if problem.ragged_q or problem.band.left is not None:
        return ONE_PASS_UNLIKE_KEYS
    return ONE_PASS_SHORT_KEYS if max(problem.head_dim, problem.head_dim_v) <= SHORT_HEAD else ONE_PASS_KEYS


def one_pass_plan(problem: Problem, device: Device, kernel: str) -> BackwardPlan:
    """A kernel's plan in one pass, if it can at all: programs stay, one for each SM, and take tiles of keys until none is left."""
    tile = hopper_whole_tile(max(problem.head_dim, problem.head_dim_v))._replace(kernel=kernel)
    return plan_of_passes(tile, None, max(1, min(owned_tiles(problem, tile), device.num_sms)))


def _programs(problem: Problem, device: Device, tiles: tuple[PassTile, PassTile]) -> int:
    """How many programs stay and take tiles until none is left: one for each SM. 0 where each tile has a program of its own.

    So it is with the portable kernel, and where walks are unlike and long, or those of wide heads.
    """
    wide = max(problem.head_dim, problem.head_dim_v) > WIDE_HEAD
    if tiles[0].kernel != GLUON_BACKWARD_SM90 or (not problem.band.is_full and (wide or typical_keys(problem) >= UNEVEN_WALK)):
        return 0
    return max(1, min(max(owned_tiles(problem, tile) for tile in tiles), device.num_sms))


def choose_pass(problem: Problem, device: Device, kernel: str, owner: Owner) -> PassTile | list[str]:
    """The tile of one pass, or why there is none."""
    able, unable = pass_fits(problem, device, kernel, owner)
    if not able:
        none = f"it has no tile for head dims {problem.head_dim} and {problem.head_dim_v} that would not spill"
        reasons = [reason for _, against in unable for reason in against] or [none]
        return [f"the pass that owns {owner}: {reason}" for reason in reasons]
    return by_pass_time(problem, device, able)


def by_pass_time(problem: Problem, device: Device, able: Sequence[Fit]) -> PassTile:
    """Minimises the predicted time of a pass; a tile that owns less than those before it has to gain OWNED_GAIN_PERCENT.

    Large tiles read what they walk less often; small ones leave fewer rows and SMs empty, and fewer masked scores at a
    diagonal. A tile that would be more than half empty is left out where a smaller one fits.
    """
    rows = seen_by(problem, able[0][0].owner).seqlen_q
    filled = [fit for fit in able if fit[0].owned < 2 * rows] or able[-1:]
    best, best_us = filled[0][0], float("inf")
    for tile, footprint in filled:
        us = pass_cost(problem, tile, footprint, device).total_us
        if us * 100 < best_us * (100 - OWNED_GAIN_PERCENT):
            best, best_us = tile, us
    return best


class Fits(NamedTuple):
    """Of each number of owned rows the preferred tile that fits the device; and the last of those of which none does, with its reasons."""

    able: tuple[Fit, ...]
    unable: tuple[tuple[PassTile, tuple[str, ...]], ...]


def pass_fits(problem: Problem, device: Device, kernel: str, owner: Owner) -> Fits:
    """What fits of a kernel's tiles of a pass for problems of this kind, best first."""
    kind = Problem(
        operation="backward", head_dim=problem.head_dim, head_dim_v=problem.head_dim_v, dtype_q=problem.dtype_q, dtype_k=problem.dtype_k,
        dtype_v=problem.dtype_v, dtype_out=problem.dtype_out, softcap=problem.softcap, alibi=problem.alibi, ragged_q=problem.ragged_q,
        band=Band(None if problem.band.left is None else 0, None), alignment=problem.alignment, dropout=problem.dropout,
        allow_tf32=problem.allow_tf32,
    )  # fmt: skip
    return _fits(kind, device, kernel, owner)


@lru_cache(maxsize=1024)
def _fits(kind: Problem, device: Device, kernel: str, owner: Owner) -> Fits:
    able, unable = [], []
    for tiles in pass_candidates(kernel, owner, max(kind.head_dim, kind.head_dim_v), family_of(kind, device)):
        tile = next((tile for tile in tiles if not pass_misfits(kind, tile, device)), None)
        if tile is None:
            unable.append((tiles[-1], tuple(pass_misfits(kind, tiles[-1], device))))
        else:
            able.append((tile, pass_footprint(kind, tile, device)))
    return Fits(tuple(able), tuple(unable))
