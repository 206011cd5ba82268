"""plan_decode, plan_forward and plan_backward: the one way to a plan.

A tuned tile comes first, else the first kernel of the catalog that can run the problem, by its rule; an explicit wish is
obeyed or refused.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from flashtile.errors import ArgumentError, UnsupportedError, message
from flashtile.planner.backward_rules import backward_infeasible, choose_backward_plan
from flashtile.planner.catalog import GLUON_FORWARD_SM90, kernel_named, kernels_of
from flashtile.planner.device import Device
from flashtile.planner.feasible import infeasible, why_none_fits
from flashtile.planner.footprint import footprint_of
from flashtile.planner.forward_rules import choose_forward_tile, forward_infeasible, leaves_to_portable
from flashtile.planner.forward_tiles import ForwardTile
from flashtile.planner.forward_work import row_tiles
from flashtile.planner.plans import BLOCK_MS, BackwardPlan, DecodePlan, ForwardPlan, Source
from flashtile.planner.quantised_rules import leaves_quantised
from flashtile.planner.rules import choose_tile_and_splits
from flashtile.planner.splits import Splits, choose_splits, combine_shape, even_splits, schedule
from flashtile.planner.table import TILE_FIELDS, own_tile, tuned_tile
from flashtile.planner.tiles import LIMITS, Tile, variants_in_words
from flashtile.planner.wishes import first_able, known, obeyed
from flashtile.problem import Problem

CACHED_PLANS = 8192


@lru_cache(maxsize=CACHED_PLANS)
def plan_decode(
    problem: Problem,
    device: Device,
    *,
    block_m: int | None = None,
    num_splits: int | None = None,
    plan: DecodePlan | None = None,
) -> DecodePlan:
    """The plan for a problem on a device; no tensor is read. Cached and thread-safe.

    A measured tile comes first; else the first kernel of the catalog that can run the problem as wished gets it.
    ``plan`` is returned as it is, or refused. ``block_m`` confines the choice to one query tile. ``num_splits`` is what the
    grid gets; where there are fewer key tiles than that, the splits beyond them find no keys.

    Raises UnsupportedError with each kernel's reasons if nothing can run, or not as wished; ArgumentError for a wish that
    contradicts itself.
    """
    if plan is not None:
        against = infeasible(problem, plan, device) if known("decode", plan) else []
        return obeyed("decode", problem, device, plan, against, block_m=block_m, num_splits=num_splits)
    if num_splits is not None and num_splits < 1:
        raise ArgumentError(message("num_splits", "at least 1", num_splits, "Leave it out to have it planned."))
    if block_m is not None and block_m not in BLOCK_MS:
        lacking = [f"block_m {block_m} is not one of {BLOCK_MS}"]
        raise UnsupportedError(
            "block_m cannot be obeyed:", {kernel.name: lacking for kernel in kernels_of("decode") if device.backend in kernel.backends}
        )
    tuned = None
    if block_m is None:
        tuned = _tuned_plan(problem, device, own_tile(problem, device)) or _tuned_plan(problem, device, tuned_tile(problem, device))
    if tuned is not None:
        return tuned if num_splits is None else with_splits(tuned, problem, device, num_splits).with_(source="explicit")
    wished = block_m is not None or num_splits is not None
    return first_able("decode", problem, device, lambda kernel: _plan_of(problem, device, kernel, block_m, num_splits), wished)


def plan_as_shipped(problem: Problem, device: Device) -> DecodePlan:
    """What ``plan_decode`` gives everyone who has no tuned table of their own."""
    tuned = _tuned_plan(problem, device, tuned_tile(problem, device))
    return tuned or first_able("decode", problem, device, lambda kernel: _plan_of(problem, device, kernel, None, None), wished=False)


def _plan_of(problem: Problem, device: Device, kernel: str, block_m: int | None, num_splits: int | None) -> DecodePlan | list[str]:
    """One kernel's plan, or why it has none as wished."""
    left = leaves_quantised(problem, kernel) if block_m is None else []
    if left:
        return left
    found = _gpu_plan(problem, device, kernel, block_m) if device.is_gpu else _cpu_plan(problem, kernel, block_m)
    if not isinstance(found, DecodePlan):
        return found
    if num_splits is not None:
        found = with_splits(found, problem, device, num_splits)
    wished = block_m is not None or num_splits is not None
    return infeasible(problem, found, device) or (found.with_(source="explicit") if wished else found)


def plan_for_tile(problem: Problem, device: Device, tile: Tile, source: Source = "rule") -> DecodePlan:
    """The plan of a tile with the splits that the rule gives it."""
    return _plan(problem, device, tile, choose_splits(problem, device, tile), source)


def _plan(problem: Problem, device: Device, tile: Tile, splits: Splits, source: Source) -> DecodePlan:
    combine_block_d, combine_warps = combine_shape(problem, device, splits)
    return DecodePlan(
        kernel=tile.kernel,
        block_m=tile.block_m,
        block_n=tile.block_n,
        swapped=tile.swapped,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        keys_per_split=splits.keys_per_split,
        min_keys_per_split=splits.min_keys_per_split,
        num_splits=splits.num_splits,
        num_programs=splits.num_programs,
        combine_block_d=combine_block_d,
        combine_warps=combine_warps,
        dependent_launch=device.dependent_launch,
        source=source,
    )


def with_splits(plan: DecodePlan, problem: Problem, device: Device, num_splits: int) -> DecodePlan:
    """The plan with a grid of that many splits; each sequence uses all of them that it has key tiles for."""
    splits = even_splits(problem, plan.block_n, num_splits)._replace(num_splits=num_splits)
    combine_block_d, combine_warps = combine_shape(problem, device, splits)
    return plan.with_(
        num_splits=num_splits,
        num_programs=0,
        keys_per_split=splits.keys_per_split,
        min_keys_per_split=min(plan.block_n, splits.keys_per_split),
        combine_block_d=combine_block_d,
        combine_warps=combine_warps,
    )


