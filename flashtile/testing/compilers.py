"""Plans compiled ahead of what times them, for as long as there is time: `ops.ahead` does it, in processes that may hang or fail."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import active_children
from typing import Any

import torch

from flashtile.ops.ahead import compile_ahead, compiling_processes, distinct_kernels, kind_of, specs_of
from flashtile.planner.plans import Plan
from flashtile.problem import Problem

SECONDS_A_BATCH = 150


class Compilers:
    """Worker processes that compile plans; none on a CPU, or once one has died or hung."""

    def __init__(self, device: torch.device, workers: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._jobs: dict[Any, Future[None]] = {}
        self._arch = ""
        if device.type == "cuda" and workers > 1:
            major, minor = torch.cuda.get_device_capability(device)
            self._arch = f"sm_{10 * major + minor}"
            self._pool = compiling_processes(workers)

    @property
    def waiting(self) -> int:
        """Kinds of plan that are handed out and not compiled yet."""
        return sum(not job.done() for job in self._jobs.values())

    def compile(self, wanted: Iterable[tuple[Problem, Plan]], seconds: float = SECONDS_A_BATCH) -> int:
        """Compiles what no earlier call has; returns how many kinds of plan that were."""
        count = self.start(wanted)
        self.wait(seconds)
        return count

    def start(self, wanted: Iterable[tuple[Problem, Plan]]) -> int:
        """Hands the workers what no earlier call has, where that is more than one kind of plan; returns how many."""
        if self._pool is None:
            return 0
        new = {key: job for job in wanted if (key := _kind(*job)) not in self._jobs}
        if len(new) < 2:
            return 0
        self._jobs |= {key: self._pool.submit(_compile, problem, plan, self._arch) for key, (problem, plan) in new.items()}
        return len(new)

    def wait(self, seconds: float = SECONDS_A_BATCH, only: Iterable[tuple[Problem, Plan]] | None = None) -> None:
        """Until all is compiled, or ``only`` these plans, ``seconds`` at most; workers that are then still at work are ended."""
        end = time.monotonic() + seconds
        jobs = list(self._jobs.values()) if only is None else [job for one in only if (job := self._jobs.get(_kind(*one)))]
        try:
            for job in jobs:
                job.result(timeout=max(0.0, end - time.monotonic()))
        except Exception as error:  # a broken worker costs time alone: the plans are compiled where they are timed
            print(f"compiling ahead ends: {type(error).__name__} {error}", file=sys.stderr, flush=True)
            self.close()

    def close(self) -> None:
        """Ends the workers, also one that hangs in a kernel."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
            self._jobs = {}
            for child in active_children():
                child.kill()


def _kind(problem: Problem, plan: Plan) -> Any:
    """Equal for plans of the same kernels: those of which at most the numbers differ that kernels take at run time."""
    try:
        return tuple(kind_of(spec) for spec in specs_of(problem, plan))
    except Exception:  # what cannot even be described says so where it is timed
        return problem, plan


def _compile(problem: Problem, plan: Plan, arch: str) -> None:
    """In a worker; what does not compile says so where it is timed."""
    with suppress(Exception):
        for _ in compile_ahead([kernel for _, kernel in distinct_kernels([(problem, plan)])], arch, jobs=1):
            pass
