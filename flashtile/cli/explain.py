"""``flashtile explain``: why this tile, on any device, without a GPU."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashtile.cli import shape
from flashtile.cli.output import AsJson, console, plan_words, print_json, table
from flashtile.errors import ToolchainError
from flashtile.planner.backward_alternatives import BackwardAlternative
from flashtile.planner.backward_explain import BackwardExplanation
from flashtile.planner.backward_tiles import pass_tiles
from flashtile.planner.catalog import module_of
from flashtile.planner.choose import plan_backward, plan_decode, plan_forward
from flashtile.planner.decode_alternatives import Alternative
from flashtile.planner.decode_explain import Explanation
from flashtile.planner.device import Device
from flashtile.planner.explain import explain as explain_plan
from flashtile.planner.forward_alternatives import ForwardAlternative
from flashtile.planner.forward_explain import ForwardExplanation
from flashtile.planner.plans import BackwardPlan, Plan
from flashtile.planner.table import own_tile
from flashtile.planner.user_tables import path_of
from flashtile.problem import Problem

if TYPE_CHECKING:
    from flashtile.kernels.compiled import CompiledFacts


def explain(
    operation: shape.OperationName = shape.Operation.decode,
    device: shape.DeviceName = None,
    batch: Annotated[int, typer.Option("--batch", min=0, help="Sequences.")] = 1,
    seqlen_q: shape.SeqlenQ = None,
    seqlen_k: Annotated[int, typer.Option("--seqlen-k", min=0, help="Keys of the longest sequence.")] = 4096,
    heads: shape.Heads = 32,
    kv_heads: shape.KvHeads = 8,
    head_dim: shape.HeadDim = 128,
    head_dim_v: shape.HeadDimV = None,
    dtype: shape.DtypeOption = shape.Dtype.bfloat16,
    dtype_kv: shape.DtypeKvOption = None,
    kv_scales: shape.KvScalesOption = shape.KvScales.tensor,
    page_size: shape.PageSize = 0,
    window: shape.Window = None,
    causal: shape.Causal = True,
    softcap: shape.Softcap = False,
    alibi: shape.Alibi = False,
    sinks: shape.Sinks = False,
    dropout: shape.Dropout = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Gradients have to be the same to the last bit each time.")
    ] = False,
    block_m: shape.BlockM = None,
    num_splits: shape.NumSplits = None,
    compiles: Annotated[bool, typer.Option("--compile", help="Compile the kernel (needs Triton, no GPU): say what it takes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Explain the plan for a shape on a device that need not be here: tile, schedule, bound, and why every other tile lost."""
    figures, basis = shape.named_device(device)
    problem = shape.make_problem(
        operation,
        batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads=heads, kv_heads=kv_heads, head_dim=head_dim, head_dim_v=head_dim_v,
        dtype=dtype, page_size=page_size, window=window, causal=causal, softcap=softcap, alibi=alibi, sinks=sinks,
        dropout=dropout, dtype_kv=dtype_kv, kv_scales=kv_scales,
    )  # fmt: skip
    if deterministic and operation is shape.Operation.backward:  # other results always are
        problem = problem.with_(deterministic=True)
    plan = _plan(operation, problem, figures, block_m, num_splits)
    facts = _compile(problem, plan, figures) if compiles else ()
    explanation = explain_plan(problem, figures, plan, compiled=facts or None)
    notes = [f"The figures are {basis}."]
    if problem.seqlen_k != seqlen_k:
        notes.append(f"{seqlen_k} keys are planned as {problem.seqlen_k}: in steps, so that a growing cache is rarely planned anew.")
    if seqlen_q is not None and problem.seqlen_q != seqlen_q:
        notes.append(f"{seqlen_q} queries are planned as {problem.seqlen_q}: in steps, so that calls of like lengths share a plan.")
    if plan.source == "tuned":
        own = operation is shape.Operation.decode and own_tile(problem, figures) is not None
        notes.append(f"The tile is from {path_of(figures.name) if own else 'a shipped table'}, because it measured faster than the rule's.")
    if as_json:
        print_json({**json.loads(explanation.to_json()), "notes": notes, "compiled": _facts_json(facts)})
    else:
        _render(explanation, notes, facts)


