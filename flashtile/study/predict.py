"""A study without a GPU: what the cost model says of every plan, and what a compiler makes of the kernels for each architecture."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from importlib.util import find_spec
from typing import Any

from flashtile.planner.cost import predict_us
from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan
from flashtile.study.points import Task
from flashtile.study.rows import Row, facts_of
from flashtile.testing.matrix import Outcome, compile_all
from flashtile.testing.matrix_points import AXES, HOPPER_AXES, Point

PROTOCOL = "nothing was measured: times are the cost model's"
HEAD_DIMS = (128, 64, 256)
RECIPE: dict[str, Any] = {"dtype": "bfloat16", "page_size": 0, "features": "plain", "batch": 1, "splits": 0, "group": 8, "aligned": True}


def predicted(task: Task, plans: Sequence[DecodePlan], device: Device) -> dict[str, Any]:
    """The task's entry with predicted times in the place of measured ones."""
    problem = task.point.problem
    times = {plan: predict_us(problem, plan, device).total_us for plan in plans}
    rows = [Row.of(plan, us, 0.0, us) for plan, us in sorted(times.items(), key=lambda item: item[1])]
    return {"sets": 0, "choice": facts_of(plans[0]), "timed": [list(row) for row in rows], "refused": []}


def compile_points() -> list[Point]:
    """Every query tile of every kernel on each architecture that it knows: head dim 128 first."""
    return [
        Point(kernel=kernel, arch=arch, tile=tile, head_dims=(head_dim, head_dim), **RECIPE)
        for head_dim in HEAD_DIMS
        for axes in (HOPPER_AXES, AXES)
        for kernel in axes["kernel"]
        for arch in sorted(axes["arch"], key=lambda arch: arch != "sm_90")
        for tile in axes["tile"]
    ]


def compiled(points: Sequence[Point], jobs: int) -> Generator[dict[str, Any], None, None]:
    """What the compiler made of each point, as they come; nothing where Triton is not installed."""
    if find_spec("triton") is None:
        return
    with closing(compile_all(points, jobs)) as outcomes:
        for outcome in outcomes:
            yield facts_of_point(outcome)


def facts_of_point(outcome: Outcome) -> dict[str, Any]:
    """registers a thread, spilled bytes, shared bytes and the matrix instruction of a query tile; or why there are none."""
    plan, facts = outcome.plan, outcome.decode
    known = known_of(outcome.point)
    if plan is None or facts is None:
        return known | {"why_not": outcome.failure or "; ".join(outcome.reasons)}
    shape = {"block_n": plan.block_n, "num_warps": plan.num_warps, "num_stages": plan.num_stages}
    found = {"registers": facts.registers, "spilled_bytes": facts.spilled_bytes, "shared_bytes": facts.shared_bytes, "mma": facts.mma}
    return known | shape | found | {"warps_per_cta": list(facts.warps_per_cta)}


def known_of(point: Point) -> dict[str, Any]:
    """What is compiled: kernel, architecture, head dim and query tile."""
    block_m, swapped = point.tile
    return {"kernel": point.kernel, "arch": point.arch, "head_dim": point.head_dims[0], "block_m": block_m, "swapped": swapped}
