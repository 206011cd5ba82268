"""Which problems and plans a study has, and in which order."""

from __future__ import annotations

from itertools import islice, product

import pytest
import torch

from flashtile import ArgumentError, Device, Problem
from flashtile.planner.catalog import GLUON_SM90, TRITON
from flashtile.planner.choose import plan_decode
from flashtile.planner.feasible import infeasible
from flashtile.study import points
from flashtile.study.candidates import plans_of
from flashtile.study.inputs import Inputs
from flashtile.study.points import FP8, Point, Task, tasks

H200, A100 = Device.named("h200"), Device.named("a100")


def test_every_problem_of_the_grid_is_there_once() -> None:
    every = [task for task in tasks() if task.stage == "tiles"]
    assert len(set(every)) == len(every)
    axes = (points.BATCHES, points.KEYS, points.SEQLENS_Q, points.GROUPS, points.HEAD_DIMS, points.CACHES)
    assert {task.point for task in every} >= {Point(*values) for values in product(*axes)}


def test_the_first_tasks_alone_are_a_study() -> None:
    first = [task.point for task in islice(tasks(), 24)]
    assert {(point.batch, point.keys) for point in first} == set(points.REGIMES)
    assert {1, 8} <= {point.seqlen_q for point in first}
    assert {1, 4, 8} <= {point.group for point in first}
    soon = list(islice(tasks(), 80))
    assert {task.stage for task in soon} == set(points.STAGES)
    assert {task.point.head_dim for task in soon} == {64, 128, 256}
    assert FP8 in {task.point.dtype_kv for task in soon}


@pytest.mark.parametrize("point", [Point(1, 512), Point(64, 131072, 64, 16, 256, FP8)])
def test_names_are_read_back(point: Point) -> None:
    assert Point.parse(point.name) == point


def test_other_names_are_refused() -> None:
    with pytest.raises(ArgumentError, match="8x4096 q1 g8 d128"):
        Point.parse("8x4096")


@pytest.mark.parametrize("point", [Point(2, 64, 4, 4, 64), Point(1, 96, 1, 8, 128, FP8)])
def test_the_problem_is_that_of_its_tensors(point: Point) -> None:
    assert Problem.decode(**Inputs(point, torch.device("cpu")).args(0)) == point.problem


def test_tiles_has_every_query_tile_of_both_kernels() -> None:
    plans = plans_of(Task("tiles", Point(1, 4096)), H200)
    tiles = {(plan.kernel, plan.block_m, plan.swapped) for plan in plans}
    assert {block_m for kernel, block_m, _ in tiles if kernel == GLUON_SM90} == {8, 16, 64, 128}
    assert {(m, s) for kernel, m, s in tiles if kernel == TRITON} == {
        (1, False), (8, True), (16, False), (16, True), (32, False), (64, False), (128, False),
    }  # fmt: skip


@pytest.mark.parametrize("device", [H200, A100])
@pytest.mark.parametrize("stage", points.STAGES)
def test_plans_can_run_and_the_planners_comes_first(stage: str, device: Device) -> None:
    task = Task(stage, Point(8, 8192, 4))
    plans = plans_of(task, device)
    assert plans[0] == plan_decode(task.point.problem, device)
    assert all(infeasible(task.point.problem, plan, device) == [] for plan in plans)
    assert len({plan.with_(source="rule") for plan in plans}) == len(plans)


def test_splits_vary_splits_and_shapes_vary_shapes() -> None:
    splits = plans_of(Task("splits", Point(1, 32768)), H200)
    assert {1, 2, 16, 128} <= {plan.num_splits for plan in splits if (plan.kernel, plan.block_m) == (TRITON, 64)}
    shapes = {(p.block_n, p.num_warps, p.num_stages) for p in plans_of(Task("shapes", Point(1, 32768)), H200) if p.block_m == 16}
    assert len(shapes) > 10
