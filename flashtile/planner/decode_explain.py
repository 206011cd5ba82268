"""A decode plan in words and numbers: what it does, what bounds it, and why each other query tile lost. Needs no GPU and no Triton."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from flashtile.planner.catalog import GLUON_SM90
from flashtile.planner.choose import plan_decode
from flashtile.planner.cost import Cost, cost_of, row_blocks_of, work_of
from flashtile.planner.decode_alternatives import FIXED_BLOCK_M, Alternative, alternatives, kernels_passed_over
from flashtile.planner.device import Device
from flashtile.planner.footprint import footprint_of, mma_name
from flashtile.planner.footprint_gluon import WARPGROUP, asks_by_page, merges_parts
from flashtile.planner.plans import DecodePlan
from flashtile.planner.resources import Footprint, product_rate
from flashtile.planner.tiles import variant_name
from flashtile.planner.wording import (
    Compiled,
    OtherKernel,
    as_compiled,
    chooser,
    counted,
    dtypes_in_words,
    footprint_in_words,
    idle_in_words,
    queries_in_words,
)
from flashtile.problem import Problem

PAGES_IN_WORDS = {
    "a page a step": "a step's keys lie on one page",
    "asking warps": "two more warps ask for pages, one for those of K and one for those of V",
    "key by key": "each key looks up its page",
}


@dataclass(frozen=True)
class Explanation:
    """One decode plan explained. Bytes, FLOP and microseconds; rows are those of one sequence and key head.

    ``merged_by`` is who merges partial results: "combine", "programs" that share a unit, or "nobody" where there are none.
    ``pages`` is how keys are found in a paged cache: "a page a step", "asking warps", "key by key", or "" without pages.
    """

    problem: Problem
    device: Device
    plan: DecodePlan
    rows: int
    row_blocks: int
    rows_wasted: int
    mma: str
    schedule: str
    merged_by: str
    pages: str
    programs: int
    programs_per_sm: int
    waves: float
    shared_memory: int
    registers: int
    is_compiled: bool
    spilled_bytes: int | None
    bytes_read: int
    flops: int
    roofline_us: float
    cost: Cost
    predicted_us: float
    bound: str
    alternatives: tuple[Alternative, ...]
    other_kernels: tuple[OtherKernel, ...]

    def to_json(self) -> str:
        """Everything as JSON text; the cost by cause."""
        data: dict[str, Any] = asdict(self)
        data["cost"] = self.cost._asdict()
        return json.dumps(data, sort_keys=True)

    def lines(self) -> list[str]:
        """Plain sentences for a person."""
        return [*_lines(self)]


def explain_decode(problem: Problem, device: Device, plan: DecodePlan | None = None, *, compiled: Compiled | None = None) -> Explanation:
    """Explains a decode plan, by default the one that the planner chooses.

    ``compiled`` replaces the estimates of registers and shared memory by a compiler's. Raises UnsupportedError for a plan
    that cannot run.
    """
    plan = plan_decode(problem, device, plan=plan)
    work = work_of(problem)
    asking = WARPGROUP if plan.kernel == GLUON_SM90 and asks_by_page(problem, plan) else 0
    footprint = as_compiled(footprint_of(problem, plan, device), compiled, plan.num_warps + asking, device)
    cost = cost_of(work, plan, footprint, plan.num_splits, device, plan.num_programs)
    blocks = -(-problem.rows // plan.block_m)
    programs = plan.num_programs or row_blocks_of(work, plan.block_m) * problem.num_heads_kv * plan.num_splits
    return Explanation(
        problem=problem,
        device=device,
        plan=plan,
        rows=problem.rows,
        row_blocks=blocks,
        rows_wasted=blocks * plan.block_m - problem.rows,
        mma=(compiled.mma if compiled else "") or mma_name(problem, plan, device),
        schedule=schedule_name(plan),
        merged_by=_merged_by(problem, plan),
        pages="asking warps" if asking else _pages(problem, footprint),
        programs=programs,
        programs_per_sm=footprint.resident,
        waves=programs / (device.num_sms * footprint.resident),
        shared_memory=footprint.shared_memory,
        registers=footprint.registers,
        is_compiled=compiled is not None,
        spilled_bytes=compiled.spilled_bytes if compiled else None,
        bytes_read=problem.kv_bytes,
        flops=problem.flops,
        roofline_us=1e6 * max(problem.kv_bytes / device.bandwidth, problem.flops / product_rate(problem, device)),
        cost=cost,
        predicted_us=cost.total_us,
        bound=cost.bound,
        alternatives=() if idle_in_words(problem) else tuple(alternatives(problem, work, device, (plan, footprint, cost))),
        other_kernels=tuple(kernels_passed_over(problem, device, plan)),
    )


def schedule_name(plan: DecodePlan) -> str:
    """Who reads which keys, in words: "16 splits", or "stream-K over 264 programs"."""
    if plan.num_programs:
        return f"stream-K over {counted(plan.num_programs, 'program')}"
    return counted(plan.num_splits, "split") if plan.num_splits > 1 else "no split"


def _merged_by(problem: Problem, plan: DecodePlan) -> str:
    if (plan.num_programs or plan.num_splits) <= 1:
        return "nobody"
    longest = max(problem.head_dim, problem.head_dim_v)
    return "programs" if merges_parts(plan, longest, plan.num_splits, plan.num_programs) else "combine"


def _pages(problem: Problem, footprint: Footprint) -> str:
    if not problem.page_size:
        return ""
    return "key by key" if footprint.gathers else "a page a step"


def _lines(e: Explanation) -> Iterator[str]:
    plan, problem = e.plan, e.problem
    heads = f"{problem.num_heads_q}/{problem.num_heads_kv} heads"
    yield (
        f"{problem.batch} x {problem.seqlen_k} keys, {queries_in_words(problem)}, {heads}, head dim {problem.head_dim}, "
        f"{dtypes_in_words(problem)} on {e.device.name}: kernel {plan.kernel}, chosen by {chooser(plan)}."
    )
    idle = idle_in_words(problem)
    if idle:
        yield idle
        return
    kind = " with operands swapped" if plan.swapped else ""
    if plan.block_m == FIXED_BLOCK_M:
        kind = " (as FlashAttention-2's fixed kBlockM)"
    yield (
        f"Tile: block_m {plan.block_m}{kind}; {e.rows} rows in {counted(e.row_blocks, 'block')}, {e.rows_wasted} rows wasted; "
        f"products by {e.mma}."
    )
    if e.device.is_gpu:
        found = f"; {PAGES_IN_WORDS[e.pages]}" if e.pages else ""
        yield f"Program: {plan.block_n} keys a step, {counted(plan.num_warps, 'warp')}, {counted(plan.num_stages, 'stage')}{found}."
        yield footprint_in_words(e.shared_memory, e.registers, e.spilled_bytes, e.programs_per_sm, e.device)
        on_device = f"{counted(e.programs, 'program')} on {e.device.num_sms} SMs, {e.waves:.2f} waves"
        yield f"Schedule: {e.schedule}, {_shares(e)}; {on_device}."
        if e.merged_by == "programs":
            yield "Merging: where programs share a unit, the last of them merges its parts."
    yield f"Work: {e.bytes_read / 1e6:.1f} MB of keys and values, {e.flops / 1e9:.2f} GFLOP; roofline {e.roofline_us:.1f} us."
    merge = "merge" if e.merged_by == "programs" else "combine"
    parts = ", ".join(f"{merge if name == 'combine_us' else name.removesuffix('_us')} {us:.1f}" for name, us in e.cost._asdict().items())
    yield f"Bound by {e.bound}: predicted {e.predicted_us:.1f} us ({parts})."
    for kernel in e.other_kernels:
        yield f"Not kernel {kernel.kernel}: {'; '.join(kernel.reasons)}."
    for other in e.alternatives:
        owner = "" if other.kernel == plan.kernel else f" of {other.kernel}"
        yield f"Not {variant_name(other.block_m, other.swapped)}{owner}{f' ({other.label})' if other.label else ''}: {other.why}."


def _shares(e: Explanation) -> str:
    """What one program reads."""
    plan = e.plan
    if not plan.num_programs:
        return f"at most {plan.keys_per_split} keys each"
    tiles = row_blocks_of(work_of(e.problem), plan.block_m) * e.problem.num_heads_kv * -(-e.problem.keys_read // plan.block_n)
    return f"{plan.block_n * -(-tiles // plan.num_programs)} keys each if all lengths are alike"
