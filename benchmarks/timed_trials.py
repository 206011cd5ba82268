"""The contestants of one problem, timed in turn, on a GPU as graphs; what was timed is checked once more, and gets its rates."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

import torch

from benchmarks import timing
from benchmarks.forward_grids import Shape
from benchmarks.forward_sets import InputSets, num_sets
from benchmarks.refusals import WrongResult
from benchmarks.trials import Trials
from flashtile.planner.device import Device
from flashtile.planner.plans import Plan
from flashtile.problem import Problem

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


class Operation(NamedTuple):
    """An operation's part of a measurement: the plan of a shape, input sets, what judges results, how ours are entered, and the peers."""

    plan_of: Callable[[Any, Device], tuple[Problem, Plan]]
    sets: Callable[..., InputSets]
    oracle: Callable[[Any], Any]
    enter_ours: Callable[[Trials, str, Any, Any], None]
    peers: Mapping[str, Callable[[Any], timing.Contestant]]


def measure_in_turn(shape: Shape, options: Options, step: Callable[[str], None], of: Operation) -> dict[str, Any]:
    """Everything about one problem of an operation: its facts, our plan, and what became of each contestant."""
    facts = shape.facts()
    facts["plan"] = json.loads(of.plan_of(shape, Device.of(options.device))[1].to_json())
    sets = of.sets(shape, options.device, num_sets(shape, options.device))
    oracle = of.oracle(sets)
    trials = Trials(options.device, step)
    judges: dict[str, Callable[[Any], float]] = {OURS: oracle.exact}
    of.enter_ours(trials, OURS, sets, oracle)
    if shape.beside is not None:
        facts["beside"] = shape.beside.facts()
        beside = of.sets(shape.beside, options.device, num_sets(shape.beside, options.device), seed=1)
        other = of.oracle(beside)
        judges[BESIDE] = other.exact
        of.enter_ours(trials, BESIDE, beside, other)
    for name in options.peers:
        judges[name] = oracle.error
        trials.enter(name, lambda make=of.peers[name]: make(sets), oracle)  # type: ignore[misc]
    time_all(trials, judges, sets, options)
    return facts | {"sets": sets.count, "results": with_rates(trials.results, shape.flops, shape.beside)}


def with_rates(results: dict[str, dict[str, Any]], flops: float, beside: Shape | None = None) -> dict[str, dict[str, Any]]:
    """TFLOP/s of each contestant that was timed, and how many times its time is ours; ``beside`` is the problem timed in turn with it."""
    own = results[OURS].get("gpu_us")
    for name, result in results.items():
        if us := result.get("gpu_us"):
            own_flops = beside.flops if name == BESIDE and beside is not None else flops
            result["tflops"] = round(own_flops / us * 1e-6, 2)
            if own and name != OURS:
                result["ratio"] = round(us / own, 4)
    return results


def time_all(trials: Trials, judges: dict[str, Callable[[Any], float]], sets: InputSets, options: Options) -> None:
    """Times everyone who is still in, by the device's clock."""
    if options.device.type == "cuda":
        time_on_gpu(trials, judges, sets, options)
        return
    trials.step("timing")
    for name, clocked in timing.wall_time(trials.fns, sets.count, options.rounds).items():
        trials.results[name] |= clocked.to_json()


def time_on_gpu(trials: Trials, judges: dict[str, Callable[[Any], float]], sets: InputSets, options: Options) -> None:
    """Times everyone who is still in, each held by its judge before and after; with the host's time where it is wanted."""
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
            host = lambda name=name, fn=fn: trials.results[name].update(host_us=host_us_of(fn, sets.count))  # noqa: E731
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
    for tensor in floats_of(graph.output):
        tensor.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    if graph.output is None:
        raise WrongResult("no output")
    return graph.output


def floats_of(output: Any) -> list[torch.Tensor]:
    several = output if isinstance(output, (tuple, list)) else [output]
    return [tensor for tensor in several if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()]


def host_us_of(fn: timing.Contestant, sets: int) -> float:
    """The host's time to issue a call, in microseconds."""
    return round(timing.host_time(fn, sets).median_us, 2)
