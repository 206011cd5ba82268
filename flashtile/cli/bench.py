"""``flashtile bench``: an operation timed on a grid of problems, with the peers that are installed beside it."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from typing import Annotated, Any

import torch
import typer

import flashtile
from flashtile import reference
from flashtile.cli.device import RunDevice, device_name, pick_device
from flashtile.cli.output import console, errors, microseconds, print_json, progress, table
from flashtile.cli.shape import Dtype
from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem
from flashtile.testing.peers import PEERS, DecodeInputs, Run
from flashtile.testing.timing import Stopwatch, graphs_in_turn
from flashtile.testing.tolerance import assert_close, relative_l2

HEADS = ("32/8", "32/32", "64/8", "16/1")
GPU_SIZES = ((1, 512), (1, 4096), (1, 32768), (1, 131072), (8, 2048), (8, 16384), (32, 4096), (128, 1024), (128, 4096))
CPU_HEADS = ("32/8", "16/1")
CPU_SIZES = ((1, 512), (1, 4096), (8, 2048))
PEER_LIMIT = 1e-2  # relative L2 error beyond which a peer answers another question than ours

COLD_BYTES = 400e6  # input sets of one problem together: several times any L2 cache
MAX_SETS = 64


@dataclass(frozen=True)
class Size:
    batch: int
    seqlen_k: int
    num_heads_q: int
    num_heads_kv: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.seqlen_k}, {self.num_heads_q}/{self.num_heads_kv}"


def decode(
    heads: Annotated[list[str] | None, typer.Option("--heads", help="Query heads/key heads, e.g. 32/8; repeatable.")] = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", min=1, help="Sequences; with --keys, every pair of both is timed.")] = None,
    keys: Annotated[list[int] | None, typer.Option("--keys", min=1, help="Keys a sequence; repeatable.")] = None,
    head_dim: Annotated[int, typer.Option("--head-dim", min=8, help="Size of a query, a key and a value.")] = 128,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Of queries, keys and values.")] = Dtype.bfloat16,
    device: RunDevice = "auto",
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Time the other libraries too.")] = True,
    seed: Annotated[int, typer.Option("--seed", help="Draws the numbers.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Time decode (one query a sequence) on a grid of problems, peers beside it; each result is checked first."""
    where = pick_device(device)
    sizes = _grid(where, heads, batch, keys)
    rows: list[dict[str, Any]] = []
    with progress() as bar:
        task = bar.add_task("bench decode", total=len(sizes))
        for size in sizes:
            bar.update(task, description=f"bench decode: {size}")
            rows.append(_bench_one(size, head_dim, dtype.torch, where, peers, seed))
            bar.advance(task)
    document = {
        "device": device_name(where),
        "versions": _versions(),
        "protocol": _protocol(where),
        "dtype": dtype.value,
        "head_dim": head_dim,
        "results": rows,
    }
    if as_json:
        print_json(document)
    else:
        _render(document)
    if any(row["check"] != "passed" for row in rows):
        raise typer.Exit(1)


def _grid(device: torch.device, heads: list[str] | None, batch: list[int] | None, keys: list[int] | None) -> list[Size]:
    on_cpu = device.type == "cpu"
    pairs = [_parse_heads(text) for text in heads or (CPU_HEADS if on_cpu else HEADS)]
    sizes = list(CPU_SIZES if on_cpu else GPU_SIZES)
    if batch or keys:
        sizes = [(b, k) for b in batch or [1] for k in keys or [4096]]
    return [Size(b, k, hq, hk) for hq, hk in pairs for b, k in sizes]


def _parse_heads(text: str) -> tuple[int, int]:
    query, _, kv = text.partition("/")
    try:
        pair = int(query), int(kv or query)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not of the form 32/8 (query heads/key heads).", param_hint="--heads") from None
    if min(pair) < 1 or pair[0] % pair[1]:
        raise typer.BadParameter(f"{text!r}: every key head serves the same number of query heads, e.g. 32/8.", param_hint="--heads")
    return pair


