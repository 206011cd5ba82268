"""Times explicit plans: ``python -m benchmarks.sweep --problems "1x4096 32/8" --plans "block_m=8,16 block_n=64,128" --out OUT``.

For each problem every variant (``benchmarks/axes.py``) is compiled ahead by a pool of processes, checked against the
reference, and timed in turn with the planner's own choice, the read floor and, if asked for, peers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import flashtile
from benchmarks import axes, flags, grids, peers, timing
from benchmarks.check import Oracle, poisoned
from benchmarks.measure import ours, planned
from benchmarks.record import Record, heading
from benchmarks.refusals import WrongResult
from benchmarks.sets import InputSets, num_sets
from benchmarks.trials import DeviceLost, ensure_alive
from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem
from flashtile.testing.compilers import Compilers

CHOICE, FLOOR = "choice", "floor"
SHOWN = ("block_m", "block_n", "num_warps", "num_stages", "num_splits", "num_programs")


@dataclass
class _Sweep:
    """One problem: who is timed (plans by index, and others by name), and who is not and why."""

    entry: grids.Entry
    sets: InputSets
    oracle: Oracle
    plans: dict[str, DecodePlan] = field(default_factory=dict)
    fns: dict[str, timing.Contestant] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def enter(self, name: str, make: Callable[[], timing.Contestant], checked: bool = True) -> None:
        """Makes a contestant; only one whose result on a NaN-filled ``out`` is right takes part."""
        try:
            plan = self.plans.get(name)
            if plan is not None:
                out = poisoned(lambda args: flashtile.decode(**args, plan=plan), self.sets)
                self.errors[name] = self.oracle.error(out)
            self.fns[name] = make()
            out = self.fns[name](0)
            if checked and plan is None:
                self.errors[name] = self.oracle.error(out)
        except WrongResult as error:
            self._drop(name, f"WRONG: {error}")
        except Exception as error:  # infeasible by the planner, the compiler or the launch: each is a reason
            self._drop(name, f"{type(error).__name__}: {' '.join(str(error).split())}"[:400])
        ensure_alive(self.sets.device)

    def _drop(self, name: str, why: str) -> None:
        self.fns.pop(name, None)
        self.refused[name] = why

    def timed(self, rounds: int) -> dict[str, timing.Timing]:
        """All contestants in turn."""
        count = self.sets.count
        if self.sets.device.type == "cpu":
            return timing.wall_time(self.fns, count, rounds)
        calls = timing.calls_per_graph(count, self.entry.kv_bytes)
        captured = {}
        for name in list(self.fns):
            try:
                captured[name] = timing.capture(self.fns[name], count, calls)
            except Exception as error:
                self._drop(name, f"capture: {type(error).__name__}: {error}"[:400])
                ensure_alive(self.sets.device)
        return timing.replay_in_turn(captured, rounds)


def variants(entry: grids.Entry, wanted: list[axes.Variants], problem: Problem, device: Device, choice: DecodePlan) -> list[DecodePlan]:
    """Every plan that the specs meant for this problem describe, once."""
    meant = [spec for spec in wanted if spec.problems in entry.name]
    return list(dict.fromkeys(plan for spec in meant for plan in spec.plans(choice, problem, device)))


def sweep(entry: grids.Entry, device: torch.device, wanted: list[axes.Variants], others: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """The problem's facts, ``timed`` plans (fastest first), and what was refused or wrong."""
    sets = InputSets(entry, device, num_sets(entry, device))
    problem, choice = planned(sets)
    state = _Sweep(entry, sets, Oracle(sets))
    state.plans = {str(i): plan for i, plan in enumerate(variants(entry, wanted, problem, Device.of(device), choice))}
    for name, plan in state.plans.items():
        state.enter(name, lambda plan=plan: ours(sets, plan))  # type: ignore[misc]
    state.enter(CHOICE, lambda: ours(sets))
    if device.type == "cuda":
        from benchmarks import read_floor

        for name, reader in read_floor.readers(sets).items():
            state.enter(name, lambda reader=reader: reader, checked=False)  # type: ignore[misc]
    for name in others:
        state.enter(name, lambda make=peers.PEERS[name]: make(sets))  # type: ignore[misc]
    times = state.timed(rounds)
    order = sorted((name for name in state.plans if name in times), key=lambda name: times[name].median_us)
    floors = [times[name].median_us for name in times if name.startswith("read ")]
    return entry.facts() | {
        "sets": sets.count,
        "plan": json.loads(choice.to_json()),
        "planner_us": round(times[CHOICE].median_us, 3) if CHOICE in times else None,
        "floor_us": round(min(floors), 3) if floors else None,
        "peers_us": {name: round(times[name].median_us, 3) for name in others if name in times},
        "timed": [
            {"us": round(times[name].median_us, 3), "spread": round(times[name].spread, 4), "error": round(state.errors[name], 6)}
            | {"plan": json.loads(state.plans[name].to_json())}
            for name in order
        ],
        "refused": [{"who": _who(state.plans.get(name), name), "why": why} for name, why in state.refused.items()],
    }


def _who(plan: DecodePlan | None, name: str) -> Any:
    return name if plan is None else json.loads(plan.to_json())


