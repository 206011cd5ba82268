"""The tiles and kernels that a backward plan passes over, each with the number that made it lose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flashtile.planner.backward_cost import BackwardCost, pass_cost
from flashtile.planner.backward_rules import OWNED_GAIN_PERCENT, choose_backward_plan, pass_fits
from flashtile.planner.backward_tiles import PassTile, pass_tiles
from flashtile.planner.backward_work import owned_tiles, seen_by
from flashtile.planner.catalog import kernels_of
from flashtile.planner.device import Device
from flashtile.planner.plans import BackwardPlan
from flashtile.planner.walk_cost import WalkCost
from flashtile.planner.wording import ASKED, OtherKernel, why_slower
from flashtile.problem import Problem


@dataclass(frozen=True)
class BackwardAlternative:
    """Another tile of one pass of any kernel, and why it lost. ``owned`` keys or queries, as ``owner`` says; ``predicted_us`` is that
    of the pass alone, None where the tile cannot run."""

    kernel: str
    owner: str
    owned: int
    step: int
    feasible: bool
    predicted_us: float | None
    rows_wasted: int
    why: str


def backward_alternatives(problem: Problem, device: Device, plan: BackwardPlan, cost: BackwardCost) -> Iterator[BackwardAlternative]:
    """Every other number of rows that a pass of any kernel that can run the problem may own, each in its own best shape."""
    for kernel in kernels_of(problem.operation):
        if kernel.reasons_against(problem, device):
            continue
        for chosen, its_cost in zip(pass_tiles(plan), (cost.keys, cost.queries)):
            rows = seen_by(problem, chosen.owner).seqlen_q
            able, unable = pass_fits(problem, device, kernel.name, chosen.owner)
            for tile, footprint in able:
                if (tile.kernel, tile.owned) != (chosen.kernel, chosen.owned):
                    its = pass_cost(problem, tile, footprint, device)
                    why = _why(problem, plan, (chosen, its_cost), (tile, its))
                    yield BackwardAlternative(
                        kernel.name, tile.owner, tile.owned, tile.step, True, its.total_us, -rows % tile.owned, why
                    )  # fmt: skip
            for tile, reasons in unable:
                if (tile.kernel, tile.owned) != (chosen.kernel, chosen.owned):
                    why = "; ".join(reasons)
                    yield BackwardAlternative(kernel.name, tile.owner, tile.owned, tile.step, False, None, -rows % tile.owned, why)


def backward_kernels_passed_over(problem: Problem, device: Device, plan: BackwardPlan) -> Iterator[OtherKernel]:
    """Kernels of the device's backend that cannot run the problem, or that have no tile for it."""
    for kernel in kernels_of(problem.operation):
        if kernel.name == plan.kernel or device.backend not in kernel.backends:
            continue
        reasons = kernel.reasons_against(problem, device)
        if not reasons:
            none = choose_backward_plan(problem, device, kernel.name)
            reasons = none if isinstance(none, list) else []
        if reasons:
            yield OtherKernel(kernel.name, tuple(reasons))


def _why(problem: Problem, plan: BackwardPlan, chosen: tuple[PassTile, WalkCost], other: tuple[PassTile, WalkCost]) -> str:
    """Why the other lost to the chosen."""
    (tile, cost), (lost, its) = chosen, other
    if its.total_us < cost.total_us:
        return f"{its.total_us:.1f} us against {cost.total_us:.1f}: {_why_though_faster(plan, tile, lost)}"
    walked = "queries" if tile.owner == "keys" else "keys"
    return why_slower(cost, its, owned_tiles(problem, tile), owned_tiles(problem, lost), tile.owner, walked)


def _why_though_faster(plan: BackwardPlan, tile: PassTile, lost: PassTile) -> str:
    """Why a tile is not taken that the model predicts to be faster."""
    if plan.source in ASKED:
        return ASKED[plan.source]
    if lost.kernel != tile.kernel:
        return f"{tile.kernel} comes first wherever it can run"
    if lost.owned > tile.owned:
        return "it would be more than half empty"
    return f"fewer {tile.owner} have to gain {OWNED_GAIN_PERCENT}%, the model's error"
