"""The compile matrix: kernels compiled for many architectures without a GPU, and the planner's promises held against them.

A Point is one combination of AXES, or of HOPPER_AXES for Hopper's own kernel. Its plan is the one that the planner takes
for that query tile: the first shape that fits, with the deeper ring or the half tile that the number of splits calls for.
The full matrix is every architecture x query tile x pair of head dims, each with RECIPES for the other axes (what serves
most, every feature at once, float32), and beside it a pairwise cover of all axes: about 1,300 points.

    python -m flashtile.testing.matrix --help
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Generator, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashtile.band import Band
from flashtile.planner.catalog import GLUON_SM90, TRITON, kernel_named
from flashtile.planner.choose import plan_for_tile, with_splits
from flashtile.planner.device import Device
from flashtile.planner.footprint import mma_name, shared_memory_bytes
from flashtile.planner.plans import DecodePlan
from flashtile.planner.rules import fitting_tiles, infeasible, why_none_fits, with_deep_ring, with_half_tiles
from flashtile.planner.splits import choose_splits
from flashtile.planner.tiles import CANDIDATES
from flashtile.problem import DTYPE_BYTES, QUANTISED, Problem
from flashtile.testing.pairwise import pairwise

if TYPE_CHECKING:
    from flashtile.kernels.compiled import CompiledFacts

DEVICES = {
    "sm_75": "T4", "sm_80": "A100", "sm_89": "L40S", "sm_90": "H200", "sm_100": "B200", "sm_120": "RTX 5090", "gfx942": "MI300X",
}  # fmt: skip
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {"band": Band(None, None)},
    "causal": {"seqlen_q": 4},
    "shaped": {"band": Band(1023, 0), "softcap": True, "alibi": True, "sinks": True},
    "ragged": {"seqlen_q": 4, "total_q": 9, "ragged_q": True, "lse": True},
    "all": {
        "seqlen_q": 4, "total_q": 9, "ragged_q": True, "lse": True,
        "band": Band(1023, 0), "softcap": True, "alibi": True, "sinks": True,
    },
}  # fmt: skip
AXES: dict[str, tuple[Any, ...]] = {
    "kernel": (TRITON,),
    "arch": tuple(DEVICES),
    "tile": tuple(CANDIDATES[TRITON]),  # (block_m, swapped)
    "head_dims": ((64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128)),
    # of all tensors; a quantised cache is beside a q of 16 bits
    "dtype": ("float16", "bfloat16", "float32", "tf32", *QUANTISED),
    "page_size": (0, 1, 16, 64),
    "features": tuple(FEATURES),
    "batch": (1, 3, 100),
    # as the rule shares the keys, many keys a program, one key tile a program, more splits than one warp combines
    "splits": (0, 1, 4, 100),
    "group": (1, 4, 8, 16),
    "aligned": (True, False),  # pointers and strides are multiples of 16 bytes, or only of an element
}
HOPPER_AXES: dict[str, tuple[Any, ...]] = AXES | {
    "kernel": (GLUON_SM90,),
    "arch": ("sm_90",),
    "tile": tuple(CANDIDATES[GLUON_SM90]),
    "dtype": ("float16", "bfloat16", *QUANTISED),
    "page_size": (0, 8, 16, 64),
    "aligned": (True,),
}
RECIPES: tuple[dict[str, Any], ...] = (
    {"dtype": "bfloat16", "page_size": 0, "features": "causal", "batch": 1, "splits": 100, "group": 4, "aligned": True},
    {"dtype": "float16", "page_size": 16, "features": "all", "batch": 1, "splits": 1, "group": 8, "aligned": True},
    {"dtype": "float32", "page_size": 64, "features": "shaped", "batch": 1, "splits": 1, "group": 1, "aligned": True},
)
HOPPER_RECIPES: tuple[dict[str, Any], ...] = tuple(
    {"dtype": "bfloat16", "page_size": page_size, "features": features, "batch": batch, "splits": 0, "group": 4, "aligned": True}
    for page_size, features, batch in product((0, 16), ("causal", "all"), (1, 3, 100))
)
RESULTS = Path("benchmarks/results/compile_matrix.json")


@dataclass(frozen=True)
class Point:
    """One combination of AXES; ``splits`` 0 shares the keys by the kernel's rule, which is stream-K for several sequences."""

    kernel: str
    arch: str
    tile: tuple[int, bool]
    head_dims: tuple[int, int]
    dtype: str
    page_size: int
    features: str
    batch: int
    splits: int
    group: int
    aligned: bool

    @cached_property
    def device(self) -> Device:
        return Device.named(DEVICES[self.arch])

    @cached_property
    def problem(self) -> Problem:
        dtype = {"tf32": "float32", "float8_e4m3fn": "bfloat16", "int8": "float16"}.get(self.dtype, self.dtype)
        stored = self.dtype if self.dtype in QUANTISED else dtype
        scales: dict[str, Any] = {"k_scales": "head", "v_scales": "sequence"} if self.dtype in QUANTISED else {}
        return Problem(
            batch=self.batch, seqlen_k=256 if self.splits == 4 else 65536, num_heads_q=2 * self.group, num_heads_kv=2,
            head_dim=self.head_dims[0], head_dim_v=self.head_dims[1],
            dtype_q=dtype, dtype_k=stored, dtype_v=stored, allow_tf32=self.dtype == "tf32", page_size=self.page_size,
            alignment=16 if self.aligned else DTYPE_BYTES[stored], **scales, **FEATURES[self.features],
        )  # fmt: skip

    def plan(self) -> DecodePlan | list[str]:
        """The planner's plan for this query tile, or its reasons why there is none."""
        problem, device = self.problem, self.device
        reasons = kernel_named(self.kernel).reasons_against(problem, device)
        if reasons:
            return reasons
        tile = next((tile for tile, _ in fitting_tiles(problem, device, self.kernel) if (tile.block_m, tile.swapped) == self.tile), None)
        if tile is None:
            return why_none_fits(problem, device, self.kernel, self.tile)
        splits = self.splits or choose_splits(problem, device, tile).num_splits
        if self.kernel == TRITON:
            tile, splits = with_half_tiles(problem, device, with_deep_ring(problem, device, tile, splits), splits)
        plan = plan_for_tile(problem, device, tile)
        if self.splits or not plan.num_programs:
            plan = with_splits(plan, problem, device, splits)
        return infeasible(problem, plan, device) or plan


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


def full() -> list[Point]:
    """Every architecture, query tile and pair of head dims with each recipe, and a pairwise cover of everything."""
    fixed = [
        Point(kernel=kernel, arch=arch, tile=tile, head_dims=dims, **recipe)
        for axes, recipes in ((AXES, RECIPES), (HOPPER_AXES, HOPPER_RECIPES))
        for kernel, arch, tile, dims, recipe in product(axes["kernel"], axes["arch"], axes["tile"], axes["head_dims"], recipes)
    ]
    return list(dict.fromkeys([*fixed, *cover(0)]))


def cover(seed: int, least: int = 0) -> list[Point]:
    """Points in which every two values of two axes of a kernel meet; more covers from the seeds after it, until there are ``least``."""
    points: dict[Point, None] = {}
    while not points or len(points) < least:
        points.update(dict.fromkeys(Point(**row) for axes in (AXES, HOPPER_AXES) for row in pairwise(axes, seed)))
        seed += 1
    return list(points)[: max(least, 0) or None]


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