def _bench_one(size: Size, head_dim: int, dtype: torch.dtype, device: torch.device, with_peers: bool, seed: int) -> dict[str, Any]:
    heads = (size.num_heads_q, size.num_heads_kv)
    sets = [DecodeInputs.random(size.batch, size.seqlen_k, heads, head_dim, dtype, device, seed)]
    if device.type == "cuda":
        count = max(1, min(MAX_SETS, math.ceil(COLD_BYTES / sets[0].num_bytes)))
        sets += [DecodeInputs.random(size.batch, size.seqlen_k, heads, head_dim, dtype, device, seed + i) for i in range(1, count)]
    expected, expected_lse = _expected(sets[0])
    plan = plan_decode(Problem.decode(sets[0].q, sets[0].k, sets[0].v, sets[0].seqlens_k), Device.of(device))
    out, lse = flashtile.decode_with_lse(sets[0].q, sets[0].k, sets[0].v, sets[0].seqlens_k)
    check = _check(out, lse, expected, expected_lse)

    runs: dict[str, Run] = {"flashtile": lambda x: flashtile.decode(x.q, x.k, x.v, x.seqlens_k)}
    refused: dict[str, str] = {}
    for peer in PEERS if with_peers else ():
        reason = peer.reason_against(device, dtype)
        if reason is None:
            try:
                run = peer.prepare(sets[0])
                error = relative_l2(run(sets[0])[: len(expected)], expected)
                reason = None if error < PEER_LIMIT else f"its result is off by {error:.2g}: not timed"
            except Exception as failure:  # whatever a peer raises is why it is left out, and no reason to stop
                reason = " ".join(str(failure).split())[:200]
        if reason is None:
            runs[peer.name] = run
        else:
            refused[peer.name] = reason
    times = dict(zip(runs, _time(list(runs.values()), sets, device)))
    return {
        **asdict(size),
        "check": check,
        "error": relative_l2(out[: len(expected)], expected),
        "plan": _plan_facts(plan),
        "seconds": times,
        "bytes_per_second": sets[0].num_bytes / times["flashtile"],
        "not_timed": refused,
    }


def _expected(x: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference on the first sequences: enough of them to reach 64 thousand keys, at least one."""
    count = max(1, min(x.k.shape[0], (64 << 10) // x.k.shape[1]))
    return reference.decode(x.q[:count], x.k[:count], x.v[:count], x.seqlens_k[:count])


def _check(out: torch.Tensor, lse: torch.Tensor, expected: torch.Tensor, expected_lse: torch.Tensor) -> str:
    count = len(expected)
    try:
        assert_close(out[:count], lse[:count], expected, expected_lse, cpu_engine=out.device.type == "cpu")
    except AssertionError as failure:
        return str(failure)
    return "passed"


def _time(runs: list[Run], sets: list[DecodeInputs], device: torch.device) -> list[float]:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return graphs_in_turn([[partial(run, x) for x in sets] for run in runs])
    calls = [partial(run, sets[0]) for run in runs]
    for call in calls:
        call()
    return Stopwatch(device).in_turn(calls, repeats=21, budget=1.0)


def _plan_facts(plan: DecodePlan) -> dict[str, Any]:
    return {"kernel": plan.kernel, "block_m": plan.block_m, "num_splits": plan.num_splits}


def _protocol(device: torch.device) -> str:
    if device.type == "cuda":
        sets = f"rotating input sets ({COLD_BYTES / 1e6:.0f} MB or {MAX_SETS} sets: cold L2)"
        return f"GPU time by CUDA-graph replay over {sets}, in turn, median of 9"
    return Stopwatch(device).protocol + "; one input set, so that small problems stay in the CPU's caches"


def _versions() -> dict[str, str]:
    versions = {"flashtile": flashtile.__version__, "torch": torch.__version__}
    for name in ("triton", "flash_attn", "flashinfer-python"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _render(document: dict[str, Any]) -> None:
    rows = document["results"]
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"] if name != "flashtile"))
    made = table(f"decode on {document['device']}, {document['dtype']}, head dim {document['head_dim']}",
                 "batch x keys, heads", "tile", "splits", "error", "flashtile", "GB/s", *names, "best peer / ours")  # fmt: skip
    ratios = []
    for row in rows:
        ours, peers = row["seconds"]["flashtile"], [row["seconds"][name] for name in names if name in row["seconds"]]
        ratio = min(peers) / ours if peers else None
        ratios += [ratio] if ratio else []
        made.add_row(
            str(Size(row["batch"], row["seqlen_k"], row["num_heads_q"], row["num_heads_kv"])),
            str(row["plan"]["block_m"]), str(row["plan"]["num_splits"]),
            f"{row['error']:.1e}" if row["check"] == "passed" else "[red]WRONG[/red]",
            microseconds(ours), f"{row['bytes_per_second'] / 1e9:.0f}",
            *[microseconds(row["seconds"][name]) if name in row["seconds"] else "-" for name in names],
            f"{ratio:.2f}" if ratio else "-",
        )  # fmt: skip
    console.print(made)
    console.print(f"Times: {document['protocol']}. Error: relative L2 against float64. Above 1 in the last column we are faster.")
    if ratios:
        console.print(f"Geometric mean of the last column: [bold]{statistics.geometric_mean(ratios):.2f}[/bold]")
    for name, reason in {name: why for row in rows for name, why in row["not_timed"].items()}.items():
        console.print(f"[dim]{name}: {reason}[/dim]", highlight=False)
    for row in rows:
        if row["check"] != "passed":
            errors.print(f"{row['batch']} x {row['seqlen_k']}: {row['check']}", markup=False)
