"""Measures decode: ``python -m benchmarks.decode --grid seqlen1 --out results --budget 300``."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import grids, peers, timing
from benchmarks.compilers import Compilers
from benchmarks.measure import DeviceLost, Options, ensure_alive, measure, warm
from benchmarks.record import Record, heading
from benchmarks.report import line
from benchmarks.search import regret
from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device

# what each grid gets of the time that is left, where several run
SHARES = {"host": 2, "seqlen1": 10, "speculative": 3, "paged": 2, "ragged": 4, "floor": 3, "search": 10}
PEERLESS = ("floor", "search")  # these are held to something else, and the peers' time is better spent elsewhere
LEAST_SECONDS = 1.0


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


def main(
    grid: Annotated[str, typer.Option(help=f"Of {', '.join(grids.GRID_NAMES)} one or several (a,b), or all.")] = "seqlen1",
    out: Annotated[Path, typer.Option(help="Folder for the JSON files.")] = Path("benchmarks/results"),
    budget: Annotated[float, typer.Option(help="Seconds for everything.")] = 300.0,
    with_peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Time other libraries beside us.")] = True,
    peer: Annotated[list[str] | None, typer.Option(help="Which peers; may be repeated.")] = None,
    peers_dir: Annotated[Path, typer.Option(help="Where the peers' libraries lie.")] = Path("/opt/peers"),
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    commit: Annotated[str, typer.Option(help="The commit measured, where there is no git.")] = "",
    rounds: Annotated[int, typer.Option(help="Rounds of replays.")] = 11,
    only: Annotated[str, typer.Option(help="Only entries whose name contains this.")] = "",
    resume: Annotated[
        bool, typer.Option(help="Continue the files in OUT; what ran when the last process died is recorded as failed.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Shrink every problem, to try the scripts themselves.")] = False,
    full_search: Annotated[bool, typer.Option(help="Search the whole product of coordinates.")] = False,
    compilers: Annotated[int, typer.Option(help="Processes that compile ahead.")] = 12,
    warm_peers: Annotated[
        bool, typer.Option(help="Call each peer once on a small problem of each kind first: some load or build parts for tens of seconds.")
    ] = True,
) -> None:
    """Checks and times the problems of a grid; exits with 3 where the device was lost (run again with --resume)."""
    names = list(SHARES) if grid == "all" else grid.split(",")
    if not set(names) <= set(grids.GRID_NAMES):
        raise typer.BadParameter(f"{grid} is none of {', '.join(grids.GRID_NAMES)}, all", param_hint="--grid")
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device; try --device cpu --dry-run", param_hint="--device")
    end = time.monotonic() + budget
    wanted = _wanted_peers(with_peers, peer, where)
    missing = peers.load(peers_dir) if with_peers and where.type == "cuda" else {}
    for name, why in missing.items():
        print(f"no {name}: {why}")
    options = Options(where, wanted, rounds)
    with closing(Compilers(where, compilers)) as pool:
        runner = _Runner(options, out, commit, missing, resume, dry_run, full_search, warm_peers, pool)
        runner.prepare(names, only, 0.3 * budget)
        for position, name in enumerate(names):
            share = SHARES.get(name, 1) / sum(SHARES.get(later, 1) for later in names[position:])
            runner.run(name, only, Budget(time.monotonic() + share * (end - time.monotonic())))


@dataclass
class _Runner:
    options: Options
    out: Path
    commit: str
    missing: dict[str, str]
    resume: bool
    dry_run: bool
    full_search: bool
    warm_peers: bool
    compilers: Compilers

    def run(self, name: str, only: str, budget: Budget) -> None:
        """One grid into OUT/decode_<name>.json, an entry at a time."""
        on_gpu = self.options.device.type == "cuda"
        protocol = timing.PROTOCOL if on_gpu else timing.WALL_PROTOCOL
        if self.dry_run:
            protocol = "DRY RUN on shrunk problems; " + protocol
        head = heading(name, self.options.device, self.commit, protocol, self.missing)
        record = Record.open(self.out / f"decode_{name}.json", head, self.resume)
        entries = [entry for entry in self._entries(name) if only in entry.name]
        print(f"{name}: {len(entries)} problems, {budget.left:.0f} s; {head['device']}, commit {head['commit']}", flush=True)
        entries = [entry for entry in entries if not record.has(entry.name)]
        options = replace(self.options, peers=()) if name in PEERLESS and len(self.options.peers) > 1 else self.options
        for position, entry in enumerate(entries):
            if not budget.allows_another():
                record.add({"name": entry.name, "skipped": "no time left"})
                print(f"{entry.name}: skipped, no time left", flush=True)
                continue
            seconds = budget.left / (len(entries) - position)
            self._one(record, entry, budget, lambda entry=entry, s=seconds: self._measure(name, entry, s, options))  # type: ignore[misc]
        print(f"{name}: {sum('skipped' not in e for e in record.entries)} of {len(entries)} done, {record.path}", flush=True)

    def _entries(self, name: str) -> list[grids.Entry]:
        entries = grids.grid(name)
        return [grids.shrunk(entry) for entry in entries] if self.dry_run else entries

    def prepare(self, names: list[str], only: str, seconds: float) -> None:
        """What only the first call of a kind takes, before any entry's time: an entry that seems slow would cut others."""
        began = time.monotonic()
        device = self.options.device
        chosen = {name: [entry for entry in self._entries(name) if only in entry.name] for name in names}
        if device.type == "cuda":
            known = Device.of(device)
            timed = [entry for name, entries in chosen.items() if name != "search" for entry in entries]
            problems = [one for entry in timed for one in (entry, entry.beside) if one is not None]
            self.compilers.compile([(one, plan_decode(one.problem(), known)) for one in problems], seconds)
        beside_peers = [entry for name, entries in chosen.items() if name not in PEERLESS for entry in entries]
        if self.warm_peers and self.options.peers and beside_peers:
            warm(beside_peers, self.options)
        print(f"prepared in {time.monotonic() - began:.0f} s", flush=True)

    def _measure(self, name: str, entry: grids.Entry, seconds: float, options: Options) -> dict[str, Any]:
        if name == "search":
            return regret(entry, options.device, max(6.0, 1.5 * seconds), self.compilers, self.full_search)
        return measure(entry, options)

    def _one(self, record: Record, entry: grids.Entry, budget: Budget, work: Callable[[], dict[str, Any]]) -> None:
        record.begin(entry.name)
        start = time.monotonic()
        lost = None
        try:
            result = work()
            ensure_alive(self.options.device)
        except DeviceLost as error:
            result, lost = {**entry.facts(), "failed": f"device lost: {error}"}, error
        except Exception as error:  # the next problem may well run
            result = {**entry.facts(), "failed": f"{type(error).__name__}: {error}"[:500]}
            try:
                ensure_alive(self.options.device)
            except DeviceLost as gone:
                lost = gone
        result["seconds"] = round(time.monotonic() - start, 1)
        record.add(result)
        budget.spent(result["seconds"])
        print(line(result), flush=True)
        if lost is not None:
            print(f"device lost at {entry.name}: {lost}", flush=True)
            raise typer.Exit(3)
        if self.options.device.type == "cuda":
            torch.cuda.empty_cache()


def _wanted_peers(with_peers: bool, chosen: list[str] | None, device: torch.device) -> tuple[str, ...]:
    if not with_peers:
        return ()
    wanted = tuple(chosen or (peers.DEFAULT if device.type == "cuda" else ("sdpa",)))
    unknown = sorted(set(wanted) - set(peers.PEERS))
    if unknown:
        raise typer.BadParameter(f"unknown {', '.join(unknown)}; there are {', '.join(peers.PEERS)}", param_hint="--peer")
    return wanted


if __name__ == "__main__":
    typer.run(main)
