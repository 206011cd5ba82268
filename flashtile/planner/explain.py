"""A plan in words and numbers: what it does, what bounds it, and why each other query tile lost. Needs no GPU and no Triton."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flashtile.errors import ArgumentError, message
from flashtile.planner.backward_explain import BackwardExplanation, explain_backward
from flashtile.planner.catalog import CPU, kernels_of
from flashtile.planner.choose import plan_decode, plan_for_tile
from flashtile.planner.cost import Cost, Work, cost_of, iteration_us, row_blocks_of, work_of
from flashtile.planner.device import Device
from flashtile.planner.footprint import footprint_of, mma_name
from flashtile.planner.forward_explain import ForwardExplanation, explain_forward
from flashtile.planner.plans import BLOCK_MS, BackwardPlan, DecodePlan, ForwardPlan, Plan
from flashtile.planner.resources import Footprint, product_rate, programs_that_fit
from flashtile.planner.rules import TILE_GAIN_PERCENT, TILE_RULES, by_predicted_time, fitting_tiles, why_none_fits
from flashtile.planner.tiles import LIMITS, Tile, Variant, variant_name, variants_in_words
from flashtile.planner.wording import ASKED, Compiled, OtherKernel, chooser, counted
from flashtile.problem import Problem

FIXED_BLOCK_M = 64  # FlashAttention-2's kBlockM in its split-KV kernel, whatever the problem


@dataclass(frozen=True)
class Alternative:
    """Another query tile of any kernel, and why it lost. ``predicted_us`` is None where it cannot run."""

    kernel: str
    block_m: int
    swapped: bool
    feasible: bool
    predicted_us: float | None
    rows_wasted: int
    why: str
    label: str = ""


@dataclass(frozen=True)
class Explanation:
    """One decode plan explained. Bytes, FLOP and microseconds; rows are those of one sequence and key head."""

    problem: Problem
    device: Device
    plan: DecodePlan
    rows: int
    row_blocks: int
    rows_wasted: int
    mma: str
    schedule: str
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


def explain(
    problem: Problem, device: Device, plan: Plan | None = None, *, compiled: Compiled | Sequence[Compiled] | None = None
) -> Explanation | ForwardExplanation | BackwardExplanation:
    """Explains a plan of the problem's operation, by default the one that the planner chooses.

    ``compiled`` replaces the estimates of registers and shared memory by a compiler's; a backward plan has two, of the pass over
    keys and of that over queries. Raises UnsupportedError for a plan that cannot run, ArgumentError for one of another operation.
    """
    facts = () if compiled is None else tuple(compiled) if isinstance(compiled, Sequence) else (compiled,)
    if problem.operation == "backward":
        if not isinstance(plan, BackwardPlan | None):
            raise _of_another("BackwardPlan", "plan_backward", plan)
        return explain_backward(problem, device, plan, compiled=(facts[0], facts[1]) if facts else None)
    first = facts[0] if facts else None
    if problem.operation == "forward":
        if not isinstance(plan, ForwardPlan | None):
            raise _of_another("ForwardPlan", "plan_forward", plan)
        return explain_forward(problem, device, plan, compiled=first)
    if not isinstance(plan, DecodePlan | None):
        raise _of_another("DecodePlan", "plan_decode", plan)
    return explain_decode(problem, device, plan, compiled=first)


def _of_another(expected: str, maker: str, plan: Plan) -> ArgumentError:
    return ArgumentError(message("plan", f"a {expected}", f"a {type(plan).__name__}", f"{maker} makes one."))


def explain_decode(problem: Problem, device: Device, plan: DecodePlan | None = None, *, compiled: Compiled | None = None) -> Explanation:
    """Explains a decode plan, by default the one that the planner chooses.

    ``compiled`` replaces the estimates of registers and shared memory by a compiler's. Raises UnsupportedError for a plan
    that cannot run.
    """
    plan = plan_decode(problem, device, plan=plan)
    work = work_of(problem)
    footprint = footprint_of(problem, plan, device)
    if compiled is not None:
        resident = programs_that_fit(compiled.shared_bytes, compiled.registers, plan.num_warps, device)
        footprint = footprint._replace(shared_memory=compiled.shared_bytes, registers=compiled.registers, resident=resident)
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
        alternatives=tuple(_alternatives(problem, work, device, (plan, footprint, cost))),
        other_kernels=tuple(_other_kernels(problem, device, plan)),
    )


def schedule_name(plan: DecodePlan) -> str:
    """Who reads which keys, in words: "16 splits", or "stream-K over 264 programs"."""
    if plan.num_programs:
        return f"stream-K over {counted(plan.num_programs, 'program')}"
    return counted(plan.num_splits, "split") if plan.num_splits > 1 else "no split"


def _other_kernels(problem: Problem, device: Device, plan: DecodePlan) -> Iterator[OtherKernel]:
    """Kernels of the device's backend that cannot run the problem, or that come first and lack the plan's tile."""
    before = True
    for kernel in kernels_of(problem.operation):
        if kernel.name == plan.kernel:
            before = False
        elif device.backend in kernel.backends:
            reasons = kernel.reasons_against(problem, device)
            if not reasons and before and (plan.block_m, plan.swapped) not in LIMITS[kernel.name].variants:
                lacks = variant_name(plan.block_m, plan.swapped)
                reasons = [f"it has no {lacks}, only {variants_in_words(kernel.name)}"]
            if reasons:
                yield OtherKernel(kernel.name, tuple(reasons))


Costed = tuple[DecodePlan, Footprint, Cost]


def _alternatives(problem: Problem, work: Work, device: Device, chosen: Costed) -> Iterator[Alternative]:
    """Every other query tile of every kernel that can run the problem, each with its own best shape and splits."""
    plan = chosen[0]
    for kernel, variant, tile in _tiles(problem, device):
        if (kernel, variant) == (plan.kernel, (plan.block_m, plan.swapped)):
            continue
        block_m, swapped = variant
        wasted = -problem.rows % block_m
        label = "FlashAttention-2's fixed kBlockM" if block_m == FIXED_BLOCK_M else ""
        if tile is None:
            why = "; ".join(why_none_fits(problem, device, kernel, variant))
            yield Alternative(kernel, block_m, swapped, False, None, wasted, why, label)
            continue
        other = plan_for_tile(problem, device, tile) if device.is_gpu else plan.with_(block_m=block_m)
        its_footprint = footprint_of(problem, other, device)
        its_cost = cost_of(work, other, its_footprint, other.num_splits, device, other.num_programs)
        why = _why(problem, work, device, chosen, (other, its_footprint, its_cost))
        yield Alternative(kernel, block_m, swapped, True, its_cost.total_us, wasted, why, label)


def _tiles(problem: Problem, device: Device) -> Iterator[tuple[str, Variant, Tile | None]]:
    """Every query tile of every kernel that can run the problem, with its preferred shape, if one fits."""
    if not device.is_gpu:
        for block_m in BLOCK_MS:
            yield CPU, (block_m, False), Tile(block_m, False, 1, 1, 1, CPU)
        return
    for kernel in kernels_of(problem.operation):
        if kernel.reasons_against(problem, device):
            continue
        fitting = {(tile.block_m, tile.swapped): tile for tile, _ in fitting_tiles(problem, device, kernel.name)}
        for variant in sorted(LIMITS[kernel.name].variants):
            yield kernel.name, variant, fitting.get(variant)


def _why(problem: Problem, work: Work, device: Device, chosen: Costed, other: Costed) -> str:
    """Why the other lost to the chosen: the number that differs most, and what it costs."""
    (plan, _, cost), (lost, _, its_cost) = chosen, other
    us, best = its_cost.total_us, cost.total_us
    verdict = f"{us:.1f} us against {best:.1f}"
    if us < best:
        return f"{verdict}: {_why_though_faster(plan, lost)}"
    blocks, its_blocks = -(-problem.rows // plan.block_m), -(-problem.rows // lost.block_m)
    if its_blocks > blocks:
        return f"{problem.rows} rows need {its_blocks} blocks of {lost.block_m}, and each block reads the keys again: {verdict}"
    step, its_step = (iteration_us(work, tile, its, device) * lost.block_n / tile.block_n for tile, its, _ in (chosen, other))
    slower = f"{lost.block_n} keys take {its_step:.2f} us instead of {step:.2f}: {verdict}"
    if lost.block_m == 1:
        return f"on the vector units {slower}"
    if lost.swapped and not plan.swapped and lost.block_m <= plan.block_m:
        return f"swapped operands change the probabilities' layout, so {slower}"
    if lost.kernel != plan.kernel and lost.block_m <= plan.block_m:
        its_loads, loads = its_cost.start_us + its_cost.memory_us, cost.start_us + cost.memory_us
        return f"start and loads take {its_loads:.1f} us instead of {loads:.1f}: {verdict}"
    wasted = its_blocks * lost.block_m - problem.rows
    if its_blocks < blocks:
        return f"{its_blocks} blocks instead of {blocks}, but {its_cost.bound} takes longer ({its_step:.2f} us a key tile): {verdict}"
    empty = f"{wasted} of {its_blocks * lost.block_m} rows would be empty"
    return f"{empty}, so {slower}" if device.is_gpu and its_step > step else f"{empty}: {verdict}"


def _why_though_faster(plan: DecodePlan, lost: DecodePlan) -> str:
    """Why a tile is not taken that the model predicts to be faster."""
    if plan.source in ASKED:
        return ASKED[plan.source]
    if lost.kernel != plan.kernel:
        return f"{plan.kernel} comes first wherever it can run"
    if TILE_RULES.get(plan.kernel) is not by_predicted_time:
        return "this kernel's rule counts row blocks, whatever the model says"
    return f"within {TILE_GAIN_PERCENT}%, the model's error, the tile that measured best elsewhere stays"


def _lines(e: Explanation) -> Iterator[str]:
    plan, problem = e.plan, e.problem
    heads = f"{problem.num_heads_q}/{problem.num_heads_kv} heads"
    queries = "1 query" if problem.seqlen_q == 1 else f"{problem.seqlen_q} queries"
    yield (
        f"{problem.batch} x {problem.seqlen_k} keys, {queries}, {heads}, head dim {problem.head_dim}, "
        f"{problem.dtype_k} on {e.device.name}: kernel {plan.kernel}, chosen by {chooser(plan)}."
    )
    kind = " with operands swapped" if plan.swapped else ""
    if plan.block_m == FIXED_BLOCK_M:
        kind = " (as FlashAttention-2's fixed kBlockM)"
    yield (
        f"Tile: block_m {plan.block_m}{kind}; {e.rows} rows in {counted(e.row_blocks, 'block')}, {e.rows_wasted} rows wasted; "
        f"products by {e.mma}."
    )
    if e.device.is_gpu:
        yield f"Program: {plan.block_n} keys a step, {counted(plan.num_warps, 'warp')}, {counted(plan.num_stages, 'stage')}."
        source = "as compiled" if e.is_compiled else "estimated"
        spilled = f", {e.spilled_bytes} bytes spilled" if e.is_compiled else ""
        yield (
            f"Footprint ({source}): {e.shared_memory} of {e.device.smem_per_block} bytes of shared memory, "
            f"{e.registers} registers a thread{spilled}; {counted(e.programs_per_sm, 'program')} an SM."
        )
        yield (f"Schedule: {e.schedule}, {_shares(e)}; {counted(e.programs, 'program')} on {e.device.num_sms} SMs, {e.waves:.2f} waves.")
    yield f"Work: {e.bytes_read / 1e6:.1f} MB of keys and values, {e.flops / 1e9:.2f} GFLOP; roofline {e.roofline_us:.1f} us."
    parts = ", ".join(f"{name.removesuffix('_us')} {value:.1f}" for name, value in e.cost._asdict().items())
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
