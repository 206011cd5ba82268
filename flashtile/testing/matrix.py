"""The compile matrix: kernels compiled for many architectures without a GPU, and the planner's promises held against them.

python -m flashtile.testing.matrix --help
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Generator, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashtile.planner.catalog import kernel_named
from flashtile.planner.footprint import mma_name, shared_memory_bytes
from flashtile.planner.plans import DecodePlan
from flashtile.testing.matrix_points import AXES, DEVICES, Point, cover, full

if TYPE_CHECKING:
    from flashtile.kernels.compiled import CompiledFacts

RESULTS = Path("benchmarks/results/compile_matrix.json")


@dataclass(frozen=True)
class Outcome:
    """What became of a point: its plan's kernels as compiled, or why there is none, or how the compiler failed."""

    point: Point
    plan: DecodePlan | None = None
    decode: CompiledFacts | None = None
    combine: CompiledFacts | None = None
    reasons: tuple[str, ...] = ()
    failure: str = ""

    @property
    def spills(self) -> bool:
        return any(facts is not None and facts.spilled_bytes > 0 for facts in (self.decode, self.combine))

    @property
    def over_shared_memory(self) -> bool:
        limit = self.point.device.smem_per_block
        return any(facts is not None and facts.shared_bytes > limit for facts in (self.decode, self.combine))

    @property
    def shared_memory_estimate(self) -> int:
        return shared_memory_bytes(self.point.problem, self.plan, self.point.device) if self.plan else 0

    @property
    def mma_differs(self) -> bool:
        if self.plan is None or self.decode is None:
            return False
        return not claims(mma_name(self.point.problem, self.plan, self.point.device), self.decode.mma)

    def broken_promises(self) -> list[str]:
        """What the planner said of this plan that the compiler contradicts."""
        if self.failure:
            return [f"the compiler failed: {self.failure}"]
        if self.plan is None:
            return [] if all(self.reasons) and self.reasons else ["no plan, and no reason"]
        assert self.decode is not None
        broken = []
        if self.spills:
            broken.append(f"it spills {self.decode.spilled_bytes} bytes")
        if self.over_shared_memory:
            broken.append(f"it takes {self.decode.shared_bytes} bytes of shared memory, and there are {self.point.device.smem_per_block}")
        if self.decode.shared_bytes > self.shared_memory_estimate:
            broken.append(f"it takes {self.decode.shared_bytes} bytes of shared memory, and {self.shared_memory_estimate} were planned")
        if self.mma_differs:
            claimed = mma_name(self.point.problem, self.plan, self.point.device)
            broken.append(f"its matrix instruction is {self.decode.mma or 'none'}, and {claimed} was planned")
        return broken


def claims(planned: str, compiled: str) -> bool:
    """Whether the planner's name of a matrix instruction (``mma_name``) is the compiler's; N may be another product's."""
    if "vector units" in planned:
        return not compiled or compiled.startswith("v_mfma_f32_4x4x")  # AMD's for a few rows is hardly faster than FMA
    kind, shape = planned.split()
    if kind == "mma.sync":
        return planned == compiled
    rows, columns = shape.removeprefix("m").split("k")[0].split("n")
    if kind == "mfma":
        return compiled.startswith(f"v_mfma_f32_{rows}x{columns}x")
    if kind == "wgmma":
        return compiled.startswith(f"wgmma m{rows}n") and compiled.endswith(f"k{shape.split('k')[1]}")
    return compiled == kind


def compile_point(point: Point) -> Outcome:
    """Compiles a point's kernels in this process, which must not have Triton's interpreter switched on."""
    plan = point.plan()
    if not isinstance(plan, DecodePlan):
        return Outcome(point, reasons=tuple(plan))
    from flashtile.kernels.combine import combine_spec, combines
    from flashtile.kernels.compiled import compile_facts

    decode_spec = import_module(kernel_named(plan.kernel).module).decode_spec
    try:
        decode = compile_facts(decode_spec(point.problem, plan), point.arch)
        combine = compile_facts(combine_spec(point.problem, plan), point.arch) if combines(plan) else None
    except Exception as error:  # whatever a compiler throws is a finding about this point, and the others go on
        return Outcome(point, plan, failure=f"{type(error).__name__}: {str(error)[:200]}")
    return Outcome(point, plan, decode, combine)