def _tuned_plan(problem: Problem, device: Device, tuned: dict[str, Any] | None) -> DecodePlan | None:
    """The plan of a measured tile, if there is one and it can run."""
    if tuned is None or kernel_named(tuned["kernel"]).reasons_against(problem, device):
        return None
    plan = plan_for_tile(problem, device, Tile(**{name: tuned[name] for name in TILE_FIELDS}), "tuned")
    if "num_splits" in tuned:
        plan = with_splits(plan, problem, device, tuned["num_splits"])
    return None if infeasible(problem, plan, device) else plan


def _gpu_plan(problem: Problem, device: Device, kernel: str, block_m: int | None) -> DecodePlan | list[str]:
    chosen = choose_tile_and_splits(problem, device, kernel, block_m)
    if chosen is None:
        return why_no_tile(problem, device, kernel, block_m)
    tile, splits = chosen
    return _plan(problem, device, tile, schedule(problem, device, tile, footprint_of(problem, tile, device), splits), "rule")


def why_no_tile(problem: Problem, device: Device, kernel: str, block_m: int | None) -> list[str]:
    """Why a kernel has no tile at all, or none of ``block_m`` rows."""
    variants = [variant for variant in LIMITS[kernel].variants if block_m in (None, variant[0])]
    if not variants:
        return [f"it has no block_m {block_m}, only {variants_in_words(kernel)}"]
    return [reason for variant in variants for reason in why_none_fits(problem, device, kernel, variant)]


def _cpu_plan(problem: Problem, kernel: str, block_m: int | None) -> DecodePlan:
    """The CPU engine packs as many rows as a pass may hold and cuts keys to its buffers by itself: one split, any length."""
    rows = next((size for size in BLOCK_MS if size >= problem.rows), BLOCK_MS[-1]) if block_m is None else block_m
    keys = max(1, problem.keys_read)
    return DecodePlan(kernel=kernel, block_m=rows, block_n=1, num_warps=1, num_stages=1, keys_per_split=keys, min_keys_per_split=1)


@lru_cache(maxsize=CACHED_PLANS)
def plan_forward(problem: Problem, device: Device, *, block_m: int | None = None, plan: ForwardPlan | None = None) -> ForwardPlan:
    """The plan for a forward problem on a device, as ``plan_decode`` finds it: ``plan`` is returned or refused, ``block_m`` obeyed."""
    if plan is not None:
        against = forward_infeasible(problem, plan, device) if known("forward", plan) else []
        return obeyed("forward", problem, device, plan, against, block_m=block_m)
    tuned = _tuned_forward_plan(problem, device) if block_m is None else None
    if tuned is not None:
        return tuned
    return first_able("forward", problem, device, lambda kernel: _forward_plan_of(problem, device, kernel, block_m), block_m is not None)


def _forward_plan_of(problem: Problem, device: Device, kernel: str, block_m: int | None) -> ForwardPlan | list[str]:
    """One kernel's forward plan, or why it has none as wished."""
    source: Source = "rule" if block_m is None else "explicit"
    if not device.is_gpu:
        rows = max(1, problem.seqlen_q) if block_m is None else block_m
        return ForwardPlan(kernel, block_m=rows, block_n=1, num_warps=1, num_stages=1, source=source)
    tile = choose_forward_tile(problem, device, kernel, block_m)
    if not isinstance(tile, ForwardTile):
        return tile
    left = leaves_to_portable(problem, device, tile) if block_m is None else []
    if left:
        return left
    plan = forward_plan_for_tile(problem, device, tile, source)
    return forward_infeasible(problem, plan, device) or plan


def _tuned_forward_plan(problem: Problem, device: Device) -> ForwardPlan | None:
    """The plan of the measured tile, if there is one that can run."""
    tuned = tuned_tile(problem, device)
    if tuned is None or kernel_named(tuned["kernel"]).reasons_against(problem, device):
        return None
    plan = forward_plan_for_tile(problem, device, ForwardTile(**tuned), "tuned")
    return None if forward_infeasible(problem, plan, device) else plan


def forward_plan_for_tile(problem: Problem, device: Device, tile: ForwardTile, source: Source = "rule") -> ForwardPlan:
    """The plan of a tile; Hopper's kernel has as many programs as SMs, which take tiles until none is left."""
    stays = tile.kernel == GLUON_FORWARD_SM90
    return ForwardPlan(
        kernel=tile.kernel,
        block_m=tile.block_m,
        block_n=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        num_programs=max(1, min(row_tiles(problem, tile.block_m), device.num_sms)) if stays else 0,
        rescale_log2=tile.rescale_log2,
        q_in_registers=tile.q_in_registers,
        source=source,
    )


@lru_cache(maxsize=CACHED_PLANS)
def plan_backward(problem: Problem, device: Device, *, plan: BackwardPlan | None = None) -> BackwardPlan:
    """The plan for a backward problem on a device, as ``plan_decode`` finds it: ``plan`` is returned or refused."""
    if plan is not None:
        return obeyed("backward", problem, device, plan, backward_infeasible(problem, plan, device) if known("backward", plan) else [])
    tuned = tuned_tile(problem, device)
    if tuned is not None:
        plan = BackwardPlan(**tuned, source="tuned")
        if not (kernel_named(plan.kernel).reasons_against(problem, device) or backward_infeasible(problem, plan, device)):
            return plan
    return first_able("backward", problem, device, lambda kernel: choose_backward_plan(problem, device, kernel), wished=False)
