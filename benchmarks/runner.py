"""Runs the grids of one operation within a time: an entry at a time, each written as soon as it is known."""

from __future__ import annotations

import faulthandler
import json
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, Protocol

import torch
import typer

from benchmarks.record import Record, heading
from benchmarks.trials import DeviceLost, ensure_alive

LEAST_SECONDS = 1.0
DIED = "the process died in its call"


class Entry(Protocol):
    """One problem of a grid, whatever the operation."""

    @property
    def name(self) -> str: ...

    def facts(self) -> dict[str, Any]: ...


@dataclass
class Budget:
    """Seconds until a fixed point; an entry starts only if it is likely to end in time."""

    end: float
    longest: float = LEAST_SECONDS

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def allows_another(self) -> bool:
        return self.left > 0.7 * self.longest

    def spent(self, seconds: float) -> None:
        self.longest = max(LEAST_SECONDS, 0.5 * self.longest, seconds)


@dataclass
class Watch:
    """Ends the process, with a traceback, where one step takes longer than ``limit`` seconds: a kernel that hangs cannot be interrupted."""

    limit: float = inf
    note: Callable[[str], None] = lambda name: None
    current: str = ""

    def step(self, name: str) -> None:
        """The step before is over; ``name`` is what runs now."""
        self.current = name
        self.note(name)
        if self.limit < inf and sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(self.limit, exit=True, file=sys.__stderr__)

    def over(self) -> None:
        if self.limit < inf:
            faulthandler.cancel_dump_traceback_later()


@dataclass
class Runner:
    """What a run of one operation's grids shares.

    ``measure(entry, grid, seconds, step)`` gives a row of the result file; it may call ``step`` with whose turn it is. ``describe`` makes
    a line for the terminal of a row. ``limit`` is the most seconds that a step may take before the process ends. Where it ended, or the
    device was lost, in the step of one of ``peers``, a run that resumes does without it (``died_in_peers``: ``left_out``); else it leaves
    the entry as failed.
    """

    operation: str
    device: torch.device
    out: Path
    commit: str
    missing: dict[str, str]
    measure: Callable[[Any, str, float, Callable[[str], None]], dict[str, Any]]
    describe: Callable[[dict[str, Any]], str]
    protocol: str
    resume: bool = False
    dry_run: bool = False
    limit: float = inf
    peers: Collection[str] = ()
    left_out: Collection[str] = ()

    def run(self, name: str, entries: Sequence[Entry], budget: Budget) -> None:
        """One grid into OUT/<operation>_<name>.json, an entry at a time; exits with 3 where the device was lost."""
        protocol = "DRY RUN on shrunk problems; " + self.protocol if self.dry_run else self.protocol
        head = heading(name, self.device, self.commit, protocol, self.missing)
        record = Record.open(result_path(self.out, self.operation, name), head, self.resume, self.left_out)
        print(f"{name}: {len(entries)} problems, {budget.left:.0f} s; {head['device']}, commit {head['commit']}", flush=True)
        count = len(entries)
        entries = [entry for entry in entries if not record.has(entry.name)]
        for position, entry in enumerate(entries):
            if not budget.allows_another():
                record.add({"name": entry.name, "skipped": "no time left"})
                print(f"{entry.name}: skipped, no time left", flush=True)
                continue
            self._one(name, record, entry, budget, budget.left / (len(entries) - position))
        print(f"{name}: {sum('skipped' not in e for e in record.entries)} of {count} done, {record.path}", flush=True)

    def _one(self, name: str, record: Record, entry: Entry, budget: Budget, seconds: float) -> None:
        record.begin(entry.name)
        watch = Watch(self.limit, record.step if self.limit < inf else lambda name: None)
        watch.step("inputs")
        start = time.monotonic()
        lost = None
        try:
            result = self.measure(entry, name, seconds, watch.step)
            ensure_alive(self.device)
        except DeviceLost as error:
            if watch.current in self.peers:
                print(f"device lost at {entry.name} in {watch.current}'s call: {error}", flush=True)
                raise typer.Exit(3) from error
            result, lost = {**entry.facts(), "failed": f"device lost: {error}"}, error
        except Exception as error:  # the next problem may well run
            result = {**entry.facts(), "failed": f"{type(error).__name__}: {error}"[:500]}
            try:
                ensure_alive(self.device)
            except DeviceLost as gone:
                lost = gone
        finally:
            watch.over()
        result["seconds"] = round(time.monotonic() - start, 1)
        record.add(result)
        budget.spent(result["seconds"])
        print(self.describe(result), flush=True)
        if lost is not None:
            print(f"device lost at {entry.name}: {lost}", flush=True)
            raise typer.Exit(3)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def result_path(out: Path, operation: str, grid: str) -> Path:
    return out / f"{operation}_{grid}.json"


def died_in_peers(out: Path, operation: str, grids: Sequence[str], peers: Collection[str]) -> dict[str, str]:
    """Peers in whose calls an earlier run of these grids died, and where: a run that resumes does without them."""
    found = {}
    for grid in grids:
        path = result_path(out, operation, grid)
        if not path.exists():
            continue
        earlier = json.loads(path.read_text())
        found |= {name: why for name, why in earlier["peers_missing"].items() if why.startswith(DIED)}
        if (step := earlier.get("step")) in peers:
            found[step] = f"{DIED} at {earlier['running']}"
    return found


def shares(names: Sequence[str], weights: dict[str, int], seconds: float) -> dict[str, Callable[[], Budget]]:
    """For each grid, in order, its budget once its turn has come: its weight's part of what is left of ``seconds``."""
    end = time.monotonic() + seconds

    def budget_of(position: int) -> Budget:
        rest = [weights.get(name, 1) for name in names[position:]]
        now = time.monotonic()
        return Budget(now + rest[0] / sum(rest) * (end - now))

    return {name: lambda position=position: budget_of(position) for position, name in enumerate(names)}  # type: ignore[misc]


def device_here(name: str) -> torch.device:
    """The device called ``name``; BadParameter where it is not there."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device; try --device cpu --dry-run", param_hint="--device")
    return device


def wanted_peers(wanted: bool, chosen: list[str] | None, default: Sequence[str], known: Collection[str]) -> tuple[str, ...]:
    """The peers to time; BadParameter for one that nobody knows."""
    if not wanted:
        return ()
    names = tuple(chosen or default)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise typer.BadParameter(f"unknown {', '.join(unknown)}; there are {', '.join(known)}", param_hint="--peer")
    return names
