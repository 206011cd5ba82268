"""Clocks: GPU time by graph replay, host time to issue a call, wall time on a CPU.

Protocol of the GPU times: each contestant's calls over all input sets are captured in one CUDA graph; the sets hold at
least 400 MB and four L2 caches, so every call reads cold; contestants are replayed in turn, round by round, in one
process, and the order rotates. Before each timed replay the same graph runs once untimed, so that the launch of the
timed one hides behind it. A figure is the median over rounds of (replay time / calls in the graph).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Any, Protocol

import torch

PROTOCOL = " ".join(__doc__.split("Protocol of the GPU times: ")[1].split())
WALL_PROTOCOL = "wall clock, contestants in turn round by round in one process, median; a sample spans 20 ms of calls, at least one"
Contestant = Callable[[int], Any]
"""Runs input set i and returns what it computed: a tensor, or several."""


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call, round by round."""

    samples: tuple[float, ...]

    @property
    def median_us(self) -> float:
        return median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles over the median."""
        ordered = sorted(self.samples)
        quarter = len(ordered) // 4
        return (ordered[-1 - quarter] - ordered[quarter]) / 2 / self.median_us

    def to_json(self) -> dict[str, Any]:
        return {"gpu_us": round(self.median_us, 3), "spread": round(self.spread, 4), "samples": [round(s, 3) for s in self.samples]}


class Issued(Protocol):
    """``calls`` calls of one contestant that can be issued again and again; ``output`` is what the first (input set 0) writes."""

    @property
    def calls(self) -> int: ...

    @property
    def output(self) -> Any: ...

    def replay(self) -> None: ...


@dataclass(frozen=True)
class Captured:
    """A graph of ``calls`` calls; ``output`` is what its first call (input set 0) writes at each replay."""

    graph: torch.cuda.CUDAGraph
    calls: int
    output: Any

    def replay(self) -> None:
        self.graph.replay()


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


def calls_per_graph(sets: int, kv_bytes: int) -> int:
    """At least one round of the sets, and about 200 us of work."""
    return max(sets, 2, min(10, 800_000_000 // max(1, kv_bytes)))


def capture(fn: Contestant, sets: int, calls: int) -> Captured:
    """Warms ``fn`` up on a side stream, then captures ``calls`` calls over rotating sets."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(min(sets, 3)):
            fn(i)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # a collection in the middle could free another graph, which a capture does not allow
        collecting = gc.isenabled()
        gc.disable()
        try:
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                output = fn(0)
                for j in range(1, calls):
                    fn(j % sets)
            finally:
                graph.capture_end()
        finally:
            if collecting:
                gc.enable()
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    torch.cuda.synchronize()
    return Captured(graph, calls, output)


def replay_in_turn(issued: Mapping[str, Issued], rounds: int, seconds: float = inf) -> dict[str, Timing]:
    """Times every contestant's calls once a round, the first one changing with the round; no fourth round once ``seconds`` are over."""
    names = list(issued)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    end = time.monotonic() + seconds
    for turn in range(rounds):
        if turn >= 3 and time.monotonic() > end:
            break
        for position in range(len(names)):
            name = names[(turn + position) % len(names)]
            calls = issued[name]
            calls.replay()
            start.record()
            calls.replay()
            stop.record()
            stop.synchronize()
            samples[name].append(start.elapsed_time(stop) * 1e3 / calls.calls)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def graph_time(fns: Mapping[str, Contestant], sets: int, rounds: int = 11, calls: int | None = None) -> dict[str, Timing]:
    """GPU time of one call of each contestant: capture all, then replay in turn."""
    count = calls or max(sets, 10)
    return replay_in_turn({name: capture(fn, sets, count) for name, fn in fns.items()}, rounds)


def host_time(fn: Contestant, sets: int, batches: int = 15, calls: int = 40) -> Timing:
    """Host microseconds to issue one eager call, while the GPU's queue is never full."""
    for i in range(5):
        fn(i % sets)
    samples = []
    for _ in range(batches):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for j in range(calls):
            fn(j % sets)
        samples.append((time.perf_counter() - begin) / calls * 1e6)
    torch.cuda.synchronize()
    return Timing(tuple(samples))


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
