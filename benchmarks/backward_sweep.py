"""Times explicit backward plans: ``python -m benchmarks.backward_sweep --problems "128 causal 4x4096" --plans "num_stages=2,3" --out OUT``.

For each problem every variant (``benchmarks/axes.py``: the product of the values of BackwardPlan's fields, the rest as the planner
chooses) is compiled ahead by a pool of processes, checked, and timed in turn with the planner's own choice and peers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import axes, backward_grids, backward_peers, flags
from benchmarks.backward_check import GradientOracle
from benchmarks.backward_grids import BackwardShape
from benchmarks.backward_measure import PROTOCOL, enter_ours, plan_of
from benchmarks.backward_sets import BackwardSets
from benchmarks.forward_grids import shrunk
from benchmarks.forward_sets import num_sets
from benchmarks.runner import Budget, Runner, device_here, wanted_peers
from benchmarks.timed_trials import OURS, Options, time_all, with_rates
from benchmarks.trials import Trials
from flashtile.planner.device import Device
from flashtile.planner.plans import BackwardPlan
from flashtile.problem import Problem
from flashtile.testing.compilers import Compilers

FIELDS = {field.name for field in fields(BackwardPlan)} - {"source"}
STEP_SECONDS = 60.0


def named(text: str) -> list[BackwardShape]:
    """The problems of a grid, or the one of that name; ValueError where there is neither."""
    if text in backward_grids.GRID_NAMES:
        return backward_grids.grid(text)
    found = [shape for name in backward_grids.GRID_NAMES for shape in backward_grids.grid(name) if shape.name == text]
    if not found:
        raise ValueError(f"{text!r} is no problem and no grid; grids are {', '.join(backward_grids.GRID_NAMES)}")
    return found[:1]


def variants(shape: BackwardShape, wanted: list[axes.Variants], choice: BackwardPlan) -> dict[str, BackwardPlan]:
    """Every plan that the specs meant for this problem describe, by what tells it from the planner's choice."""
    plans: dict[str, BackwardPlan] = {}
    for spec in wanted:
        if spec.problems in shape.name:
            for values in product(*spec.axes.values()):
                changes = dict(zip(spec.axes, values))
                plans[" ".join(f"{name}={value}" for name, value in changes.items())] = choice.with_(**changes, source="explicit")
    return plans


def sweep(shape: BackwardShape, wanted: list[axes.Variants], options: Options, step: Callable[[str], None]) -> dict[str, Any]:
    """The problem's facts, the plans by their names, and what became of each."""
    choice = plan_of(shape, Device.of(options.device))[1]
    plans = variants(shape, wanted, choice)
    sets = BackwardSets(shape, options.device, num_sets(shape, options.device))
    oracle = GradientOracle(sets)
    trials = Trials(options.device, step)
    for name, plan in ({OURS: None} | plans).items():
        enter_ours(trials, name, sets, oracle, plan)
    for name in options.peers:
        trials.enter(name, lambda make=backward_peers.PEERS[name]: make(sets), oracle)  # type: ignore[misc]
    time_all(trials, dict.fromkeys(trials.results, oracle.error), sets, options)
    described = {name: json.loads(plan.to_json()) for name, plan in plans.items()}
    return shape.facts() | {"plan": json.loads(choice.to_json()), "plans": described, "results": with_rates(trials.results, shape.flops)}


def table(row: dict[str, Any], top: int) -> str:
    """A problem's fastest plans, then why others were not timed."""
    results = row.get("results", {})
    timed = sorted((result["gpu_us"], name) for name, result in results.items() if "gpu_us" in result)
    lines = [f"{us:11.1f} us {results[name]['tflops']:7.1f} TFLOP/s  {name}" for us, name in timed[:top]]
    reasons = {why[:200] for result in results.values() for how in ("wrong", "failed", "refused") if (why := result.get(how))}
    return "\n".join([row["name"], *lines, *(f"  not timed: {why}" for why in sorted(reasons)), row.get("failed", "")]).rstrip()


def main(
    problems: Annotated[list[str], typer.Option(help="A problem's name (128 causal 4x4096), or a grid's; may be repeated.")],
    plans: flags.Plans,
    out: Annotated[Path, typer.Option(help="Folder for backward_sweep.json.")] = Path("."),
    budget: flags.Seconds = 400.0,
    rounds: flags.Rounds = 7,
    top: flags.Top = 14,
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
    where = device_here(device)
    try:
        wanted = axes.read(plans, FIELDS)
        shapes = list(dict.fromkeys(shape for text in problems for shape in named(text)))
    except (axes.BadSpec, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    shapes = [shrunk(shape) for shape in shapes] if dry_run else shapes
    others = wanted_peers(bool(peer), peer, (), backward_peers.PEERS)
    missing = backward_peers.load(peers_dir, others) if where.type == "cuda" else {}
    options = Options(where, tuple(name for name in others if name not in missing), rounds)
    if where.type == "cuda":
        with closing(Compilers(where, compilers)) as pool:
            known = Device.of(where)
            print(f"{pool.compile(_jobs(shapes, wanted, known), 0.6 * budget)} kinds of plan compiled ahead", flush=True)
    measured = lambda shape, grid, seconds, step: sweep(shape, wanted, options, step)  # noqa: E731
    limit = {"limit": STEP_SECONDS} if where.type == "cuda" else {}
    runner = Runner("backward", where, out, commit, missing, measured, lambda row: table(row, top), PROTOCOL, resume, dry_run,
                    peers=options.peers, **limit)  # fmt: skip
    runner.run("sweep", shapes, Budget(end))


def _jobs(shapes: list[BackwardShape], wanted: list[axes.Variants], device: Device) -> list[tuple[Problem, BackwardPlan]]:
    """Every plan of every problem, the planner's own too."""
    jobs: list[tuple[Problem, BackwardPlan]] = []
    for shape in shapes:
        problem, choice = plan_of(shape, device)
        jobs += [(problem, plan) for plan in (choice, *variants(shape, wanted, choice).values())]
    return jobs


if __name__ == "__main__":
    typer.run(main)
