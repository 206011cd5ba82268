"""``flashtile warmup``: compile kernels before the first request needs them, also for a GPU that is not here."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any

import typer

import flashtile
from flashtile.cli import shape
from flashtile.cli.device import WarmupDevice, device_name, pick_device_or_model
from flashtile.cli.output import AsJson, console, microseconds, print_json, progress, table
from flashtile.ops.ahead import PLANNERS, compile_ahead, distinct_kernels
from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan, Plan
from flashtile.problem import Problem
from flashtile.rounding import query_bucket

if TYPE_CHECKING:
    from flashtile.kernels.on_disk import Stored


def warmup(
    operation: shape.OperationName = shape.Operation.decode,
    batch: Annotated[list[int] | None, typer.Option("--batch", min=0, help="Sequences; repeatable. Default: 1.")] = None,
    seqlen_k: Annotated[
        list[int] | None, typer.Option("--seqlen-k", min=0, help="Longest sequence, in keys; repeatable. Default: 4096.")
    ] = None,
    seqlen_q: shape.SeqlenQ = None,
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
    lse: Annotated[bool, typer.Option("--lse", help="With the log-sum-exp, as forward is called where gradients follow.")] = False,
    packed: Annotated[bool, typer.Option("--packed", help="Queries are packed (cu_seqlens); forward's over pages always are.")] = False,
    after_append: Annotated[bool, typer.Option("--after-append", help="decode follows append_kv (after_append=True).")] = False,
    device: WarmupDevice = "auto",
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Processes that compile. Default: one a core; with the GPU here, 1.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Plan these shapes (every --batch with every --seqlen-k) and compile their kernels ahead of the first call."""
    where = pick_device_or_model(device)
    figures = where if isinstance(where, Device) else Device.of(where)
    if after_append and operation is not shape.Operation.decode:
        raise typer.BadParameter(f"{operation.value} follows no append.", param_hint="--after-append")
    problems = [
        shape.make_problem(
            operation,
            batch=b, seqlen_q=seqlen_q, seqlen_k=k, heads=heads, kv_heads=kv_heads, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype,
            page_size=page_size, window=window, causal=causal, softcap=softcap, alibi=alibi, sinks=sinks, dropout=dropout,
            dtype_kv=dtype_kv, kv_scales=kv_scales,
        )
        for b, k in product(batch or [1], seqlen_k or [4096])
    ]  # fmt: skip
    began = time.perf_counter()
    planned = [(problem, PLANNERS[operation.value](problem, figures)) for problem in as_called(problems, lse, packed, after_append)]
    kernels = distinct_kernels(planned)
    processes = jobs or (os.cpu_count() or 1 if isinstance(where, Device) else 1)
    stored: list[Stored] = []
    seconds = [0.0] * len(planned)
    with progress() as bar:
        compiling = compile_ahead([kernel for _, kernel in kernels], figures.arch, processes)
        for compiled in bar.track(compiling, total=len(kernels), description="compiling"):
            stored.append(compiled.stored)
            seconds[kernels[compiled.place][0]] += compiled.stored.seconds
        if not isinstance(where, Device):
            for place, (problem, _) in enumerate(bar.track(planned, description="loading")):
                start = time.perf_counter()
                flashtile.warmup([problem], device=where)
                seconds[place] += time.perf_counter() - start
    rows = [_row(problem, plan, spent) for (problem, plan), spent in zip(planned, seconds, strict=True)]
    found: dict[str, Any] = {
        "device": f"{figures.name} ({figures.arch}), which need not be here" if isinstance(where, Device) else device_name(where),
        "note": "each kernel is compiled once and kept on disk",
        "seconds": time.perf_counter() - began,
    }
    if figures.is_gpu:
        found["cache"] = _cache(stored)
    else:
        found["note"] = (
            "on a CPU there is nothing to compile: the shapes were only planned (--device h200 compiles for one that is elsewhere)"
        )
    if as_json:
        print_json({**found, "problems": rows})
    else:
        _render(found, rows)


def as_called(problems: Iterable[Problem], lse: bool, packed: bool, after_append: bool) -> Iterator[Problem]:
    """Problems of given numbers as calls have them: packed, with the log-sum-exp, behind an append."""
    for problem in problems:
        changes: dict[str, Any] = {"lse": problem.lse or lse, "after_append": after_append}
        decodes, pages = problem.operation == "decode", problem.page_size > 0
        if packed or (pages and not decodes):
            longest, total = query_bucket(problem.seqlen_q), query_bucket(problem.batch * problem.seqlen_q)
            changes |= {"ragged_q": True, "seqlen_q": longest, "total_q": total}
            if not decodes:
                changes |= {"ragged_k": not pages, "seqused_k": pages}
        yield problem.with_(**changes)


def _cache(stored: list[Stored]) -> dict[str, Any]:
    from flashtile.kernels.on_disk import folder

    return {
        "folder": str(folder()),
        "kernels": len(stored),
        "compiled": sum(kernel.compiled for kernel in stored),
        "bytes": sum(kernel.num_bytes for kernel in stored),
    }


def _row(problem: Problem, plan: Plan, seconds: float) -> dict[str, Any]:
    return {
        "batch": problem.batch,
        "seqlen_q": problem.seqlen_q,
        "seqlen_k": problem.seqlen_k,
        "kernel": plan.kernel,
        "block_m": plan.block_m,
        **({"num_splits": plan.num_splits} if isinstance(plan, DecodePlan) else {}),
        "seconds": seconds,
    }


def _render(found: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    columns = {"batch": "batch", "seqlen_q": "queries", "seqlen_k": "keys", "kernel": "kernel", "block_m": "tile", "num_splits": "splits"}
    kept = [name for name in columns if name in rows[0]]
    made = table(f"warmup on {found['device']}", *(columns[name] for name in kept), "time", left=0)
    for row in rows:
        made.add_row(*(str(row[name]) for name in kept), microseconds(row["seconds"]))
    console.print(made)
    console.print(f"{len(rows)} shape{'s' if len(rows) > 1 else ''} in {found['seconds']:.2f} s; {found['note']}.", highlight=False)
    if cache := found.get("cache"):
        before = cache["kernels"] - cache["compiled"]
        count = f"{cache['kernels']} kernel{'s' if cache['kernels'] > 1 else ''}"
        line = f"{count}, {cache['bytes'] / 1e6:.1f} MB, in {cache['folder']}"
        console.print(f"{line}: {cache['compiled']} compiled now, {before} there before.", markup=False, highlight=False, soft_wrap=True)
