"""The tiles and kernels that a backward plan passes over, each with the number that made it lose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flashtile.planner.backward_cost import BackwardCost, backward_cost, pass_cost
from flashtile.planner.backward_footprint import pass_footprint
from flashtile.planner.backward_rules import (
    OWNED_GAIN_PERCENT,
    backward_infeasible,
    choose_backward_plan,
    choose_pass,
    one_pass_keys,
    one_pass_plan,
    pass_fits,
)
from flashtile.planner.backward_tiles import OWNERS, PassTile, pass_tiles
from flashtile.planner.backward_work import owned_tiles, seen_by, typical_keys
from flashtile.planner.catalog import GLUON_BACKWARD_SM90, kernels_of
from flashtile.planner.device import Device
from flashtile.planner.plans import BackwardPlan
from flashtile.planner.walk_cost import WalkCost
from flashtile.planner.wording import ASKED, OtherKernel, why_slower
from flashtile.problem import Problem


@dataclass(frozen=True)
class BackwardAlternative:
    """Another tile of one pass of any kernel, and why it lost. ``owned`` keys or queries, as ``owner`` says; ``predicted_us`` is that
    of the pass alone, None where the tile cannot run.

    With ``passes`` it is the whole backward in so many instead, with such tiles of keys, and so is ``predicted_us``.
    """

    kernel: str
    owner: str
    owned: int
    step: int
    feasible: bool
    predicted_us: float | None
    rows_wasted: int
    why: str
    passes: int | None = None

    @property
    def passes_in_words(self) -> str:
        return {None: "", 1: "one pass", 2: "two passes"}[self.passes]


def backward_alternatives(problem: Problem, device: Device, plan: BackwardPlan, cost: BackwardCost) -> Iterator[BackwardAlternative]:
    """Every other number of rows that a pass of any kernel that can run the problem may own, each in its own best shape; then one pass
    instead of two. Of a plan in one pass, each kernel in two."""
    for kernel in kernels_of(problem.operation):
        if kernel.reasons_against(problem, device):
            continue
        if cost.queries is None:
            yield from _in_two_passes(problem, device, kernel.name, plan, cost)
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
        if kernel.name == GLUON_BACKWARD_SM90:
            yield _in_one_pass(problem, device, plan, cost)


def _in_two_passes(problem: Problem, device: Device, kernel: str, plan: BackwardPlan, cost: BackwardCost) -> Iterator[BackwardAlternative]:
    """A kernel's two passes, where it can run them, against a plan in one."""
    chosen = [choose_pass(problem, device, kernel, owner) for owner in OWNERS]
    tiles = [tile for tile in chosen if isinstance(tile, PassTile)]
    if len(tiles) == len(chosen):
        its = backward_cost(problem, tiles, [pass_footprint(problem, tile, device) for tile in tiles], device)
        slower = f"scores are computed twice: {its.total_us:.1f} us against {cost.total_us:.1f}"
        why = slower if its.total_us >= cost.total_us else _why_though_one_pass(problem, plan, kernel, its, cost)
        yield _whole(problem, tiles[0], 2, its, why)


def _in_one_pass(problem: Problem, device: Device, plan: BackwardPlan, cost: BackwardCost) -> BackwardAlternative:
    """One pass of Hopper's kernel against a plan in two."""
    other = one_pass_plan(problem, device, GLUON_BACKWARD_SM90)
    [tile] = pass_tiles(other)
    if reasons := backward_infeasible(problem, other, device):
        return _whole(problem, tile, 1, None, "; ".join(reason.removeprefix("one_pass: ") for reason in reasons))
    its = backward_cost(problem, (tile,), (pass_footprint(problem, tile, device),), device)
    seen, least = typical_keys(problem), one_pass_keys(problem)
    if plan.source in ASKED:
        why = ASKED[plan.source]
    elif seen < least:
        why = f"dQ's sums in memory pay from {least} keys a query on, and there are {seen:.0f}"
    else:
        why = f"{its.total_us:.1f} us against {cost.total_us:.1f}: {plan.kernel} comes first wherever it can run"
    return _whole(problem, tile, 1, its, why)


def _whole(problem: Problem, tile: PassTile, passes: int, cost: BackwardCost | None, why: str) -> BackwardAlternative:
    """All of a kernel's passes, whose first has the tile; None is the cost of what cannot run."""
    wasted, total_us = -problem.seqlen_k % tile.owned, None if cost is None else cost.total_us
    return BackwardAlternative(tile.kernel, tile.owner, tile.owned, tile.step, cost is not None, total_us, wasted, why, passes)


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


def _why_though_one_pass(problem: Problem, plan: BackwardPlan, kernel: str, its: BackwardCost, cost: BackwardCost) -> str:
    """Why two passes that the model predicts to be faster than one are not taken."""
    if plan.source in ASKED:
        why = ASKED[plan.source]
    elif kernel != plan.kernel:
        why = f"{plan.kernel} comes first wherever it can run"
    else:
        why = f"one pass measured faster from {one_pass_keys(problem)} keys a query on"
    return f"{its.total_us:.1f} us against {cost.total_us:.1f}: {why}"


def _why_though_faster(plan: BackwardPlan, tile: PassTile, lost: PassTile) -> str:
    """Why a tile is not taken that the model predicts to be faster."""
    if plan.source in ASKED:
        return ASKED[plan.source]
    if lost.kernel != tile.kernel:
        return f"{tile.kernel} comes first wherever it can run"
    if lost.owned > tile.owned:
        return "it would be more than half empty"
    return f"fewer {tile.owner} have to gain {OWNED_GAIN_PERCENT}%, the model's error"
