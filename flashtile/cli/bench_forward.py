"""``flashtile bench forward``: attention with many queries timed on a grid of problems, with the peers that are installed beside it."""

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
from flashtile.cli.shape import Dtype, DtypeOption
from flashtile.planner.choose import plan_forward
from flashtile.planner.device import Device
from flashtile.planner.plans import ForwardPlan
from flashtile.problem import Problem
from flashtile.testing.forward_peers import PEERS, ForwardInputs
from flashtile.testing.tolerance import relative_l2

HEADS = {"cuda": "16/16", "cpu": "8/8"}
SIZES = {"cuda": ((16, 1024), (4, 4096), (1, 16384)), "cpu": ((1, 256), (1, 1024))}
Batch = Annotated[list[int] | None, typer.Option("--batch", min=1, help="Sequences; with --seqlen, every pair of both is timed.")]
Seqlen = Annotated[list[int] | None, typer.Option("--seqlen", min=1, help="Queries and keys a sequence; repeatable.")]
Causal = Annotated[bool | None, typer.Option("--causal/--full", help="One mask alone; both by default.")]
CHECKED_SCORES = 1 << 25  # of the first sequence's last queries: what fits in memory beside everything else


@dataclass(frozen=True)
class Size:
    batch: int
    seqlen: int
    num_heads_q: int
    num_heads_kv: int
    causal: bool

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        return f"{self.batch} x {self.seqlen}, {self.num_heads_q}/{self.num_heads_kv}, {mask}"

    @classmethod
    def name_of(cls, row: Mapping[str, Any]) -> str:
        """The size of a row of results, in words."""
        return str(cls(row["batch"], row["seqlen"], row["num_heads_q"], row["num_heads_kv"], row["causal"]))


def forward(
    heads: contest.Heads = None,
    batch: Batch = None,
    seqlen: Seqlen = None,
    head_dim: contest.HeadDim = 128,
    causal: Causal = None,
    dtype: DtypeOption = Dtype.bfloat16,
    device: RunDevice = "auto",
    peers: contest.Peers = True,
    seed: contest.Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Time attention (as many queries as keys) on a grid of problems, peers beside it; each result is checked first."""
    where = pick_device(device)
    sizes = sizes_of(where, heads, batch, seqlen, causal)
    bench_one = lambda size: _bench_one(size, head_dim, dtype.torch, where, peers, seed)  # noqa: E731
    contest.run("forward", sizes, bench_one, where, dtype.value, head_dim, columns("tile", _tile), as_json)


def sizes_of(
    device: torch.device, heads: list[str] | None, batch: list[int] | None, seqlen: list[int] | None, causal: bool | None
) -> list[Size]:
    """Every pair of what the options give, with each mask; the device's usual sizes where they give none."""
    pairs = [contest.parse_heads(text) for text in heads or [HEADS[device.type]]]
    sizes = list(SIZES[device.type])
    if batch or seqlen:
        sizes = [(b, n) for b in batch or [1] for n in seqlen or [1024]]
    masks = (True, False) if causal is None else (causal,)
    return [Size(b, n, hq, hk, mask) for hq, hk in pairs for mask in masks for b, n in sizes]


def _bench_one(size: Size, head_dim: int, dtype: torch.dtype, device: torch.device, with_peers: bool, seed: int) -> dict[str, Any]:
    heads = (size.num_heads_q, size.num_heads_kv)
    make = lambda number: ForwardInputs.random(  # noqa: E731
        size.batch, size.seqlen, heads, head_dim, size.causal, dtype, device, number
    )
    sets = contest.input_sets(make, lambda x: x.num_bytes, device, seed)
    first = sets[0]
    count, expected, expected_lse = _expected(first)
    plan = plan_forward(Problem.forward(first.q, first.k, first.v, causal=size.causal), Device.of(device))
    out, lse = flashtile.attention_with_lse(first.q, first.k, first.v, causal=size.causal)
    check = contest.verdict(out[:1, -count:], lse[:1, :, -count:], expected, expected_lse)
    able, refused = contest.able_peers(
        PEERS if with_peers else (), first, device, dtype, lambda result: relative_l2(result[:1, -count:], expected)
    )
    times = contest.timed({"flashtile": lambda x: flashtile.attention(x.q, x.k, x.v, causal=x.causal), **able}, sets, device)
    return {
        **asdict(size),
        "check": check,
        "error": relative_l2(out[:1, -count:], expected),
        "plan": _plan_facts(plan),
        "seconds": times,
        "tflops": first.flops / times["flashtile"] * 1e-12,
        "not_timed": refused,
    }


def _expected(x: ForwardInputs) -> tuple[int, torch.Tensor, torch.Tensor]:
    """The reference on the first sequence's last queries: a mask that ends at the last query and key is theirs too."""
    _, seqlen, heads, _ = x.q.shape
    count = max(1, min(seqlen, CHECKED_SCORES // (heads * seqlen)))
    return count, *reference.forward(x.q[:1, -count:], x.k[:1], x.v[:1], causal=x.causal)


def _plan_facts(plan: ForwardPlan) -> dict[str, Any]:
    return {"kernel": plan.kernel, "block_m": plan.block_m, "block_n": plan.block_n}


def columns(tiles: str, tile_of: contest.Cell) -> dict[str, contest.Cell]:
    """The table's own columns; the one called ``tiles`` has the plan's."""
    return {
        "batch x length, heads, mask": Size.name_of, tiles: tile_of, "error": contest.error_cell, "flashtile": contest.own_time,
        "TFLOP/s": lambda row: f"{row['tflops']:.3g}",
    }  # fmt: skip


def _tile(row: Mapping[str, Any]) -> str:
    return f"{row['plan']['block_m']} x {row['plan']['block_n']}"
