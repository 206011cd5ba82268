"""``flashtile bench decode``: decode timed on a grid of problems, with the peers that are installed beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer

import flashtile
from flashtile import reference
from flashtile.cli import contest
from flashtile.cli.device import RunDevice, pick_device
from flashtile.cli.output import console, microseconds, table
from flashtile.cli.shape import Dtype, DtypeKv, DtypeKvOption
from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem
from flashtile.testing.peers import PEERS, DecodeInputs
from flashtile.testing.tolerance import relative_l2

_STORED = {DtypeKv.float8_e4m3fn: torch.float8_e4m3fn, DtypeKv.int8: torch.int8}
HEADS = ("32/8", "32/32", "64/8", "16/1")
GPU_SIZES = ((1, 512), (1, 4096), (1, 32768), (1, 131072), (8, 2048), (8, 16384), (32, 4096), (128, 1024), (128, 4096))
CPU_HEADS = ("32/8", "16/1")
CPU_SIZES = ((1, 512), (1, 4096), (8, 2048))


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
    dtype_kv: DtypeKvOption = None,
    device: RunDevice = "auto",
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Time the other libraries too.")] = True,
    seed: Annotated[int, typer.Option("--seed", help="Draws the numbers.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Time decode (one query a sequence) on a grid of problems, peers beside it; each result is checked first."""
    where = pick_device(device)
    sizes = _grid(where, heads, batch, keys)
    stored = None if dtype_kv is None else _STORED[dtype_kv]
    bench_one = lambda size: _bench_one(size, head_dim, dtype.torch, stored, where, peers and stored is None, seed)  # noqa: E731
    dtypes = dtype.value if dtype_kv is None else f"{dtype.value} over {dtype_kv.value}"
    contest.run("decode", sizes, bench_one, where, dtypes, head_dim, _render, as_json)


def _grid(device: torch.device, heads: list[str] | None, batch: list[int] | None, keys: list[int] | None) -> list[Size]:
    on_cpu = device.type == "cpu"
    pairs = [contest.parse_heads(text) for text in heads or (CPU_HEADS if on_cpu else HEADS)]
    sizes = list(CPU_SIZES if on_cpu else GPU_SIZES)
    if batch or keys:
        sizes = [(b, k) for b in batch or [1] for k in keys or [4096]]
    return [Size(b, k, hq, hk) for hq, hk in pairs for b, k in sizes]


def _bench_one(
    size: Size, head_dim: int, dtype: torch.dtype, dtype_kv: torch.dtype | None, device: torch.device, with_peers: bool, seed: int
) -> dict[str, Any]:
    heads = (size.num_heads_q, size.num_heads_kv)
    make = lambda number: DecodeInputs.random(size.batch, size.seqlen_k, heads, head_dim, dtype, device, number, dtype_kv)  # noqa: E731
    sets = contest.input_sets(make, lambda x: x.num_bytes, device, seed)
    first = sets[0]
    expected, expected_lse = _expected(first)
    count = len(expected)
    plan = plan_decode(Problem.decode(**first.args), Device.of(device))
    out, lse = flashtile.decode_with_lse(**first.args)
    check = contest.verdict(out[:count], lse[:count], expected, expected_lse)
    able, refused = contest.able_peers(
        PEERS if with_peers else (), first, device, dtype, lambda result: relative_l2(result[:count], expected)
    )
    times = contest.timed({"flashtile": lambda x: flashtile.decode(**x.args), **able}, sets, device)
    return {
        **asdict(size),
        "check": check,
        "error": relative_l2(out[:count], expected),
        "plan": _plan_facts(plan),
        "seconds": times,
        "bytes_per_second": first.num_bytes / times["flashtile"],
        "not_timed": refused,
    }


def _expected(x: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference on the first sequences: enough of them to reach 64 thousand keys, at least one."""
    count = max(1, min(x.k.shape[0], (64 << 10) // x.k.shape[1]))
    scales: dict[str, Any] = {"k_scale": x.kv_scale, "v_scale": x.kv_scale}
    return reference.decode(x.q[:count], x.k[:count], x.v[:count], x.seqlens_k[:count], **scales)


def _plan_facts(plan: DecodePlan) -> dict[str, Any]:
    return {"kernel": plan.kernel, "block_m": plan.block_m, "num_splits": plan.num_splits}


def _render(document: dict[str, Any]) -> None:
    rows = document["results"]
    names = contest.peer_names(rows)
    made = table(f"decode on {document['device']}, {document['dtype']}, head dim {document['head_dim']}",
                 "batch x keys, heads", "tile", "splits", "error", "flashtile", "GB/s", *names, "best peer / ours")  # fmt: skip
    ratios = []
    for row in rows:
        cells, ratio = contest.peer_cells(row, names)
        ratios += [ratio] if ratio else []
        made.add_row(
            str(Size(row["batch"], row["seqlen_k"], row["num_heads_q"], row["num_heads_kv"])),
            str(row["plan"]["block_m"]), str(row["plan"]["num_splits"]), contest.error_cell(row),
            microseconds(row["seconds"]["flashtile"]), f"{row['bytes_per_second'] / 1e9:.0f}", *cells, f"{ratio:.2f}" if ratio else "-",
        )  # fmt: skip
    console.print(made)
    contest.print_notes(document, ratios, _name)


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['batch']} x {row['seqlen_k']}"
