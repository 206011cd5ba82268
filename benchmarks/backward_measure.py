"""One backward problem: make inputs, check every contestant's gradients, time them in turn, check again what was timed.

Protocol: GPU time by graph replay, of everything from the gradient of out to those of q, k and v (delta, zeroing and conversions
included). Each contestant's calls over all input sets (together larger than four L2 caches) are captured in one CUDA graph;
contestants are replayed in turn, round by round, in one process, and the order rotates. Before each timed replay the same graph
runs once untimed. A figure is the median over rounds of (replay time / calls in the graph). ``eager`` marks a peer that no graph
holds: its calls are issued one by one. Before and after the timing gradients that were NaN are held against float64, on all queries
and keys of some sequences and heads. TFLOP/s count 2.5 times the forward's operations over visible pairs; where causal and square,
half of all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import timing
from benchmarks.backward_check import GradientOracle
from benchmarks.backward_grids import BackwardShape
from benchmarks.backward_peers import PEERS
from benchmarks.backward_sets import BackwardSets, backward_problem_of
from benchmarks.refusals import WrongResult
from benchmarks.timed_trials import Operation, Options, measure_in_turn
from benchmarks.trials import Trials
from flashtile.errors import UnsupportedError
from flashtile.ops.prepared import bound, kernel_module
from flashtile.planner.backward_rules import choose_backward_plan
from flashtile.planner.choose import plan_backward
from flashtile.planner.device import Device
from flashtile.planner.plans import BackwardPlan
from flashtile.problem import Problem
from flashtile.testing import poison
from flashtile.testing.backward_peers import Grads

PROTOCOL = " ".join((__doc__ or "").split("Protocol: ")[1].replace("``", "").split())


def plan_of(shape: BackwardShape, device: Device) -> tuple[Problem, BackwardPlan]:
    """The planner's choice for a problem, or its choice of the one kernel that the shape asks for."""
    problem = backward_problem_of(shape)
    if not shape.kernel or not device.is_gpu:
        return problem, plan_backward(problem, device)
    plan = choose_backward_plan(problem, device, shape.kernel)
    if not isinstance(plan, BackwardPlan):
        raise UnsupportedError("No plan of one kernel alone:", {shape.kernel: plan})
    return problem, plan_backward(problem, device, plan=plan.with_(source="explicit"))


def ours(sets: BackwardSets, plan: BackwardPlan | None = None) -> timing.Contestant:
    """flashtile's gradients for set i, by ``plan_of`` unless a plan is given: in memory of each call's own, as autograd wants them."""
    device = Device.of(sets.device)
    problem, chosen = plan_of(sets.shape, device)
    plan = chosen if plan is None else plan_backward(problem, device, plan=plan)
    run = bound(kernel_module(plan), problem, plan, sets.q[0].device)
    count = sets.count

    def call(i: int) -> Grads:
        q, k, v = (tensors[i % count] for tensors in (sets.q, sets.k, sets.v))
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        run(sets.call(i % count, grads))
        return grads

    return call


def measure(shape: BackwardShape, options: Options, step: Callable[[str], None]) -> dict[str, Any]:
    """Everything about one problem, as a result file carries it. A contestant that fails is recorded with its reason."""
    return measure_in_turn(shape, options, step, Operation(plan_of, BackwardSets, GradientOracle, enter_ours, PEERS))


def enter_ours(trials: Trials, name: str, sets: BackwardSets, oracle: GradientOracle, plan: BackwardPlan | None = None) -> None:
    """Enters flashtile once its gradients are right, written into memory that was NaN before; the same again where that is asked for."""

    def checked() -> timing.Contestant:
        fn = ours(sets, plan)
        with poison.allocations():
            grads = fn(0)
        trials.results[name]["error"] = round(oracle.exact(grads), 6)
        if sets.shape.deterministic and not all(torch.equal(*pair) for pair in zip(grads, fn(0))):
            raise WrongResult("a second call gives other bits")
        return fn

    trials.enter(name, checked, None)