def table(row: dict[str, Any], top: int) -> list[str]:
    """The fastest plans of a problem as lines of a terminal."""
    if "failed" in row:
        return [f"{row['name']}: FAILED {row['failed']}"]
    peers_us = "".join(f", {name} {us:.2f}" for name, us in row["peers_us"].items())
    chosen = row["plan"]
    wrong = [refusal for refusal in row["refused"] if refusal["why"].startswith("WRONG")]
    lines = [
        f"{row['name']}: {len(row['timed'])} plans timed, {len(row['refused'])} refused, {len(wrong)} of them WRONG;"
        f" choice {_us(row['planner_us'])}"
        f" ({chosen['kernel']} {' '.join(str(chosen[name]) for name in SHOWN)}), floor {_us(row['floor_us'])}{peers_us}"
    ]
    lines.append(f"{'us':>9} {'of floor':>9} {'spread':>7} {'kernel':20}" + "".join(f"{name.removeprefix('num_'):>9}" for name in SHOWN))
    for timed in row["timed"][:top]:
        plan = timed["plan"]
        share = f"{row['floor_us'] / timed['us']:9.1%}" if row["floor_us"] else f"{'-':>9}"
        block_m = f"{plan['block_m']}{'s' if plan['swapped'] else ''}"
        cells = [block_m, *(str(plan[name]) for name in SHOWN[1:])]
        lines.append(f"{timed['us']:9.2f} {share} {timed['spread']:7.1%} {plan['kernel']:20}" + "".join(f"{cell:>9}" for cell in cells))
    reasons = dict.fromkeys(refusal["why"][:200] for refusal in wrong + row["refused"])
    return lines + [f"  refused: {why}" for why in list(reasons)[: max(4, len(wrong))]]


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} us"


def main(
    problems: Annotated[list[str], typer.Option(help="An entry's name (8x2048 32/8 q4 page 16), or a grid's; may be repeated.")],
    plans: flags.Plans,
    out: Annotated[Path, typer.Option(help="Folder for sweep.json.")] = Path("."),
    name: Annotated[str, typer.Option(help="The result file's name.")] = "sweep",
    budget: flags.Seconds = 400.0,
    rounds: flags.Rounds = 7,
    top: flags.Top = 12,
    peer: Annotated[list[str] | None, typer.Option(help="A peer timed beside; may be repeated.")] = None,
    peers_dir: flags.PeersDir = flags.PEERS_DIR,
    compilers: flags.Workers = 15,
    device: flags.DeviceName = "cuda",
    commit: flags.Commit = "",
    resume: Annotated[bool, typer.Option(help="Continue the file in OUT.")] = False,
    dry_run: flags.DryRun = False,
) -> None:
    """Times plan variants; exits with 3 where the device was lost (run again with --resume)."""
    end = time.monotonic() + budget
    where = torch.device(device)
    try:
        wanted = axes.read(plans)
        entries = list(dict.fromkeys(entry for text in problems for entry in grids.named(text)))
    except (axes.BadSpec, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    entries = [grids.shrunk(entry) for entry in entries] if dry_run else entries
    others = tuple(peer or ())
    missing = peers.load(peers_dir) if set(others) - {"cudnn", "sdpa", "torch_flash"} and where.type == "cuda" else {}
    protocol = ("DRY RUN on shrunk problems; " if dry_run else "") + (timing.PROTOCOL if where.type == "cuda" else timing.WALL_PROTOCOL)
    record = Record.open(out / f"{name}.json", heading(name, where, commit, protocol, missing), resume)
    entries = [entry for entry in entries if not record.has(entry.name)]
    with closing(Compilers(where, compilers)) as pool:
        _compile_all(entries, wanted, where, pool, end)
        longest = 0.0
        for entry in entries:
            left = end - time.monotonic()
            if left < longest:
                record.add({"name": entry.name, "skipped": "no time left"})
                print(f"{entry.name}: skipped, no time left", flush=True)
                continue
            began = time.monotonic()
            record.begin(entry.name)
            lost = None
            try:
                row = sweep(entry, where, wanted, others, rounds)
            except DeviceLost as error:
                row, lost = entry.facts() | {"failed": f"device lost: {error}"}, error
            except Exception as error:  # the next problem may well run
                row = entry.facts() | {"failed": f"{type(error).__name__}: {error}"[:500]}
            longest = max(0.7 * longest, time.monotonic() - began)
            record.add(row | {"seconds": round(time.monotonic() - began, 1)})
            print("\n".join(table(row, top)), flush=True)
            if lost is not None:
                raise typer.Exit(3)
            if where.type == "cuda":
                torch.cuda.empty_cache()


def _compile_all(entries: list[grids.Entry], wanted: list[axes.Variants], device: torch.device, pool: Compilers, end: float) -> None:
    """Compiles every plan of every problem at once, so that no worker waits for a problem's last kernel."""
    if device.type != "cuda":
        return
    began = time.monotonic()
    known = Device.of(device)
    jobs = []
    for entry in entries:
        problem = entry.problem()
        jobs += [(problem, plan) for plan in variants(entry, wanted, problem, known, plan_decode(problem, known))]
    count = pool.compile(jobs, seconds=0.6 * (end - began))
    print(f"{len(jobs)} plans of {len(entries)} problems, {count} kinds compiled ahead in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    typer.run(main)
