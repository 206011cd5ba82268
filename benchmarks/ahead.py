"""What can be done before anything is timed: kernels of both sides compiled in processes that take no GPU, and peers loaded meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import closing

import torch

from benchmarks import fa4
from benchmarks.forward_grids import AnyShape
from flashtile.planner.plans import Plan
from flashtile.problem import Problem
from flashtile.testing.compilers import Compilers

Planned = tuple[Problem, Plan]


def prepare(
    device: torch.device, plans: list[Planned], theirs: fa4.Ahead, load: Callable[[], dict[str, str]], workers: int, seconds: float
) -> dict[str, str]:
    """Compiles ``plans`` and what FlashAttention-4 needs; returns what ``load`` says: why which peer is missing."""
    began = time.monotonic()
    with closing(Compilers(device, workers)) as pool, closing(theirs):
        count = pool.start(plans)
        missing = load()
        pool.wait(began + seconds - time.monotonic())
        compiled = theirs.wait(began + seconds - time.monotonic())
    print(f"prepared in {time.monotonic() - began:.0f} s: {count} kinds of plan, {compiled} kernels of FlashAttention-4", flush=True)
    return missing


def planned(shapes: Iterable[AnyShape], plans_of: Callable[[AnyShape], Iterable[Planned]]) -> list[Planned]:
    """The plans of all problems that have some; one that has none says so again where it is timed."""
    found: list[Planned] = []
    for shape in shapes:
        try:
            found += plans_of(shape)
        except Exception as error:
            print(f"{shape.name}: no plan, {type(error).__name__} {error}"[:300], flush=True)
    return found
