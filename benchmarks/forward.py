"""Measures forward attention: ``python -m benchmarks.forward --out results --budget 400 --grid dense,chunked``.

All contestants of a problem are timed in turn in one process, each only after its result has been found right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import fa4, flags, forward_grids, forward_peers, timing
from benchmarks.ahead import planned, prepare
from benchmarks.forward_grids import Shape
from benchmarks.forward_measure import PROTOCOL, Options, measure, plan_of
from benchmarks.runner import Runner, device_here, died_in_peers, shares, wanted_peers
from benchmarks.speed_tables import line
from flashtile.planner.device import Device

# what each grid gets of the time that is left, where several run
SHARES = {"dense": 36, "chunked": 2, "varlen": 2, "window": 2, "dims": 10, "gqa": 10, "host": 2, "portable": 10, "rescale": 12}
STEP_SECONDS = 60.0  # the most that one contestant's turn may take: it may have a kernel to compile
# who is worth timing beside us on a grid; everyone elsewhere
PEERS_OF = {"portable": ("torch_flash",), "rescale": ("cudnn", "fa3", "fa4")}


def main(
    grid: Annotated[str, typer.Option(help=f"Of {', '.join(forward_grids.GRID_NAMES)} one or several (a,b), or all.")] = "dense",
    out: flags.Out = Path("benchmarks/results"),
    budget: flags.Seconds = 300.0,
    with_peers: flags.WithPeers = True,
    peer: flags.Peer = None,
    peers_dir: flags.PeersDir = flags.PEERS_DIR,
    device: flags.DeviceName = "cuda",
    commit: flags.Commit = "",
    rounds: flags.Rounds = 11,
    only: flags.Only = "",
    resume: flags.Resume = False,
    dry_run: flags.DryRun = False,
    compilers: flags.Workers = 12,
) -> None:
    """Checks and times the problems of some grids; exits with 3 where the device was lost (run again with --resume)."""
    end = time.monotonic() + budget
    names = list(SHARES) if grid == "all" else grid.split(",")
    if not set(names) <= set(forward_grids.GRID_NAMES):
        raise typer.BadParameter(f"{grid} is none of {', '.join(forward_grids.GRID_NAMES)}, all", param_hint="--grid")
    where = device_here(device)
    on_gpu = where.type == "cuda"
    wanted = wanted_peers(with_peers, peer, forward_peers.DEFAULT if on_gpu else ("sdpa",), forward_peers.PEERS)
    problems = {name: [shape for shape in _problems(name, dry_run) if only in shape.name] for name in names}
    missing = died_in_peers(out, "forward", names, wanted) if resume else {}
    wanted = tuple(name for name in wanted if name not in missing)
    missing |= _prepare(problems, where, wanted, peers_dir, compilers, 0.35 * budget)
    for name, why in missing.items():
        print(f"no {name}: {why}", flush=True)
    wanted = tuple(name for name in wanted if name not in missing)

    def measured(shape: Shape, name: str, seconds: float, step: Callable[[str], None]) -> dict[str, Any]:
        peers = tuple(one for one in wanted if one in PEERS_OF.get(name, wanted))
        return measure(shape, Options(where, peers, rounds, host_times=name == "host"), step)

    protocol = PROTOCOL if on_gpu else timing.WALL_PROTOCOL
    limit = {"limit": STEP_SECONDS} if on_gpu else {}
    runner = Runner(
        "forward", where, out, commit, missing, measured, line, protocol, resume, dry_run, peers=wanted, left_out=tuple(missing), **limit
    )
    for name, budget_now in shares(names, SHARES, end - time.monotonic()).items():
        runner.run(name, problems[name], budget_now())


def _problems(name: str, dry_run: bool) -> list[Shape]:
    return [forward_grids.shrunk(shape) if dry_run else shape for shape in forward_grids.grid(name)]


def _prepare(
    problems: dict[str, list[Shape]], device: torch.device, wanted: Sequence[str], folder: Path, workers: int, seconds: float
) -> dict[str, str]:
    """Compiles what will be timed, in processes that take no GPU, and loads the peers meanwhile; returns why which peer is missing."""
    if device.type != "cuda":
        return {}
    with_fa4 = "fa4" in wanted and fa4.lies_in(folder)
    theirs = [shape for name, shapes in problems.items() for shape in shapes if with_fa4 and "fa4" in PEERS_OF.get(name, wanted)]
    ours = [one for shapes in problems.values() for shape in shapes for one in (shape, shape.beside) if one is not None]
    plans = planned(ours, lambda shape: [plan_of(shape, Device.of(device))])
    return prepare(device, plans, fa4.Ahead(theirs, folder, device), lambda: forward_peers.load(folder, wanted), workers, seconds)


if __name__ == "__main__":
    typer.run(main)
