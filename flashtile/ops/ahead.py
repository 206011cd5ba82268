"""Kernels compiled ahead of their calls into Triton's cache on disk, by one process or several, for a GPU that need not be here."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, NamedTuple

from flashtile.errors import ToolchainError
from flashtile.ops.prepared import kernel_module
from flashtile.planner.catalog import kernel_named
from flashtile.planner.choose import plan_backward, plan_decode, plan_forward
from flashtile.planner.device import Device
from flashtile.planner.plans import Plan
from flashtile.problem import Problem

if TYPE_CHECKING:
    from flashtile.kernels.launch import Spec
    from flashtile.kernels.on_disk import Stored

PLANNERS: dict[str, Callable[[Problem, Device], Plan]] = {"decode": plan_decode, "forward": plan_forward, "backward": plan_backward}


class Kernel(NamedTuple):
    """One of the kernels that calls of a problem launch: the one at this place of those that the plan's module lists."""

    problem: Problem
    plan: Plan
    place: int


class Compilation(NamedTuple):
    """What has become of one of several kernels: its place among them, and how it lies on disk."""

    place: int
    stored: Stored


def specs_of(problem: Problem, plan: Plan) -> tuple[Spec, ...]:
    """How the kernels of a plan are compiled, for tensors as they are commonly allocated; none on a CPU.

    Raises ToolchainError without Triton.
    """
    if "cpu" in kernel_named(plan.kernel).backends:
        return ()
    if find_spec("triton") is None:
        what = f"Triton: expected it to be installed, to compile {plan.kernel}, got none."
        raise ToolchainError(f"{what} Install it (on Linux: pip install triton, in the version that torch's GPU build names).")
    specs: tuple[Spec, ...] = kernel_module(plan).specs(problem, plan)
    return specs


def distinct_kernels(planned: Iterable[tuple[Problem, Plan]]) -> list[tuple[int, Kernel]]:
    """Every kernel of some plans once, with the place of the first plan that has it."""
    found: dict[Any, tuple[int, Kernel]] = {}
    for place, (problem, plan) in enumerate(planned):
        for index, spec in enumerate(specs_of(problem, plan)):
            found.setdefault(kind_of(spec), (place, Kernel(problem, plan, index)))
    return list(found.values())


def kind_of(spec: Spec) -> Any:
    """Equal for specs of the same binary. ``Spec.key`` would do, but beside Triton's interpreter Gluon's kernels have no hash."""
    _, *rest = spec.key()
    return (spec.kernel.fn.__module__, spec.kernel.fn.__name__, *rest)


def compile_ahead(kernels: Sequence[Kernel], arch: str, jobs: int) -> Generator[Compilation, None, None]:
    """Compiles kernels for an architecture in ``jobs`` processes at most; says of each how it lies on disk, as they come.

    One process is this one, unless it has Triton's interpreter on. Raises ToolchainError for a kernel that cannot be compiled.
    """
    jobs = min(jobs, len(kernels))
    if jobs == 0:
        return
    if jobs == 1 and not _interprets(kernels[0]):
        for place, kernel in enumerate(kernels):
            yield Compilation(place, _or_raise(_store(kernel, arch), kernel, arch))
        return
    with compiling_processes(jobs) as pool:
        futures: dict[Future[Stored | str], int] = {pool.submit(_store, kernel, arch): i for i, kernel in enumerate(kernels)}
        try:
            for done in as_completed(futures):
                place = futures[done]
                yield Compilation(place, _or_raise(done.result(), kernels[place], arch))
        except BrokenProcessPool as error:
            raise ToolchainError(
                f"jobs: expected {jobs} processes that compile, got one that died ({error}). Use fewer if memory ran out, and guard a "
                "script's main part by if __name__ == '__main__'."
            ) from error
        finally:  # of a caller that stops early, and after an error
            pool.shutdown(cancel_futures=True)


def compiling_processes(count: int) -> ProcessPoolExecutor:
    """Processes that compile: they begin anew, so that they hold no GPU, and without Triton's interpreter."""
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_leave_interpreter)


def _leave_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _interprets(kernel: Kernel) -> bool:
    spec = specs_of(kernel.problem, kernel.plan)[kernel.place]
    interprets: bool = import_module("flashtile.kernels.launch").interpreted(spec.kernel)
    return interprets


def _store(kernel: Kernel, arch: str) -> Stored | str:
    """A kernel on disk, or why it cannot be compiled: as a text, for not every error finds its way from process to process."""
    try:
        stored: Stored = import_module("flashtile.kernels.on_disk").store(specs_of(kernel.problem, kernel.plan)[kernel.place], arch)
        return stored
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _or_raise(stored: Stored | str, kernel: Kernel, arch: str) -> Stored:
    if isinstance(stored, str):
        raise ToolchainError(f"{kernel.plan.kernel}: expected a compiler that compiles it for {arch}, got {stored}")
    return stored