def compile_all(points: Iterable[Point], jobs: int = 2) -> Generator[Outcome, None, None]:
    """Outcomes as they come, from ``jobs`` processes of their own: Triton's interpreter may be on in this one."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_leave_interpreter) as pool:
        try:
            for done in as_completed([pool.submit(compile_point, point) for point in points]):
                yield done.result()
        finally:  # of a caller that stops early
            pool.shutdown(cancel_futures=True)


def _leave_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


COLUMNS = (
    *(name for name in AXES), "block_n", "num_warps", "num_stages", "registers", "spilled_bytes", "shared_bytes", "shared_planned",
    "mma", "warps_per_cta", "combine_registers", "combine_spilled_bytes", "reason",
)  # fmt: skip


def row_of(outcome: Outcome) -> list[Any]:
    """An outcome as a row of COLUMNS, None where there is nothing to say."""
    row: list[Any] = list(asdict(outcome.point).values())
    plan, decode, combine = outcome.plan, outcome.decode, outcome.combine
    row += [plan.block_n, plan.num_warps, plan.num_stages] if plan else [None] * 3
    if decode:
        row += [decode.registers, decode.spilled_bytes, decode.shared_bytes, outcome.shared_memory_estimate]
        row += [decode.mma, decode.warps_per_cta]
    else:
        row += [None] * 6
    row += [combine.registers, combine.spilled_bytes] if combine else [None] * 2
    row.append(outcome.failure or " ".join(outcome.reasons) or None)
    return row


def store(outcomes: list[Outcome], path: Path) -> None:
    """One row a line, in the order of the points; nothing in it depends on when or where it was made."""
    from importlib.metadata import version

    rows = [json.dumps(row_of(outcome)) for outcome in outcomes]
    head = f'"schema": 1, "triton": "{version("triton")}", "columns": {json.dumps(COLUMNS)}'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{" + head + ', "points": [\n' + ",\n".join(rows) + "\n]}\n")


@dataclass
class Tally:
    """One architecture's counts."""

    compiled: int = 0
    infeasible: int = 0
    failed: int = 0
    spilling: int = 0
    over_shared_memory: int = 0
    mma_mismatch: int = 0
    broken: list[str] = field(default_factory=list)

    def count(self, outcome: Outcome) -> None:
        self.compiled += outcome.decode is not None
        self.infeasible += bool(outcome.reasons)
        self.failed += bool(outcome.failure)
        self.spilling += outcome.spills
        self.over_shared_memory += outcome.over_shared_memory
        self.mma_mismatch += outcome.mma_differs
        self.broken += [f"{outcome.point}: {promise}" for promise in outcome.broken_promises()]


def main(
    pairs: Annotated[int, typer.Option("--pairwise", min=0, help="Only this many points of pairwise covers; 0: the full matrix.")] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Which pairwise cover.")] = 0,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes.")] = os.cpu_count() or 1,
    out: Annotated[Path | None, typer.Option("--out", help="Where to keep the result.")] = None,
) -> None:
    """Compile kernels for every architecture without a GPU, and hold the planner's promises against the result."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Table

    points = cover(seed, pairs) if pairs else full()
    outcomes: dict[Point, Outcome] = {}
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(points))
        for outcome in compile_all(points, jobs):
            outcomes[outcome.point] = outcome
            progress.advance(task)
    tallies = {arch: Tally() for arch in DEVICES}
    for point in points:
        tallies[point.arch].count(outcomes[point])
    table = Table(title=f"{len(points)} points", title_justify="left")
    table.add_column("architecture")
    counts = ("compiled", "infeasible", "failed", "spilling", "over_shared_memory", "mma_mismatch")
    for name in counts:
        table.add_column(name.replace("_", " "), justify="right")
    for arch, tally in tallies.items():
        table.add_row(arch, *(str(getattr(tally, name)) for name in counts))
    console = Console(width=None if os.isatty(1) else 160)
    console.print(table)
    broken = [line for tally in tallies.values() for line in tally.broken]
    for line in broken:
        console.print(line, highlight=False)
    if not pairs or out:
        store([outcomes[point] for point in points], out or RESULTS)
    raise typer.Exit(1 if broken else 0)


if __name__ == "__main__":
    typer.run(main)
