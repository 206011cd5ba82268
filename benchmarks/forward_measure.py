"""One forward problem: make inputs, check every contestant, time them in turn, check again what was timed.

Protocol: GPU time by graph replay. Each contestant's calls over all input sets (together larger than four L2 caches) are captured in
one CUDA graph; contestants are replayed in turn, round by round, in one process, and the order rotates. Before each timed replay
the same graph runs once untimed. A figure is the median over rounds of (replay time / calls in the graph). ``eager`` marks a peer that
no graph holds: its calls are issued one by one. Ours writes lse too. Before and after the timing each result is held against float64
on at most 64 random rows of every sequence and head. TFLOP/s count visible pairs; where causal and square, half of all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import timing
from benchmarks.forward_check import Oracle
from benchmarks.forward_grids import Shape
from benchmarks.forward_peers import PEERS
from benchmarks.forward_sets import InputSets, problem_of
from benchmarks.timed_trials import Operation, Options, measure_in_turn
from benchmarks.trials import Trials
from flashtile.errors import UnsupportedError
from flashtile.planner.choose import forward_plan_for_tile, plan_forward
from flashtile.planner.device import Device
from flashtile.planner.forward_rules import choose_forward_tile
from flashtile.planner.forward_tiles import ForwardTile
from flashtile.planner.plans import ForwardPlan
from flashtile.problem import Problem
from flashtile.testing import poison

PROTOCOL = " ".join((__doc__ or "").split("Protocol: ")[1].replace("``", "").split())


def plan_of(shape: Shape, device: Device) -> tuple[Problem, ForwardPlan]:
    """The planner's choice for a problem, or its choice of the one kernel that the shape asks for."""
    problem = problem_of(shape)
    if not shape.kernel or not device.is_gpu:
        return problem, plan_forward(problem, device)
    tile = choose_forward_tile(problem, device, shape.kernel)
    if not isinstance(tile, ForwardTile):
        raise UnsupportedError("No plan of one kernel alone:", {shape.kernel: tile})
    return problem, plan_forward(problem, device, plan=forward_plan_for_tile(problem, device, tile, "explicit"))


def measure(shape: Shape, options: Options, step: Callable[[str], None]) -> dict[str, Any]:
    """Everything about one problem, as a result file carries it. A contestant that fails is recorded with its reason."""
    return measure_in_turn(shape, options, step, Operation(plan_of, InputSets, Oracle, _enter_ours, PEERS))


def _enter_ours(trials: Trials, name: str, sets: InputSets, oracle: Oracle) -> None:
    """Enters flashtile once its out and lse are right, both written into memory that was NaN before."""
    forced = {"plan": plan_of(sets.shape, Device.of(sets.device))[1]} if sets.shape.kernel else {}

    def checked() -> timing.Contestant:
        with poison.allocations():
            result = sets.contestant(out=sets.out_like(float("nan")), **forced)(0)
        trials.results[name]["error"] = round(oracle.exact(result), 6)
        return sets.contestant(**forced)

    trials.enter(name, checked, None)
