"""One forward problem: make inputs, check every contestant, time them in turn, check again what was timed.

Protocol: GPU time by graph replay. Each contestant's calls over all input sets (together larger than four L2 caches) are captured in
one CUDA graph; contestants are replayed in turn, round by round, in one process, and the order rotates. Before each timed replay
the same graph runs once untimed. A figure is the median over rounds of (replay time / calls in the graph). ``eager`` marks a peer that
no graph holds: its calls are issued one by one. Ours writes lse too. Before and after the timing each result is held against float64
on at most 64 random rows of every sequence and head. TFLOP/s count visible pairs; where causal and square, half of all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from benchmarks import timing
from benchmarks.forward_check import Oracle
from benchmarks.forward_grids import Shape
from benchmarks.forward_peers import PEERS
from benchmarks.forward_sets import InputSets, num_sets, problem_of
from benchmarks.refusals import WrongResult
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
OURS, BESIDE = "flashtile", "beside"
GRAPH_SECONDS = 1e-3  # of GPU work in one graph, at least
SPEED = 600e12  # multiplications and additions a second, to tell how many calls that takes
TIMED_SECONDS = 4.0  # of one problem's rounds


@dataclass(frozen=True)
class Options:
    """What is timed, and how long; ``host_times`` adds the host's time to issue a call."""

    device: torch.device
    peers: tuple[str, ...] = ()
    rounds: int = 11
    host_times: bool = False


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
    facts = shape.facts()
    facts["plan"] = json.loads(plan_of(shape, Device.of(options.device))[1].to_json())
    sets = InputSets(shape, options.device, num_sets(shape, options.device))
    oracle = Oracle(sets)
    trials = Trials(options.device, step)
    judges: dict[str, Callable[[Any], float]] = {OURS: oracle.exact}
    _enter_ours(trials, OURS, sets, oracle)
    if shape.beside is not None:
        facts["beside"] = shape.beside.facts()
        beside = InputSets(shape.beside, options.device, num_sets(shape.beside, options.device), seed=1)
        other = Oracle(beside)
        judges[BESIDE] = other.exact
        _enter_ours(trials, BESIDE, beside, other)
    for name in options.peers:
        judges[name] = oracle.error
        trials.enter(name, lambda make=PEERS[name]: make(sets), oracle)  # type: ignore[misc]
    if options.device.type == "cuda":
        _time_gpu(trials, judges, sets, options)
    else:
        step("timing")
        for name, clocked in timing.wall_time(trials.fns, sets.count, options.rounds).items():
            trials.results[name] |= clocked.to_json()
    return facts | {"sets": sets.count, "results": _with_rates(trials.results, shape)}


def _with_rates(results: dict[str, dict[str, Any]], shape: Shape) -> dict[str, dict[str, Any]]:
    """TFLOP/s of each contestant that was timed, and how many times its time is ours."""
    own = results[OURS].get("gpu_us")
    for name, result in results.items():
        if us := result.get("gpu_us"):
            flops = shape.beside.flops if name == BESIDE and shape.beside is not None else shape.flops
            result["tflops"] = round(flops / us * 1e-6, 2)
            if own and name != OURS:
                result["ratio"] = round(us / own, 4)
    return results


def _enter_ours(trials: Trials, name: str, sets: InputSets, oracle: Oracle) -> None:
    """Enters flashtile once its out and lse are right, both written into memory that was NaN before."""
    forced = {"plan": plan_of(sets.shape, Device.of(sets.device))[1]} if sets.shape.kernel else {}

    def checked() -> timing.Contestant:
        with poison.allocations():
            result = sets.contestant(out=sets.out_like(float("nan")), **forced)(0)
        trials.results[name]["error"] = round(oracle.exact(result), 6)
        return sets.contestant(**forced)

    trials.enter(name, checked, None)


def _time_gpu(trials: Trials, judges: dict[str, Callable[[Any], float]], sets: InputSets, options: Options) -> None:
    calls = max(sets.count, min(10, ceil(GRAPH_SECONDS * SPEED / max(1.0, sets.shape.flops))))
    issued: dict[str, timing.Issued] = {}
    for name in list(trials.fns):
        trials.attempt(name, lambda name=name: issued.update({name: _issued(trials, name, sets.count, calls, judges[name])}))  # type: ignore[misc]
    issued = {name: graph for name, graph in issued.items() if name in trials.fns}
    trials.step("timing")
    for name, clocked in timing.replay_in_turn(issued, options.rounds, TIMED_SECONDS).items():
        trials.results[name] |= clocked.to_json()
    for name, graph in issued.items():
        trials.attempt(name, lambda name=name, graph=graph: _check_after(trials, name, graph, judges[name]))  # type: ignore[misc]
    if options.host_times:
        for name, fn in list(trials.fns.items()):
            host = lambda name=name, fn=fn: trials.results[name].update(host_us=_host_us(fn, sets.count))  # noqa: E731
            trials.attempt(name, host)


def _issued(trials: Trials, name: str, sets: int, calls: int, judge: Callable[[Any], float]) -> timing.Issued:
    """The contestant's calls as a graph; one by one for a peer that a graph cannot hold, or whose graph computes nothing right."""
    fn = trials.fns[name]
    try:
        graph = timing.capture(fn, sets, calls)
        judge(_replayed(graph))
        return graph
    except Exception as error:
        if name in (OURS, BESIDE):
            raise
        trials.results[name]["eager"] = f"{type(error).__name__}: {error}"[:200]
        torch.cuda.synchronize()
        return timing.Eager(fn, sets, calls)


def _check_after(trials: Trials, name: str, graph: timing.Issued, judge: Callable[[Any], float]) -> None:
    trials.results[name]["error_after"] = round(judge(_replayed(graph)), 6)


def _replayed(graph: timing.Issued) -> Any:
    """What the timed calls themselves write for set 0: cleared, issued once more."""
    for tensor in _floats(graph.output):
        tensor.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    if graph.output is None:
        raise WrongResult("no output")
    return graph.output


def _floats(output: Any) -> list[torch.Tensor]:
    several = output if isinstance(output, (tuple, list)) else [output]
    return [tensor for tensor in several if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()]


def _host_us(fn: timing.Contestant, sets: int) -> float:
    return round(timing.host_time(fn, sets).median_us, 2)
