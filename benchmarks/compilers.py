"""Compiling ahead: worker processes that run one small call of each plan, so that its kernels lie in Triton's cache on disk."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import active_children, get_context
from typing import Any

import torch

import flashtile
from benchmarks.grids import Entry, shrunk
from benchmarks.sets import InputSets
from flashtile.kernels.tile.schedule import sequences_at_once
from flashtile.planner.plans import DecodePlan

SECONDS_A_BATCH = 150
SMALL_KEYS = 64  # of each sequence that a worker allocates: kernels do not depend on lengths


class Compilers:
    """Worker processes that compile plans; none on a CPU, or once one has died or hung."""

    def __init__(self, device: torch.device, workers: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._compiled: set[Any] = set()
        if device.type == "cuda" and workers > 1:
            self._pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))

    def compile(self, wanted: Iterable[tuple[Entry, DecodePlan]], seconds: float = SECONDS_A_BATCH) -> int:
        """Compiles what no earlier call has; returns how many kinds of plan that were."""
        if self._pool is None:
            return 0
        new = {key: job for job in wanted if (key := _kind(*job)) not in self._compiled}
        if len(new) < 2:
            return 0
        self._compiled |= set(new)
        entries, plans = zip(*new.values())
        try:
            list(self._pool.map(_run_once, entries, plans, timeout=seconds))
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


def _kind(entry: Entry, plan: DecodePlan) -> Any:
    """Equal for plans of which at most the numbers differ that kernels take at run time."""
    batch = sequences_at_once(entry.batch) if plan.num_programs else 0
    problem = (entry.num_heads_q, entry.num_heads_kv, entry.head_dim, entry.dtype, entry.page_size, entry.seqlen_q, batch)
    counts = tuple(max(0, count - 1).bit_length() for count in (plan.num_splits, plan.num_programs))
    tile = plan.with_(keys_per_split=0, min_keys_per_split=0, num_splits=1, num_programs=0)
    return problem, tile, counts, plan.num_programs > 0


@cache
def _inputs_of(entry: Entry) -> InputSets:
    return InputSets(entry, torch.device("cuda"), 1)


def _run_once(entry: Entry, plan: DecodePlan) -> None:
    """In a worker: one call; what refuses the plan says so where it is timed."""
    try:
        flashtile.decode(**_inputs_of(shrunk(entry, SMALL_KEYS, entry.batch)).args(0), plan=plan)
        torch.cuda.synchronize()
    except Exception:
        return
