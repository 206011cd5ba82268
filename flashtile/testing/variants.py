"""Explicit plans for tests and sweeps: a kernel, the shape of its tiles, and how programs share the keys."""

from __future__ import annotations

from typing import NamedTuple

from flashtile.errors import UnsupportedError
from flashtile.planner.choose import plan_decode, with_splits
from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan
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


PORTABLE_SHAPES = (
    Shape(1, 64, 4, 3), Shape(8, 64, 8, 3, swapped=True), Shape(16, 64, 4, 3), Shape(16, 64, 4, 3, swapped=True),
    Shape(32, 64, 4, 3), Shape(64, 64, 4, 3), Shape(128, 64, 8, 2),
)  # fmt: skip
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
        num_programs=share.num_programs,
        dependent_launch=device.dependent_launch,
        source="explicit",
    )
    return plan_decode(problem, device, plan=with_splits(plan, problem, device, share.num_splits))


def accepted(problem: Problem, plan: DecodePlan, device: Device) -> DecodePlan:
    """The plan with whichever ``swapped`` the planner takes; as it is where it takes neither."""
    for candidate in (plan, plan.with_(swapped=not plan.swapped)):
        try:
            return plan_decode(problem, device, plan=candidate)
        except UnsupportedError:
            continue
    return plan
