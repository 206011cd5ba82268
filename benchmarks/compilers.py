"""Compiling ahead: worker processes compile the kernels of each plan without the GPU, so that they lie in Triton's cache on disk."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from typing import Any

import torch
from triton.backends.compiler import GPUTarget

from flashtile.kernels.launch import compile_spec
from flashtile.ops import kernel_module
from flashtile.planner.plans import Plan
from flashtile.problem import Problem

SECONDS_A_BATCH = 150


class Compilers:
    """Worker processes that compile plans; none on a CPU, or once one has died or hung."""

    def __init__(self, device: torch.device, workers: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._compiled: set[Any] = set()
        if device.type == "cuda" and workers > 1:
            major, minor = torch.cuda.get_device_capability(device)
            self._target = GPUTarget("cuda", 10 * major + minor, 32)
            self._pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))

    def compile(self, wanted: Iterable[tuple[Problem, Plan]], seconds: float = SECONDS_A_BATCH) -> int:
        """Compiles what no earlier call has; returns how many kinds of plan that were."""
        if self._pool is None:
            return 0
        new = {key: job for job in wanted if (key := _kind(*job)) not in self._compiled}
        if len(new) < 2:
            return 0
        self._compiled |= set(new)
        problems, plans = zip(*new.values())
        try:
            list(self._pool.map(_compile, problems, plans, [self._target] * len(plans), timeout=seconds))
        except Exception as error:  # a broken worker costs time alone: the plans are compiled where they are timed
            print(f"compiling ahead ends: {type(error).__name__} {error}", flush=True)
            self.close()
        return len(new)

    def close(self) -> None:
        """Ends the workers, also one that hangs in a kernel."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
            for child in active_children():
                child.kill()


def _kind(problem: Problem, plan: Plan) -> Any:
    """Equal for plans of the same kernels: those of which at most the numbers differ that kernels take at run time."""
    try:
        return tuple(spec.key() for spec in kernel_module(plan).specs(problem, plan))
    except Exception:  # what cannot even be described says so where it is timed
        return problem, plan


def _compile(problem: Problem, plan: Plan, target: GPUTarget) -> None:
    """In a worker; what does not compile says so where it is timed."""
    try:
        for spec in kernel_module(plan).specs(problem, plan):
            compile_spec(spec, target)
    except Exception:
        return
