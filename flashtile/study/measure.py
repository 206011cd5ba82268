"""One task of a study on a GPU: each plan is checked against the reference, then all are timed in turn as CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import flashtile
from flashtile.planner.cost import predict_us
from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem
from flashtile.study.inputs import Inputs, WrongResult
from flashtile.study.points import Task
from flashtile.study.rows import Row, facts_of
from flashtile.testing.graphs import Captured, Contestant, Timing, calls_per_graph, capture, replay_in_turn

ROUNDS = 7
SECONDS_A_TASK = 5.0  # of replays, from the third round on
PROTOCOL = (
    "bfloat16 queries; each plan's result into an out full of NaN is held to the float32 reference (relative L2 below 5e-3), then all "
    "plans of a task are captured as CUDA graphs over rotating inputs (at least 400 MB and four L2 caches, 256 sets at most: cold L2) "
    f"and replayed in turn, each timed replay behind an untimed one; median of {ROUNDS} rounds, fewer beyond {SECONDS_A_TASK:.0f} s"
)


class DeviceLost(Exception):
    """The GPU's context is broken: nothing more can be measured in this process."""


def measured(task: Task, plans: Sequence[DecodePlan], device: torch.device) -> dict[str, Any]:
    """The task's entry: ``timed`` rows of plans, ``refused`` ones with reasons, and the planner's choice, which comes first in ``plans``.

    Raises DeviceLost.
    """
    inputs = Inputs(task.point, device)
    problem = Problem.decode(**inputs.args(0))
    known = Device.of(device)
    refused: list[list[Any]] = []
    graphs: dict[str, Captured] = {}
    calls = calls_per_graph(inputs.count, task.point.kv_bytes)
    for index, plan in enumerate(plans):
        try:
            inputs.check(plan)
            graphs[str(index)] = capture(_contestant(inputs, plan), inputs.count, calls)
        except WrongResult as error:
            refused.append([facts_of(plan), f"WRONG: {error}"])
        except Exception as error:  # refused by the compiler or the launch: each is a finding about this plan
            refused.append([facts_of(plan), f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]])
        _ensure_alive(device)
    times: dict[str, Timing] = replay_in_turn(graphs, ROUNDS, SECONDS_A_TASK) if graphs else {}
    rows = []
    for name, timing in times.items():
        plan = plans[int(name)]
        try:
            inputs.error(_replayed(graphs[name]))
        except WrongResult as error:
            refused.append([facts_of(plan), f"WRONG after it was timed: {error}"])
            continue
        rows.append(Row.of(plan, timing.median_us, timing.spread, predict_us(problem, plan, known).total_us))
    return {
        "sets": inputs.count,
        "choice": facts_of(plans[0]),
        "timed": sorted((list(row) for row in rows), key=lambda row: float(row[8])),
        "refused": refused,
    }


def _contestant(inputs: Inputs, plan: DecodePlan) -> Contestant:
    calls = [inputs.args(i) | {"plan": plan} for i in range(inputs.count)]
    return lambda i: flashtile.decode(**calls[i])


def _replayed(graph: Captured) -> torch.Tensor:
    """What the timed graph itself writes for set 0: cleared, replayed once more."""
    output: torch.Tensor = graph.output
    output.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return output


def _ensure_alive(device: torch.device) -> None:
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        raise DeviceLost(str(error).splitlines()[0]) from error
