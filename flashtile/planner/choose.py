"""plan_decode: the one way to a plan. Catalog order, then a tuned tile, else the rule; an explicit wish is obeyed or refused."""

from __future__ import annotations

from functools import lru_cache

from flashtile.errors import ArgumentError, UnsupportedError, message
from flashtile.planner.catalog import CATALOG, Kernel
from flashtile.planner.device import Device
from flashtile.planner.footprint import footprint_of
from flashtile.planner.plans import BLOCK_MS, DecodePlan, Source
from flashtile.planner.rules import (
    CANDIDATES,
    Tile,
    choose_splits,
    choose_tile_and_splits,
    combine_shape,
    infeasible,
    misfits,
    splits_of,
)
from flashtile.planner.table import TILE_FIELDS, tuned_tile
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

    ``plan`` is returned as it is, or refused. ``block_m`` confines the choice to one query tile. ``num_splits`` is what
    the grid gets; where there are fewer key tiles than that, the splits beyond them find no keys.

    Raises UnsupportedError with each kernel's reasons if nothing can run, or not as wished; ArgumentError for a wish that
    contradicts itself.
    """
    if plan is not None:
        return _obeyed(problem, device, plan, block_m, num_splits)
    reasons = {kernel.name: kernel.reasons_against(problem, device) for kernel in CATALOG}
    kernel = next((kernel for kernel in CATALOG if not reasons[kernel.name]), None)
    if kernel is None:
        raise UnsupportedError(f"No kernel can run this {problem.operation} on {device.name}:", reasons)
    source: Source = "rule" if block_m is None and num_splits is None else "explicit"
    chosen = _cpu_plan(problem, kernel, block_m) if not device.is_gpu else _gpu_plan(problem, device, kernel, block_m, source)
    if num_splits is not None:
        chosen = with_splits(chosen, problem, device, num_splits)
    against = infeasible(problem, chosen, device)
    if against:
        raise UnsupportedError(f"No plan as asked can run this {problem.operation} on {device.name}:", {kernel.name: against})
    return chosen.with_(source=source) if source == "explicit" else chosen


def plan_for_tile(problem: Problem, device: Device, kernel: str, tile: Tile, source: Source = "rule") -> DecodePlan:
    """The plan of a tile with the splits that the rule gives it."""
    return _plan(problem, device, kernel, tile, choose_splits(problem, device, tile), source)


def _plan(problem: Problem, device: Device, kernel: str, tile: Tile, splits: tuple[int, int, int], source: Source) -> DecodePlan:
    keys_per_split, least, num_splits = splits
    combine_block_d, combine_warps = combine_shape(problem, device, num_splits)
    return DecodePlan(
        kernel=kernel,
        block_m=tile.block_m,
        block_n=tile.block_n,
        swapped=tile.swapped,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        keys_per_split=keys_per_split,
        min_keys_per_split=least,
        num_splits=num_splits,
        combine_block_d=combine_block_d,
        combine_warps=combine_warps,
        dependent_launch=device.dependent_launch,
        source=source,
    )


def with_splits(plan: DecodePlan, problem: Problem, device: Device, num_splits: int) -> DecodePlan:
    """The plan with that many splits for the longest sequence; each sequence uses all of them that it has key tiles for."""
    if num_splits < 1:
        raise ArgumentError(message("num_splits", "at least 1", num_splits, "Leave it out to have it planned."))
    keys_per_split = splits_of(problem, device, plan.block_n, num_splits)[0]
    least = min(plan.block_n, keys_per_split)
    combine_block_d, combine_warps = combine_shape(problem, device, num_splits)
    return plan.with_(
        num_splits=num_splits,
        keys_per_split=keys_per_split,
        min_keys_per_split=least,
        combine_block_d=combine_block_d,
        combine_warps=combine_warps,
    )


def _gpu_plan(problem: Problem, device: Device, kernel: Kernel, block_m: int | None, source: Source) -> DecodePlan:
    tuned = tuned_tile(problem, device) if block_m is None else None
    if tuned is not None:
        tile = Tile(**{name: tuned[name] for name in TILE_FIELDS})
        plan = plan_for_tile(problem, device, kernel.name, tile, "tuned")
        if "num_splits" in tuned:
            plan = with_splits(plan, problem, device, tuned["num_splits"])
        if not infeasible(problem, plan, device):
            return plan
    if block_m is not None and block_m not in BLOCK_MS:
        raise UnsupportedError("block_m cannot be obeyed:", {kernel.name: [f"block_m {block_m} is not one of {BLOCK_MS}"]})
    chosen = choose_tile_and_splits(problem, device, block_m)
    if chosen is None:
        variants = [variant for variant in CANDIDATES if block_m in (None, variant[0])]
        reasons = [reason for variant in variants for reason in why_none_fits(problem, device, variant)]
        asked = "" if block_m is None else f" of block_m {block_m}"
        raise UnsupportedError(f"No tile{asked} fits {device.name}:", {kernel.name: reasons})
    tile, splits = chosen
    return _plan(problem, device, kernel.name, tile, splits_of(problem, device, tile.block_n, splits), source)


def why_none_fits(problem: Problem, device: Device, variant: tuple[int, bool]) -> list[str]:
    """What stands against even the smallest shape of a query tile (block_m, swapped)."""
    smallest = min(CANDIDATES[variant], key=lambda tile: footprint_of(problem, tile, device)[:2])
    return misfits(problem, smallest, device)


def _cpu_plan(problem: Problem, kernel: Kernel, block_m: int | None) -> DecodePlan:
    """The CPU engine packs as many rows as a pass may hold and cuts keys to its buffers by itself: one split, any length."""
    rows = next((size for size in BLOCK_MS if size >= problem.rows), BLOCK_MS[-1]) if block_m is None else block_m
    keys = max(1, problem.keys_read)
    return DecodePlan(kernel=kernel.name, block_m=rows, block_n=1, num_warps=1, num_stages=1, keys_per_split=keys, min_keys_per_split=1)


def _obeyed(problem: Problem, device: Device, plan: DecodePlan, block_m: int | None, num_splits: int | None) -> DecodePlan:
    for name, wanted, has in (("block_m", block_m, plan.block_m), ("num_splits", num_splits, plan.num_splits)):
        if wanted is not None and wanted != has:
            raise ArgumentError(message(name, f"the plan's own, {has}", wanted, f"Leave {name} out beside a plan, or use plan.with_()."))
    kernels = {kernel.name: kernel for kernel in CATALOG}
    if plan.kernel not in kernels:
        raise UnsupportedError("The plan cannot be obeyed:", {plan.kernel: [f"there is no such kernel; there are {', '.join(kernels)}"]})
    reasons = kernels[plan.kernel].reasons_against(problem, device) + infeasible(problem, plan, device)
    if reasons:
        raise UnsupportedError(f"The plan cannot be obeyed on {device.name}:", {plan.kernel: reasons})
    return plan
