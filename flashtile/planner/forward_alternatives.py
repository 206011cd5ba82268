"""The tiles and kernels that a forward plan passes over, each with the number that made it lose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flashtile.planner.catalog import GLUON_FORWARD_SM90, kernels_of
from flashtile.planner.device import Device
from flashtile.planner.forward_cost import forward_cost
from flashtile.planner.forward_footprint import forward_footprint
from flashtile.planner.forward_rules import PORTABLE_GAIN_PERCENT, ROWS_GAIN_PERCENT, forward_fits, leaves_to_portable, why_no_forward_tile
from flashtile.planner.forward_tiles import FORWARD_LIMITS, ForwardTile
from flashtile.planner.forward_work import row_tiles
from flashtile.planner.plans import ForwardPlan
from flashtile.planner.walk_cost import WalkCost
from flashtile.planner.wording import ASKED, OtherKernel, why_slower
from flashtile.problem import Problem


@dataclass(frozen=True)
class ForwardAlternative:
    """Another tile of rows of any kernel, and why it lost. ``predicted_us`` is None where it cannot run."""

    kernel: str
    block_m: int
    block_n: int
    feasible: bool
    predicted_us: float | None
    rows_wasted: int
    why: str


def forward_alternatives(problem: Problem, device: Device, plan: ForwardPlan, cost: WalkCost) -> Iterator[ForwardAlternative]:
    """Every other tile of rows of every kernel that can run the problem, each in its own best shape."""
    for kernel in kernels_of(problem.operation):
        if kernel.reasons_against(problem, device):
            continue
        able = {tile.block_m: tile for tile, _ in reversed(forward_fits(problem, device, kernel.name).able)}
        for block_m in FORWARD_LIMITS[kernel.name].block_ms:
            if (kernel.name, block_m) == (plan.kernel, plan.block_m):
                continue
            wasted = -problem.seqlen_q % block_m
            tile = able.get(block_m)
            if tile is None:
                why = "; ".join(why_no_forward_tile(problem, device, kernel.name, block_m))
                yield ForwardAlternative(kernel.name, block_m, 0, False, None, wasted, why)
                continue
            its = forward_cost(problem, tile, forward_footprint(problem, tile, device), device)
            why = _why(problem, plan, cost, tile, its)
            yield ForwardAlternative(kernel.name, block_m, tile.block_n, True, its.total_us, wasted, why)


def forward_kernels_passed_over(problem: Problem, device: Device, plan: ForwardPlan) -> Iterator[OtherKernel]:
    """Kernels of the device's backend that cannot run the problem, or that leave it to another."""
    for kernel in kernels_of(problem.operation):
        if kernel.name == plan.kernel or device.backend not in kernel.backends:
            continue
        reasons = kernel.reasons_against(problem, device)
        able = () if reasons else forward_fits(problem, device, kernel.name).able
        if able and kernel.name == GLUON_FORWARD_SM90 and plan.source == "rule":
            reasons = leaves_to_portable(problem, device, able[0][0])
        if reasons:
            yield OtherKernel(kernel.name, tuple(reasons))


def _why(problem: Problem, plan: ForwardPlan, cost: WalkCost, lost: ForwardTile, its: WalkCost) -> str:
    """Why the other lost to the chosen."""
    if its.total_us < cost.total_us:
        return f"{its.total_us:.1f} us against {cost.total_us:.1f}: {_why_though_faster(plan, lost)}"
    return why_slower(cost, its, row_tiles(problem, plan.block_m), row_tiles(problem, lost.block_m), "rows", "keys")


def _why_though_faster(plan: ForwardPlan, lost: ForwardTile) -> str:
    """Why a tile is not taken that the model predicts to be faster."""
    if plan.source in ASKED:
        return ASKED[plan.source]
    if lost.kernel != plan.kernel:
        return f"{plan.kernel} comes first unless another gains {PORTABLE_GAIN_PERCENT}%"
    if plan.kernel == GLUON_FORWARD_SM90:
        return "what measured best for such heads and lengths is taken, whatever the model says"
    if lost.block_m > plan.block_m:
        return "it would be more than half empty"
    return f"fewer rows have to gain {ROWS_GAIN_PERCENT}%, the model's error"
