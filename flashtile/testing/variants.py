"""Explicit plans for tests and sweeps: a kernel, the shape of its tiles, and how programs share the keys."""

from __future__ import annotations

from typing import NamedTuple

from flashtile.errors import UnsupportedError
from flashtile.planner.choose import plan_decode, plan_for_tile, with_splits
from flashtile.planner.device import Device
from flashtile.planner.feasible import misfits, why_none_fits
from flashtile.planner.plans import DecodePlan
from flashtile.planner.rules import choose_tile_and_splits
from flashtile.planner.splits import Splits, combine_shape
from flashtile.planner.tiles import Variant, candidates_of
from flashtile.problem import Problem

PORTABLE, HOPPER = "triton.decode", "gluon.decode_sm90"


class Shape(NamedTuple):
    """A program's rows, keys a step, warps, stages of its ring, and whether the operands are swapped."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    swapped: bool = False

    def __str__(self) -> str:
        return f"m{self.block_m}{'s' if self.swapped else ''}n{self.block_n}w{self.num_warps}r{self.num_stages}"


class Share(NamedTuple):
    """How the keys are shared out: a number of splits for each unit or, where it is not 0, of programs for all (stream-K)."""

    num_splits: int = 1
    num_programs: int = 0

    def __str__(self) -> str:
        return f"programs{self.num_programs}" if self.num_programs else f"splits{self.num_splits}"


PORTABLE_TILES: tuple[Variant, ...] = ((1, False), (8, True), (16, False), (16, True), (32, False), (64, False), (128, False))
# for each query tile those that it is most likely run with, and the corners: few keys, few warps, deep rings
HOPPER_SHAPES: dict[int, tuple[Shape, ...]] = {
    8: (Shape(8, 64, 4, 3), Shape(8, 128, 4, 2), Shape(8, 64, 2, 2), Shape(8, 32, 2, 3)),
    16: (Shape(16, 64, 4, 3), Shape(16, 128, 4, 2), Shape(16, 64, 2, 2), Shape(16, 32, 1, 2)),
    64: (Shape(64, 64, 4, 3), Shape(64, 128, 4, 2), Shape(64, 64, 4, 2)),
    128: (Shape(128, 64, 8, 3), Shape(128, 128, 8, 2), Shape(128, 64, 8, 2)),
}
ONE, SPLITS, PROGRAMS = Share(), (Share(3), Share(7)), (Share(1, 1), Share(1, 3), Share(1, 7), Share(1, 132))
SHARES: tuple[tuple[Share, ...], ...] = ((ONE,), SPLITS, PROGRAMS)
"""Shares that one kernel serves: the keys unsplit, split, or walked by programs that take an even part of everything."""


def explicit_plan(problem: Problem, device: Device, kernel: str, shape: Shape, share: Share = ONE) -> DecodePlan:
    """The plan of that kernel, shape and share; raises UnsupportedError, with its reasons, where the planner refuses it."""
    plan = DecodePlan(
        kernel=kernel,
        **{name: getattr(shape, name) for name in Shape._fields},
        dependent_launch=device.dependent_launch,
        source="explicit",
    )
    return plan_decode(problem, device, plan=shared_out(plan, problem, device, share))


def fitting_plan(problem: Problem, device: Device, kernel: str, tile: Variant, share: Share = ONE) -> DecodePlan:
    """The plan of the first shape of a query tile, (block_m, swapped), that fits; raises UnsupportedError where none does."""
    candidates = candidates_of(kernel, tile, problem.quantised, problem.page_size)
    if not candidates:
        raise UnsupportedError("No plan of one query tile:", {kernel: why_none_fits(problem, device, kernel, tile)})
    first = next((one for one in candidates if not misfits(problem, one, device)), candidates[-1])
    shape = Shape(first.block_m, first.block_n, first.num_warps, first.num_stages, first.swapped)
    return explicit_plan(problem, device, kernel, shape, share)


def kernels_choice(problem: Problem, device: Device, kernel: str, num_splits: int | None = None) -> DecodePlan:
    """What the planner would choose were this kernel its only one; raises UnsupportedError where it has no tile."""
    chosen = choose_tile_and_splits(problem, device, kernel)
    if chosen is None:
        raise UnsupportedError("No plan of one kernel alone:", {kernel: ["no tile fits"]})
    plan = plan_for_tile(problem, device, chosen[0])
    return plan if num_splits is None else with_splits(plan, problem, device, num_splits)


def shared_out(plan: DecodePlan, problem: Problem, device: Device, share: Share) -> DecodePlan:
    """The plan with its keys shared out as ``share`` says, combine included."""
    plan = with_splits(plan, problem, device, share.num_splits)
    if not share.num_programs:
        return plan
    splits = Splits(plan.keys_per_split, plan.min_keys_per_split, plan.num_splits, share.num_programs)
    combine_block_d, combine_warps = combine_shape(problem, device, splits)
    return plan.with_(num_programs=share.num_programs, combine_block_d=combine_block_d, combine_warps=combine_warps)


def accepted(problem: Problem, plan: DecodePlan, device: Device) -> DecodePlan:
    """The plan with whichever ``swapped`` the planner takes; as it is where it takes neither."""
    for candidate in (plan, plan.with_(swapped=not plan.swapped)):
        try:
            return plan_decode(problem, device, plan=candidate)
        except UnsupportedError:
            continue
    return plan
