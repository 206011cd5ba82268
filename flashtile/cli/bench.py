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
from flashtile.cli.output import AsJson
from flashtile.cli.shape import Dtype, DtypeKv, DtypeKvOption, DtypeOption
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
    heads: contest.Heads = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", min=1, help="Sequences; with --keys, every pair of both is timed.")] = None,
    keys: Annotated[list[int] | None, typer.Option("--keys", min=1, help="Keys a sequence; repeatable.")] = None,
    head_dim: contest.HeadDim = 128,
    dtype: DtypeOption = Dtype.bfloat16,
    dtype_kv: DtypeKvOption = None,
    device: RunDevice = "auto",
    peers: contest.Peers = True,
    seed: contest.Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Time decode (one query a sequence) on a grid of problems, peers beside it; each result is checked first."""
    where = pick_device(device)
    sizes = _grid(where, heads, batch, keys)
    stored = None if dtype_kv is None else _STORED[dtype_kv]
    bench_one = lambda size: _bench_one(size, head_dim, dtype.torch, stored, where, peers and stored is None, seed)  # noqa: E731
    dtypes = dtype.value if dtype_kv is None else f"{dtype.value} over {dtype_kv.value}"
    contest.run("decode", sizes, bench_one, where, dtypes, head_dim, _COLUMNS, as_json)


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


def _name(row: Mapping[str, Any]) -> str:
    return str(Size(row["batch"], row["seqlen_k"], row["num_heads_q"], row["num_heads_kv"]))


_COLUMNS: dict[str, contest.Cell] = {
    "batch x keys, heads": _name, "tile": lambda row: str(row["plan"]["block_m"]), "splits": lambda row: str(row["plan"]["num_splits"]),
    "error": contest.error_cell, "flashtile": contest.own_time, "GB/s": lambda row: f"{row['bytes_per_second'] / 1e9:.0f}",
}  # fmt: skip
