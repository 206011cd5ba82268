"""The plans that a stage of the study times at a point: all that the planner accepts, none that it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from flashtile.planner.catalog import TRITON, kernels_of
from flashtile.planner.choose import plan_as_shipped, plan_for_tile, with_splits
from flashtile.planner.cost import row_blocks_of, work_of
from flashtile.planner.device import Device
from flashtile.planner.feasible import infeasible
from flashtile.planner.fitting import fitting_tiles
from flashtile.planner.plans import DecodePlan
from flashtile.planner.rules import with_deep_ring, with_half_tiles
from flashtile.planner.splits import choose_splits
from flashtile.planner.tiles import LIMITS, Tile
from flashtile.problem import Problem
from flashtile.study.points import Task

BLOCK_NS, WARPS, RINGS = (32, 64, 128), (2, 4, 8), (2, 3, 4)
MOST_SPLITS = 1024


def plans_of(task: Task, device: Device) -> list[DecodePlan]:
    """The task's plans, each once, the planner's choice first: that of who has no tuned table of their own."""
    problem = task.point.problem
    choice = plan_as_shipped(problem, device)
    found = {"tiles": _tiles, "splits": _splits, "shapes": _shapes}[task.stage](problem, device)
    seen = {_launched(choice): choice}
    for plan in found:
        if not infeasible(problem, plan, device):
            seen.setdefault(_launched(plan), plan.with_(source="explicit"))
    return list(seen.values())


def _launched(plan: DecodePlan) -> DecodePlan:
    """Equal for plans that differ in who chose them alone."""
    return plan.with_(source="explicit")


def _fitting(problem: Problem, device: Device) -> Iterator[Tile]:
    """Each query tile of each kernel that can run the problem, in the shape that the rule takes for it."""
    for kernel in kernels_of("decode"):
        if not kernel.reasons_against(problem, device) and kernel.name in LIMITS:
            yield from (tile for tile, _ in fitting_tiles(problem, device, kernel.name))


def _tiles(problem: Problem, device: Device) -> Iterator[DecodePlan]:
    """Every query tile in the rule's shape with the rule's splits; the portable kernel's also with the deeper ring or half the keys a
    step that its rule would give it, and unsplit where the keys are split."""
    for tile in _fitting(problem, device):
        plan = plan_for_tile(problem, device, tile)
        yield plan
        if tile.kernel == TRITON:
            splits = choose_splits(problem, device, tile).num_splits
            adapted, splits = with_half_tiles(problem, device, with_deep_ring(problem, device, tile, splits), splits)
            yield with_splits(plan_for_tile(problem, device, adapted), problem, device, splits)
        if max(plan.num_splits, plan.num_programs) > 1:
            yield with_splits(plan, problem, device, 1)


def _splits(problem: Problem, device: Device) -> Iterator[DecodePlan]:
    """Powers of two and whole waves of splits, for the planner's tile and for 16, 64 and 128 rows."""
    choice = plan_as_shipped(problem, device)
    tiles = [tile for tile in _fitting(problem, device) if not tile.swapped and tile.block_m in (16, 64, 128)]
    for plan in [choice, *(plan_for_tile(problem, device, tile) for tile in tiles)]:
        yield plan
        most = min(MOST_SPLITS, -(-problem.keys_read // plan.block_n))
        units = max(1, row_blocks_of(work_of(problem), plan.block_m) * problem.num_heads_kv)
        waves = {round(share * device.num_sms / units) for share in (0.5, 1, 1.5, 2, 3, 4)}
        for splits in sorted({2**power for power in range(11)} | waves):
            if 1 <= splits <= most:
                yield with_splits(plan, problem, device, splits)


def _shapes(problem: Problem, device: Device) -> Iterator[DecodePlan]:
    """Keys a step x warps x ring stages of every query tile, each with the rule's splits; all that fits without spilling."""
    for kernel in kernels_of("decode"):
        if kernel.reasons_against(problem, device) or kernel.name not in LIMITS:
            continue
        for (block_m, swapped), block_n, warps, stages in product(LIMITS[kernel.name].variants, BLOCK_NS, WARPS, RINGS):
            yield plan_for_tile(problem, device, Tile(block_m, swapped, block_n, warps, stages, kernel.name))
