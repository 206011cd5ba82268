"""Measures decode: ``python -m benchmarks.decode --grid seqlen1 --out results --budget 300``."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import flags, grids, kvcache, kvcache_targets, peers, timing
from benchmarks.measure import Options, measure, other_kernels, warm
from benchmarks.report import line
from benchmarks.runner import Runner, device_here, shares, wanted_peers
from benchmarks.search import regret
from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device
from flashtile.testing.compilers import Compilers

# what each grid gets of the time that is left, where several run
SHARES = {"host": 2, "kvcache": 2, "seqlen1": 10, "speculative": 3, "paged": 2, "ragged": 4, "fp8": 3, "floor": 3, "search": 10}
PEERLESS = ("floor", "kvcache", "search")  # these are held to something else, and the peers' time is better spent elsewhere


def main(
    grid: Annotated[str, typer.Option(help=f"Of {', '.join(grids.GRID_NAMES)} one or several (a,b), or all.")] = "seqlen1",
    out: flags.Out = Path("benchmarks/results"),
    budget: flags.Seconds = 300.0,
    with_peers: flags.WithPeers = True,
    peer: flags.Peer = None,
    peers_dir: flags.PeersDir = flags.PEERS_DIR,
    device: flags.DeviceName = "cuda",
    commit: flags.Commit = "",
    rounds: flags.Rounds = 11,
    only: flags.Only = "",
    resume: Annotated[
        bool, typer.Option(help="Continue the files in OUT; what ran when the last process died is recorded as failed.")
    ] = False,
    dry_run: flags.DryRun = False,
    full_search: Annotated[bool, typer.Option(help="Search the whole product of coordinates.")] = False,
    compilers: flags.Workers = 12,
    warm_peers: Annotated[
        bool, typer.Option(help="Call each peer once on a small problem of each kind first: some load or build parts for tens of seconds.")
    ] = True,
) -> None:
    """Checks and times the problems of a grid; exits with 3 where the device was lost (run again with --resume)."""
    names = list(SHARES) if grid == "all" else grid.split(",")
    if not set(names) <= set(grids.GRID_NAMES):
        raise typer.BadParameter(f"{grid} is none of {', '.join(grids.GRID_NAMES)}, all", param_hint="--grid")
    where = device_here(device)
    end = time.monotonic() + budget
    wanted = wanted_peers(with_peers, peer, peers.DEFAULT if where.type == "cuda" else ("sdpa",), peers.PEERS)
    missing = peers.load(peers_dir) if with_peers and where.type == "cuda" else {}
    for name, why in missing.items():
        print(f"no {name}: {why}")
    options = Options(where, wanted, rounds)
    entries = {name: [entry for entry in _entries(name, dry_run) if only in entry.name] for name in names}
    with closing(Compilers(where, compilers)) as pool:

        def measured(entry: grids.Entry, name: str, seconds: float, step: Callable[[str], None]) -> dict[str, Any]:
            if name == "kvcache":
                return kvcache.measure_kvcache(entry, options)
            if name == "search":
                return regret(entry, where, max(6.0, 1.5 * seconds), pool, full_search)
            peerless = name in PEERLESS and len(options.peers) > 1
            return measure(entry, replace(options, peers=()) if peerless else options)

        protocol = timing.PROTOCOL if where.type == "cuda" else timing.WALL_PROTOCOL
        runner = Runner("decode", where, out, commit, missing, measured, _outcome, protocol, resume, dry_run)
        _prepare(entries, options, pool, 0.3 * budget, warm_peers)
        for name, budget_now in shares(names, SHARES, end - time.monotonic()).items():
            runner.run(name, entries[name], budget_now())


def _outcome(row: dict[str, Any]) -> str:
    return kvcache.outcome(row) if kvcache_targets.ROTARY in row.get("results", {}) else line(row)


def _entries(name: str, dry_run: bool) -> list[grids.Entry]:
    return [grids.shrunk(entry) if dry_run else entry for entry in grids.grid(name)]


def _prepare(entries: dict[str, list[grids.Entry]], options: Options, pool: Compilers, seconds: float, warm_peers: bool) -> None:
    """What only the first call of a kind takes, before any entry's time: an entry that seems slow would cut others."""
    began = time.monotonic()
    if options.device.type == "cuda":
        known = Device.of(options.device)
        timed = [entry for name, some in entries.items() if name != "search" for entry in some]
        problems = [one.problem() for entry in timed for one in (entry, entry.beside) if one is not None]
        plans = [(problem, plan) for problem in problems for plan in (plan_decode(problem, known), *other_kernels(problem, known).values())]
        pool.compile(plans, seconds)
    beside_peers = [entry for name, some in entries.items() if name not in PEERLESS for entry in some]
    if warm_peers and options.peers and beside_peers:
        warm(beside_peers, options)
    print(f"prepared in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    typer.run(main)
