"""Honest clocks: candidates take turns; on a GPU the cache is cold and the median counts, on a CPU the least does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]

_FLUSH_BYTES = 512 << 20


class Stopwatch:
    """Times calls on one device, in seconds.

    On a GPU each call is timed by events behind a write of 512 MB, which empties the L2 cache and gives the host time
    to issue the whole call: only the GPU's own time is left. On a CPU it is wall time, to which other processes only add.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    @property
    def clock(self) -> str:
        """What ``once`` measures, in words."""
        if self._flush is None:
            return f"wall time on {torch.get_num_threads()} CPU threads"
        return f"GPU time by events behind a write of {_FLUSH_BYTES >> 20} MB (cold L2)"

    @property
    def protocol(self) -> str:
        """What ``in_turn`` measures, in words."""
        return f"{self.clock}, in turn, {'the least of each' if self._flush is None else 'median'}"

    def once(self, call: Call) -> float:
        if self._flush is None:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        with torch.cuda.device(self.device):
            start_event, end_event = _event(), _event()
            self._flush.zero_()
            start_event.record()
            call()
            end_event.record()
            end_event.synchronize()
            return float(start_event.elapsed_time(end_event)) * 1e-3

    def in_turn(self, calls: Sequence[Call], *, repeats: int = 7, budget: float = 0.5) -> list[float]:
        """The median of each call (on a CPU the least), in seconds.

        Rounds stop after ``repeats``, or once ``budget`` seconds are spent; at least two are run.
        Run each call once beforehand: compilation and first touches are not this clock's subject.
        """
        samples: list[list[float]] = [[] for _ in calls]
        start = time.perf_counter()
        for rounds in range(repeats):
            if rounds >= 2 and time.perf_counter() - start > budget:
                break
            for call, times in zip(calls, samples):
                times.append(self.once(call))
        typical = min if self._flush is None else statistics.median
        return [typical(times) for times in samples]


def graphs_in_turn(candidates: Sequence[Sequence[Call]], *, rounds: int = 9, calls_a_graph: int = 10) -> list[float]:
    """Median GPU seconds of one call of each candidate, by CUDA-graph replay.

    A candidate is the same call over several input sets; its graph walks them in order, so that with enough sets the
    L2 cache is cold for each. Graphs take turns.
    """
    graphs = []
    for calls in candidates:
        length = max(len(calls), calls_a_graph)
        graphs.append((_capture([calls[i % len(calls)] for i in range(length)]), length))
    samples: list[list[float]] = [[] for _ in graphs]
    for _ in range(rounds):
        for (graph, length), times in zip(graphs, samples):
            start, end = _event(), _event()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(float(start.elapsed_time(end)) * 1e-3 / length)
    return [statistics.median(times) for times in samples]


def _capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
