"""The query tiles and kernels that a decode plan passes over, each with the number that made it lose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flashtile.planner.catalog import CPU, kernels_of
from flashtile.planner.choose import plan_for_tile
from flashtile.planner.cost import Cost, Work, cost_of, iteration_us
from flashtile.planner.device import Device
from flashtile.planner.feasible import why_none_fits
from flashtile.planner.fitting import fitting_tiles
from flashtile.planner.footprint import footprint_of
from flashtile.planner.plans import BLOCK_MS, DecodePlan
from flashtile.planner.quantised_rules import leaves_quantised
from flashtile.planner.resources import Footprint
from flashtile.planner.rules import TILE_GAIN_PERCENT, TILE_RULES, by_predicted_time
from flashtile.planner.tiles import LIMITS, Tile, Variant, variant_name, variants_in_words
from flashtile.planner.wording import ASKED, OtherKernel
from flashtile.problem import Problem

FIXED_BLOCK_M = 64  # FlashAttention-2's kBlockM in its split-KV kernel, whatever the problem

Costed = tuple[DecodePlan, Footprint, Cost]


@dataclass(frozen=True)
class Alternative:
    """Another query tile of any kernel, and why it lost. ``predicted_us`` is None where it cannot run."""

    kernel: str
    block_m: int
    swapped: bool
    feasible: bool
    predicted_us: float | None
    rows_wasted: int
    why: str
    label: str = ""


def alternatives(problem: Problem, work: Work, device: Device, chosen: Costed) -> Iterator[Alternative]:
    """Every other query tile of every kernel that can run the problem, each with its own best shape and splits."""
    plan = chosen[0]
    for kernel, variant, tile in _tiles(problem, device):
        if (kernel, variant) == (plan.kernel, (plan.block_m, plan.swapped)):
            continue
        block_m, swapped = variant
        wasted = -problem.rows % block_m
        label = "FlashAttention-2's fixed kBlockM" if block_m == FIXED_BLOCK_M else ""
        if tile is None:
            why = "; ".join(why_none_fits(problem, device, kernel, variant))
            yield Alternative(kernel, block_m, swapped, False, None, wasted, why, label)
            continue
        other = plan_for_tile(problem, device, tile) if device.is_gpu else plan.with_(block_m=block_m)
        its_footprint = footprint_of(problem, other, device)
        its_cost = cost_of(work, other, its_footprint, other.num_splits, device, other.num_programs)
        why = _why(problem, work, device, chosen, (other, its_footprint, its_cost))
        yield Alternative(kernel, block_m, swapped, True, its_cost.total_us, wasted, why, label)


def _tiles(problem: Problem, device: Device) -> Iterator[tuple[str, Variant, Tile | None]]:
    """Every query tile of every kernel that can run the problem, with its preferred shape, if one fits."""
    if not device.is_gpu:
        for block_m in BLOCK_MS:
            yield CPU, (block_m, False), Tile(block_m, False, 1, 1, 1, CPU)
        return
    for kernel in kernels_of(problem.operation):
        if kernel.reasons_against(problem, device):
            continue
        fitting = {(tile.block_m, tile.swapped): tile for tile, _ in fitting_tiles(problem, device, kernel.name)}
        for variant in sorted(LIMITS[kernel.name].variants):
            yield kernel.name, variant, fitting.get(variant)


def _why(problem: Problem, work: Work, device: Device, chosen: Costed, other: Costed) -> str:
    """Why the other lost to the chosen: the number that differs most, and what it costs."""
    (plan, _, cost), (lost, _, its_cost) = chosen, other
    us, best = its_cost.total_us, cost.total_us
    verdict = f"{us:.1f} us against {best:.1f}"
    if us < best:
        return f"{verdict}: {_why_though_faster(plan, lost)}"
    blocks, its_blocks = -(-problem.rows // plan.block_m), -(-problem.rows // lost.block_m)
    if its_blocks > blocks:
        return f"{problem.rows} rows need {its_blocks} blocks of {lost.block_m}, and each block reads the keys again: {verdict}"
    step, its_step = (iteration_us(work, tile, its, device) * lost.block_n / tile.block_n for tile, its, _ in (chosen, other))
    slower = f"{lost.block_n} keys take {its_step:.2f} us instead of {step:.2f}: {verdict}"
    if lost.block_m == 1:
        return f"on the vector units {slower}"
    if lost.swapped and not plan.swapped and lost.block_m <= plan.block_m:
        return f"swapped operands change the probabilities' layout, so {slower}"
    if lost.kernel != plan.kernel and lost.block_m <= plan.block_m:
        its_loads, loads = its_cost.start_us + its_cost.memory_us, cost.start_us + cost.memory_us
        return f"start and loads take {its_loads:.1f} us instead of {loads:.1f}: {verdict}"
    wasted = its_blocks * lost.block_m - problem.rows
    if its_blocks < blocks:
        return f"{its_blocks} blocks instead of {blocks}, but {its_cost.bound} takes longer ({its_step:.2f} us a key tile): {verdict}"
    empty = f"{wasted} of {its_blocks * lost.block_m} rows would be empty"
    return f"{empty}, so {slower}" if device.is_gpu and its_step > step else f"{empty}: {verdict}"


def _why_though_faster(plan: DecodePlan, lost: DecodePlan) -> str:
    """Why a tile is not taken that the model predicts to be faster."""
    if plan.source in ASKED:
        return ASKED[plan.source]
    if lost.kernel != plan.kernel:
        names = [kernel.name for kernel in kernels_of("decode")]
        leaves = names.index(lost.kernel) < names.index(plan.kernel)
        return f"its kernel leaves so many rows to {plan.kernel}" if leaves else f"{plan.kernel} comes first wherever it can run"
    if TILE_RULES.get(plan.kernel) is not by_predicted_time:
        return "this kernel's rule counts row blocks, whatever the model says"
    return f"within {TILE_GAIN_PERCENT}%, the model's error, the tile that measured best elsewhere stays"


def kernels_passed_over(problem: Problem, device: Device, plan: DecodePlan) -> Iterator[OtherKernel]:
    """Kernels of the device's backend that cannot run the problem, leave it to the plan's, or come first and lack the plan's tile."""
    before = True
    for kernel in kernels_of(problem.operation):
        if kernel.name == plan.kernel:
            before = False
        elif device.backend in kernel.backends:
            reasons = kernel.reasons_against(problem, device)
            if not reasons and before and plan.source == "rule":
                reasons = leaves_quantised(problem, kernel.name)
            if not reasons and before and (plan.block_m, plan.swapped) not in LIMITS[kernel.name].variants:
                lacks = variant_name(plan.block_m, plan.swapped)
                reasons = [f"it has no {lacks}, only {variants_in_words(kernel.name)}"]
            if reasons:
                yield OtherKernel(kernel.name, tuple(reasons))
