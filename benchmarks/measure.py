"""One entry: make inputs, check every contestant, time them in turn, check again what was timed."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

import torch

import flashtile
from benchmarks import peers, timing
from benchmarks.check import Oracle, poisoned
from benchmarks.grids import Entry, shrunk
from benchmarks.refusals import WrongResult
from benchmarks.sets import InputSets, num_sets
from benchmarks.trials import Trials
from flashtile.errors import UnsupportedError
from flashtile.planner.catalog import kernels_of
from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem
from flashtile.testing.variants import HOPPER, PORTABLE, kernels_choice

OURS, BESIDE = "flashtile", "beside"
OTHER_KERNELS = {PORTABLE: "portable", HOPPER: "hopper"}  # contestants beside a plan of another kernel
HOST_TIME_BYTES = 150_000_000  # beyond it the GPU is the slower side by far


@dataclass(frozen=True)
class Options:
    """What is timed, and how long."""

    device: torch.device
    peers: tuple[str, ...] = ()
    rounds: int = 11
    host_times: bool = True
    floor: bool = True


def ours(sets: InputSets, plan: DecodePlan | None = None) -> timing.Contestant:
    """flashtile.decode; the planner's own choice unless a plan is forced."""
    calls = [sets.args(i) | ({} if plan is None else {"plan": plan}) for i in range(sets.count)]
    count = sets.count
    return lambda i: flashtile.decode(**calls[i % count])


def planned(sets: InputSets) -> tuple[Problem, DecodePlan]:
    """The problem that set 0 poses, and what the planner chooses for it."""
    problem = Problem.decode(**sets.args(0))
    return problem, plan_decode(problem, Device.of(sets.device))


def other_kernels(problem: Problem, device: Device) -> dict[str, DecodePlan]:
    """Of several queries over a quantised cache, where a rule decides between kernels: the choice of each that is not planned, by name."""
    if not (problem.quantised and problem.seqlen_q > 1 and device.is_gpu):
        return {}
    planned_kernel = plan_decode(problem, device).kernel
    found = {}
    for kernel in kernels_of(problem.operation):
        if kernel.name != planned_kernel and not kernel.reasons_against(problem, device):
            with contextlib.suppress(UnsupportedError):  # it has no tile
                found[OTHER_KERNELS[kernel.name]] = kernels_choice(problem, device, kernel.name)
    return found


def measure(entry: Entry, options: Options) -> dict[str, Any]:
    """Everything about one entry, as a result file carries it. A contestant that fails is recorded with its reason."""
    sets = InputSets(entry, options.device, num_sets(entry, options.device))
    facts: dict[str, Any] = entry.facts() | {"sets": sets.count}
    problem, plan = planned(sets)
    others = other_kernels(problem, Device.of(options.device))
    facts["plan"] = json.loads(plan.to_json())
    if others:
        facts["other_plans"] = {name: json.loads(other.to_json()) for name, other in others.items()}
    oracle = Oracle(sets)
    trials = Trials(options.device)
    trials.enter(OURS, lambda: ours(sets), oracle)
    if OURS in trials.fns:
        trials.attempt(OURS, lambda: oracle.error(poisoned(lambda args: flashtile.decode(**args), sets)))
    for name, other in others.items():
        trials.enter(name, lambda other=other: ours(sets, other), oracle)  # type: ignore[misc]
    for name in options.peers:
        trials.enter(name, lambda make=peers.PEERS[name]: make(sets), oracle)  # type: ignore[misc]
    oracles = dict.fromkeys(trials.fns, oracle)
    if entry.beside is not None:
        facts["beside"] = entry.beside.facts()
        beside = InputSets(entry.beside, options.device, num_sets(entry.beside, options.device), seed=1)
        oracles[BESIDE] = Oracle(beside)
        trials.enter(BESIDE, lambda: ours(beside), oracles[BESIDE])
    if options.device.type == "cuda":
        _time_gpu(trials, oracles, sets, options)
    else:
        for name, clocked in timing.wall_time(trials.fns, sets.count, options.rounds).items():
            trials.results[name] |= clocked.to_json()
    floors = [name for name in trials.results if name.startswith("read ")]
    timed = {name: trials.results[name].get("gpu_us") for name in floors}
    facts["floor_us"] = min((us for us in timed.values() if us), default=None)
    return facts | {"results": trials.results}


def warm(entries: list[Entry], options: Options) -> None:
    """Calls every peer once on a small problem of each kind among ``entries``; what fails says so where it is timed."""
    kinds = {
        (e.num_heads_q, e.num_heads_kv, e.seqlen_q > 1, e.page_size, e.dtype_kv): shrunk(e, max_keys=512, max_batch=1)
        for e in reversed(entries)
    }
    for entry in kinds.values():
        sets = InputSets(entry, options.device, 1)
        trials = Trials(options.device)
        for name in options.peers:
            trials.enter(name, lambda make=peers.PEERS[name], sets=sets: make(sets), None)  # type: ignore[misc]


def _time_gpu(trials: Trials, oracles: dict[str, Oracle], sets: InputSets, options: Options) -> None:
    if options.floor:
        from benchmarks import read_floor

        for name, reader in read_floor.readers(sets).items():
            trials.enter(name, lambda reader=reader: reader, None)  # type: ignore[misc]
            if name in trials.fns:
                trials.attempt(name, lambda name=name: _check_reader(trials.fns[name], sets))  # type: ignore[misc]
    calls = timing.calls_per_graph(sets.count, sets.entry.kv_bytes)
    captured: dict[str, timing.Captured] = {}
    for name in list(trials.fns):
        trials.attempt(name, lambda name=name: captured.update({name: timing.capture(trials.fns[name], sets.count, calls)}))  # type: ignore[misc]
    captured = {name: graph for name, graph in captured.items() if name in trials.fns}
    for name, clocked in timing.replay_in_turn(captured, options.rounds).items():
        trials.results[name] |= clocked.to_json()
    for name, graph in captured.items():
        if name in oracles:
            trials.attempt(name, lambda name=name, graph=graph: _check_after(trials, name, oracles[name], graph))  # type: ignore[misc]
    if options.host_times:
        for name in [name for name in trials.fns if name in oracles]:
            entry = sets.entry.beside if name == BESIDE else sets.entry
            if entry is not None and entry.kv_bytes <= HOST_TIME_BYTES:
                trials.results[name]["host_us"] = round(timing.host_time(trials.fns[name], sets.count).median_us, 2)


def _check_reader(reader: timing.Contestant, sets: InputSets) -> None:
    from benchmarks import read_floor

    if read_floor.fold(reader(0).clone()) != read_floor.expected(sets, 0):
        raise WrongResult("the words read do not fold to the tensors' own xor")


def _check_after(trials: Trials, name: str, oracle: Oracle, graph: timing.Captured) -> None:
    """What the timed graph itself wrote, for set 0: cleared, replayed once more, compared."""
    graph.output.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    trials.results[name]["error_after"] = round(oracle.error(graph.output), 6)
