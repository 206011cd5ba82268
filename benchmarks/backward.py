"""Measures backward attention: ``python -m benchmarks.backward --out results --budget 400 --grid dense,wide``.

All contestants of a problem are timed in turn in one process, each only after its gradients have been found right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import backward_block, backward_grids, backward_peers, backward_step, fa4, flags, timing
from benchmarks.ahead import Planned, planned, prepare
from benchmarks.backward_block import Block
from benchmarks.backward_grids import EVERY_NAME, BackwardShape
from benchmarks.backward_measure import PROTOCOL, measure, plan_of
from benchmarks.forward_grids import shrunk
from benchmarks.forward_sets import problem_of
from benchmarks.runner import Runner, device_here, died_in_peers, shares, wanted_peers
from benchmarks.speed_tables import line
from benchmarks.timed_trials import Options
from flashtile.planner.choose import plan_forward
from flashtile.planner.device import Device

Entry = BackwardShape | Block
# what each grid gets of the time that is left, where several run
SHARES = {
    "dense": 34,
    "wide": 14,
    "deterministic": 14,
    "gqa": 6,
    "varlen": 3,
    "portable": 10,
    "block": 12,
    "dims": 6,
    "host": 2,
    "memory": 4,
}
STEP_SECONDS = 60.0  # the most that one contestant's turn may take: it may have a kernel to compile
BLOCK_SECONDS = 200.0  # torch.compile builds the whole block in one turn
# who is worth timing beside us on a grid; everyone elsewhere
PEERS_OF = {
    "deterministic": ("cudnn",), "gqa": ("cudnn",), "varlen": ("fa4",), "portable": ("torch_flash",), "block": ("cudnn",),
    "host": ("cudnn", "torch_flash"), "memory": ("cudnn",),
}  # fmt: skip
PROTOCOLS = {"block": backward_block.PROTOCOL, "memory": backward_step.MEMORY_PROTOCOL}


def main(
    grid: Annotated[str, typer.Option(help=f"Of {', '.join(EVERY_NAME)} one or several (a,b), or all.")] = "dense",
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
    compilers: flags.Workers = 15,
) -> None:
    """Checks and times the problems of some grids; exits with 3 where the device was lost (run again with --resume)."""
    end = time.monotonic() + budget
    names = list(SHARES) if grid == "all" else grid.split(",")
    if not set(names) <= set(EVERY_NAME):
        raise typer.BadParameter(f"{grid} is none of {', '.join(EVERY_NAME)}, all", param_hint="--grid")
    where = device_here(device)
    on_gpu = where.type == "cuda"
    wanted = wanted_peers(with_peers, peer, backward_peers.DEFAULT if on_gpu else ("sdpa",), backward_peers.PEERS)
    problems = {name: [one for one in _problems(name, dry_run) if only in one.name] for name in names}
    missing = died_in_peers(out, "backward", names, wanted) if resume else {}
    wanted = tuple(name for name in wanted if name not in missing)
    missing |= _prepare(problems, where, wanted, peers_dir, compilers, 0.35 * budget)
    for name, why in missing.items():
        print(f"no {name}: {why}", flush=True)
    wanted = tuple(name for name in wanted if name not in missing)

    def measured(entry: Entry, name: str, seconds: float, step: Callable[[str], None]) -> dict[str, Any]:
        peers = tuple(one for one in wanted if not on_gpu or one in PEERS_OF.get(name, wanted))
        options = Options(where, peers, rounds)
        if isinstance(entry, Block):
            return backward_block.measure(entry, options, step)
        kinds = {"host": backward_step.measure_step, "memory": backward_step.measure_memory}
        return kinds.get(name, measure)(entry, options, step)

    for name, budget_now in shares(names, SHARES, end - time.monotonic()).items():
        runner = Runner(
            "backward", where, out, commit, missing, measured, line, PROTOCOLS.get(name, PROTOCOL) if on_gpu else timing.WALL_PROTOCOL,
            resume, dry_run, peers=wanted, left_out=tuple(missing),
            **{"limit": BLOCK_SECONDS if name == "block" else STEP_SECONDS} if on_gpu else {},
        )  # fmt: skip
        runner.run(name, problems[name], budget_now())


def _problems(name: str, dry_run: bool) -> list[Entry]:
    if name == "block":
        return [backward_block.shrunk(block) if dry_run else block for block in backward_block.blocks()]
    return [shrunk(shape) if dry_run else shape for shape in backward_grids.grid(name)]


def _prepare(
    problems: dict[str, list[Entry]], device: torch.device, wanted: Sequence[str], folder: Path, workers: int, seconds: float
) -> dict[str, str]:
    """Compiles what will be timed, in processes that take no GPU, and loads the peers meanwhile; returns why which peer is missing."""
    if device.type != "cuda":
        return {}
    with_fa4 = "fa4" in wanted and fa4.lies_in(folder)
    theirs = [
        entry for name, entries in problems.items() for entry in entries
        if with_fa4 and "fa4" in PEERS_OF.get(name, wanted) and isinstance(entry, BackwardShape)
    ]  # fmt: skip
    shapes = [entry.attention if isinstance(entry, Block) else entry for entries in problems.values() for entry in entries]
    ours = [one for shape in shapes for one in (shape, shape.beside) if isinstance(one, BackwardShape)]
    plans = planned(ours, lambda shape: _plans_of(shape, Device.of(device)))
    kernels = fa4.Ahead(theirs, folder, device, backward_peers.compile_flash_attention_4)
    return prepare(device, plans, kernels, lambda: backward_peers.load(folder, wanted), workers, seconds)


def _plans_of(shape: BackwardShape, device: Device) -> list[Planned]:
    """The backward plan, and that of the forward call before it."""
    forward = problem_of(shape)
    return [plan_of(shape, device), (forward, plan_forward(forward, device))]


if __name__ == "__main__":
    typer.run(main)
