"""Clocks: GPU time by graph replay, host time to issue a call, wall time on a CPU.

Protocol of the GPU times: each contestant's calls over all input sets are captured in one CUDA graph; the sets hold at
least 400 MB and four L2 caches, so every call reads cold; contestants are replayed in turn, round by round, in one
process, and the order rotates. Before each timed replay the same graph runs once untimed, so that the launch of the
timed one hides behind it. A figure is the median over rounds of (replay time / calls in the graph).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flashtile.testing.graphs import Captured, Contestant, Issued, Timing, calls_per_graph, capture, replay_in_turn

__all__ = [
    "PROTOCOL",
    "WALL_PROTOCOL",
    "Captured",
    "Contestant",
    "Eager",
    "Issued",
    "Timing",
    "calls_per_graph",
    "capture",
    "graph_time",
    "host_time",
    "host_times",
    "replay_in_turn",
    "wall_time",
]

PROTOCOL = " ".join(__doc__.split("Protocol of the GPU times: ")[1].split())
WALL_PROTOCOL = "wall clock, contestants in turn round by round in one process, median; a sample spans 20 ms of calls, at least one"


@dataclass
class Eager:
    """Calls issued one by one, for a contestant that no graph can hold: the untimed ones before them give the host its lead."""

    fn: Contestant
    sets: int
    calls: int
    output: Any = None

    def replay(self) -> None:
        self.output = self.fn(0)
        for j in range(1, self.calls):
            self.fn(j % self.sets)


def graph_time(fns: Mapping[str, Contestant], sets: int, rounds: int = 11, calls: int | None = None) -> dict[str, Timing]:
    """GPU time of one call of each contestant: capture all, then replay in turn."""
    count = calls or max(sets, 10)
    return replay_in_turn({name: capture(fn, sets, count) for name, fn in fns.items()}, rounds)


def host_time(fn: Contestant, sets: int, batches: int = 15, calls: int = 40) -> Timing:
    """Host microseconds to issue one eager call, while the GPU's queue is never full."""
    return host_times({"": fn}, sets, batches, calls)[""]


def host_times(fns: Mapping[str, Contestant], sets: int, batches: int = 15, calls: int = 40) -> dict[str, Timing]:
    """`host_time` of each contestant, batch by batch in turn: a host that is slow for a while is slow for all of them."""
    for fn in fns.values():
        for i in range(5):
            fn(i % sets)
    samples: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(batches):
        for name, fn in fns.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for j in range(calls):
                fn(j % sets)
            samples[name].append((time.perf_counter() - begin) / calls * 1e6)
    torch.cuda.synchronize()
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def wall_time(fns: Mapping[str, Contestant], sets: int, rounds: int = 11) -> dict[str, Timing]:
    """Wall time of one call of each contestant on a CPU, in turn."""
    repeats: dict[str, int] = {}
    for name, fn in fns.items():
        fn(0)
        begin = time.perf_counter()
        fn(1 % sets)
        repeats[name] = max(1, min(200, int(0.02 / max(1e-7, time.perf_counter() - begin))))
    samples: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(rounds):
        for name, fn in fns.items():
            begin = time.perf_counter()
            for j in range(repeats[name]):
                fn(j % sets)
            samples[name].append((time.perf_counter() - begin) / repeats[name] * 1e6)
    return {name: Timing(tuple(values)) for name, values in samples.items()}
