"""GPU time of contestants whose calls lie in CUDA graphs: captured over rotating inputs, replayed in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Any, Protocol

import torch

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


def calls_per_graph(sets: int, kv_bytes: int) -> int:
    """At least one round of the sets, and about 200 us of work."""
    return max(sets, 2, min(10, 800_000_000 // max(1, kv_bytes)))


def capture(fn: Contestant, sets: int, calls: int) -> Captured:
    """Warms ``fn`` up on a side stream, then captures ``calls`` calls over rotating sets."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
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
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
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