def _plan(operation: shape.Operation, problem: Problem, figures: Device, block_m: int | None, num_splits: int | None) -> Plan:
    if operation is shape.Operation.decode:
        return plan_decode(problem, figures, block_m=block_m, num_splits=num_splits)
    if num_splits is not None:
        raise typer.BadParameter(f"{operation.value} splits no keys.", param_hint="--num-splits")
    if operation is shape.Operation.forward:
        return plan_forward(problem, figures, block_m=block_m)
    if block_m is not None:
        raise typer.BadParameter("backward has two passes, each with its own tile.", param_hint="--block-m")
    return plan_backward(problem, figures)


def _compile(problem: Problem, plan: Plan, device: Device) -> tuple[CompiledFacts, ...]:
    """What a compiler makes of the plan's kernel; of each pass, first that over keys, where it is a backward plan."""
    if not device.is_gpu:
        raise typer.BadParameter(f"nothing is compiled for {device.name}; name a GPU with --device.", param_hint="--compile")
    if find_spec("triton") is None:
        raise ToolchainError("--compile: expected Triton, got none. Install it (on Linux: pip install triton), or leave --compile out.")
    from flashtile.kernels.compiled import compile_facts

    specs = import_module(module_of(plan.kernel)).specs(problem, plan)
    # a backward's first kernel computes delta
    kept = specs[1 : 1 + len(pass_tiles(plan))] if isinstance(plan, BackwardPlan) else specs[:1]
    return tuple(compile_facts(spec, device.arch) for spec in kept)


def _facts_json(facts: tuple[CompiledFacts, ...]) -> dict[str, Any] | list[dict[str, Any]] | None:
    """One kernel's facts, a list where there are several."""
    found = [
        {
            "arch": one.arch,
            "registers": one.registers,
            "spilled_bytes": one.spilled_bytes,
            "shared_bytes": one.shared_bytes,
            "mma": one.mma or None,
            "warps_per_cta": list(one.warps_per_cta),
        }
        for one in facts
    ]
    return found if len(found) > 1 else found[0] if found else None


def _render(
    explanation: Explanation | ForwardExplanation | BackwardExplanation, notes: list[str], facts: tuple[CompiledFacts, ...]
) -> None:
    for line in [*notes, *plan_words(explanation)]:
        console.print(line, markup=False, highlight=False)
    for one in facts:
        console.print(
            f"Compiled for {one.arch}: {one.registers} registers a thread, {one.spilled_bytes} bytes spilled, "
            f"{one.shared_bytes} bytes of shared memory, matrix instruction {one.mma or 'none'}.",
            markup=False,
            highlight=False,
        )
    others = table("The other tiles", "tile", "why it lost", "rows wasted", "predicted", left=2)
    for other in explanation.alternatives:
        name = _tile_name(other, "" if other.kernel == explanation.plan.kernel else f" of {other.kernel}")
        predicted = "cannot run" if other.predicted_us is None else f"{other.predicted_us:.1f} us"
        others.add_row(name, other.why, str(other.rows_wasted), predicted)
    for kernel in explanation.other_kernels:
        others.add_row(f"any of {kernel.kernel}", "; ".join(kernel.reasons), "", "cannot run")
    if others.row_count:
        console.print(others)


def _tile_name(other: Alternative | ForwardAlternative | BackwardAlternative, owner: str) -> str:
    if isinstance(other, BackwardAlternative):
        return f"{other.passes_in_words}{owner}" if other.passes else f"{other.owned} {other.owner}{owner}"
    if isinstance(other, ForwardAlternative):
        return f"{other.block_m}{owner}"
    return f"{other.block_m}{' swapped' if other.swapped else ''}{owner}{f' ({other.label})' if other.label else ''}"
