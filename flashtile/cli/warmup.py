"""``flashtile warmup``: compile kernels before the first request needs them."""

from __future__ import annotations

import time
from itertools import product
from typing import Annotated, Any

import typer

import flashtile
from flashtile.cli import shape
from flashtile.cli.device import RunDevice, device_name, pick_device
from flashtile.cli.output import AsJson, console, microseconds, print_json, progress, table
from flashtile.planner.plans import DecodePlan


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
    device: RunDevice = "auto",
    as_json: AsJson = False,
) -> None:
    """Plan these shapes (every --batch with every --seqlen-k) and compile their kernels ahead of the first call."""
    where = pick_device(device)
    problems = [
        shape.make_problem(
            operation,
            batch=b, seqlen_q=seqlen_q, seqlen_k=k, heads=heads, kv_heads=kv_heads, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype,
            page_size=page_size, window=window, causal=causal, softcap=softcap, alibi=alibi, sinks=sinks, dropout=dropout,
            dtype_kv=dtype_kv, kv_scales=kv_scales,
        )
        for b, k in product(batch or [1], seqlen_k or [4096])
    ]  # fmt: skip
    rows: list[dict[str, Any]] = []
    with progress() as bar:
        task = bar.add_task("warmup", total=len(problems))
        for problem in problems:
            start = time.perf_counter()
            plan = flashtile.warmup([problem], device=where)[0]
            rows.append(
                {
                    "batch": problem.batch,
                    "seqlen_q": problem.seqlen_q,
                    "seqlen_k": problem.seqlen_k,
                    "kernel": plan.kernel,
                    "block_m": plan.block_m,
                    **({"num_splits": plan.num_splits} if isinstance(plan, DecodePlan) else {}),
                    "seconds": time.perf_counter() - start,
                }
            )
            bar.advance(task)
    on_cpu = where.type == "cpu"
    note = (
        "on a CPU there is nothing to compile: the shapes were only planned" if on_cpu else "each kernel is compiled once and kept on disk"
    )
    total = sum(row["seconds"] for row in rows)
    if as_json:
        print_json({"device": device_name(where), "note": note, "seconds": total, "problems": rows})
        return
    columns = {"batch": "batch", "seqlen_q": "queries", "seqlen_k": "keys", "kernel": "kernel", "block_m": "tile", "num_splits": "splits"}
    kept = [name for name in columns if name in rows[0]]
    made = table(f"warmup on {device_name(where)}", *(columns[name] for name in kept), "time", left=0)
    for row in rows:
        made.add_row(*(str(row[name]) for name in kept), microseconds(row["seconds"]))
    console.print(made)
    console.print(f"{len(rows)} shape{'s' if len(rows) > 1 else ''} in {total:.2f} s; {note}.", highlight=False)
