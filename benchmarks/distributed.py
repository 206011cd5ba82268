"""Attention over the GPUs of a host against one of them, in one run: ``torchrun --nproc-per-node 2 -m benchmarks.distributed``.

Protocol: rank 0 computes the whole alone while the others wait; then all compute it together. The two take turns, several rounds; a
round is some calls back to back behind a barrier, by GPU events, and the slowest rank counts. Medians. Before any of it every rank's
part of the result is held against the whole's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

import flashtile
from benchmarks.record import Record, heading
from flashtile import distributed as parallel
from flashtile.distributed import CacheShards, Link, SequenceShards, Workload, choose
from flashtile.distributed.groups import members_of
from flashtile.distributed.transport import Flight, gather
from flashtile.planner.device import Device
from flashtile.testing.tolerance import relative_l2

PROTOCOL = " ".join((__doc__ or "").split("Protocol: ")[1].split())
LIMIT = {torch.bfloat16: 1e-2, torch.float32: 1e-4}  # relative L2 between two exact results, each rounded on its way
Call = Callable[[], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Problem:
    """``kind`` is decode, prefill or training; ``seqlen`` of each of ``batch`` sequences; ``target`` is the speed-up asked of two ranks."""

    name: str
    kind: str
    batch: int
    seqlen: int
    heads_q: int
    heads_kv: int
    target: float
    method: str = "ring"
    head_dim: int = 128
    interleave: int | None = None


PROBLEMS = (
    Problem("decode 1 x 1,048,576 keys", "decode", 1, 1 << 20, 32, 8, 1.85),
    Problem("decode 16 x 65,536 keys", "decode", 16, 1 << 16, 32, 8, 1.8),
    Problem("decode 16 x 65,536 keys, runs of 64 go round", "decode", 16, 1 << 16, 32, 8, 1.8, interleave=64),
    Problem("causal prefill of 131,072 tokens", "prefill", 1, 1 << 17, 16, 16, 1.85),
    Problem("causal prefill of 131,072 tokens, heads by all-to-all", "prefill", 1, 1 << 17, 16, 16, 1.85, "ulysses"),
    Problem("forward and backward of 65,536 tokens", "training", 1, 1 << 16, 16, 16, 1.8),
    Problem("forward and backward of 65,536 tokens, heads by all-to-all", "training", 1, 1 << 16, 16, 16, 1.8, "ulysses"),
)


def main(
    out: Annotated[Path, typer.Option(help="The JSON file.")] = Path("benchmarks/results/distributed.json"),
    only: Annotated[str, typer.Option(help="Only problems whose name contains this.")] = "",
    rounds: Annotated[int, typer.Option(help="Turns of each way.")] = 7,
    commit: Annotated[str, typer.Option(help="The commit measured, where there is no git.")] = "",
    dry_run: Annotated[bool, typer.Option(help="Shrink every problem and use the CPU, to try the script itself.")] = False,
) -> None:
    """Checks and times every problem; rank 0 prints and writes."""
    device = _begin(dry_run)
    rank, size = dist.get_rank(), dist.get_world_size()
    head = heading("distributed", device, commit, PROTOCOL, {}) | {"num_ranks": size, "backend": dist.get_backend()}
    record = Record(out, head)
    link = measured_link(device, dry_run)
    for problem in PROBLEMS:
        if only in problem.name:
            entry = measure(shrunk(problem) if dry_run else problem, device, link, rounds)
            if rank == 0:
                record.add(entry)
                print(
                    f"{entry['name']}: {entry['alone_us']:.1f} us alone, {entry['together_us']:.1f} us on {size}: "
                    f"{entry['speedup']:.3f}x (asked of 2: {problem.target}); the paper says {entry['paper_speedup']:.3f}x",
                    flush=True,
                )
    dist.destroy_process_group()


def measure(problem: Problem, device: torch.device, link: Link, rounds: int) -> dict[str, Any]:
    """One problem: checked, then timed alone and together in turn."""
    alone, together, error = prepare(problem, device)
    calls = 10 if problem.kind == "decode" else 1
    samples: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for way, times in zip((alone, together), samples):
            seconds = clocked(way if way is together or dist.get_rank() == 0 else None, calls, device)
            if turn:  # the first turn only warms up
                times.append(seconds * 1e6)
    alone_us, together_us = (statistics.median(times) for times in samples)
    return asdict(problem) | {
        "alone_us": alone_us, "together_us": together_us, "speedup": alone_us / together_us, "samples_us": samples, "error": error,
        "paper_speedup": paper_speedup(problem, link), "link": asdict(link),
    }  # fmt: skip


def clocked(call: Call | None, calls: int, device: torch.device) -> float:
    """Seconds of one call, of the rank that took longest; a rank without a call waits."""
    dist.barrier()
    start = time.perf_counter()
    seconds = 0.0
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        events[0].record()
        for _ in range(calls if call else 0):
            call()  # type: ignore[misc]
        events[1].record()
        torch.cuda.synchronize()
        seconds = events[0].elapsed_time(events[1]) * 1e-3
    else:
        for _ in range(calls if call else 0):
            call()  # type: ignore[misc]
        seconds = time.perf_counter() - start
    slowest = torch.tensor([seconds / calls if call else 0.0], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def prepare(problem: Problem, device: torch.device) -> tuple[Call, Call, float]:
    """The call on the whole, this rank's call, and the latter's relative L2 error; raises where that is too much."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    queries = 1 if problem.kind == "decode" else problem.seqlen
    q = torch.randn(problem.batch, queries, problem.heads_q, problem.head_dim, device=device, dtype=dtype)
    k, v = (torch.randn(problem.batch, problem.seqlen, problem.heads_kv, problem.head_dim, device=device, dtype=dtype) for _ in "kv")
    make = _decode if problem.kind == "decode" else _attention
    alone, together, part = make(problem, q, k, v)
    expected = tuple(part(index, x) for index, x in enumerate(alone()))
    worst = torch.tensor([max(relative_l2(found, wanted) for found, wanted in zip(together(), expected))], device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    error = float(worst)
    if not error <= LIMIT[dtype]:
        raise AssertionError(f"{problem.name}: a rank is {error:.3g} off")
    return alone, together, error


def _decode(
    problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[Call, Call, Callable[[int, torch.Tensor], torch.Tensor]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    lengths = torch.full((problem.batch,), problem.seqlen, dtype=torch.int32, device=q.device)
    shards = CacheShards(size, problem.interleave)
    positions = shards.positions(rank, problem.seqlen // size, q.device)
    k_here, v_here = k[:, positions], v[:, positions]
    parallel.decode(q, k_here, v_here, lengths, shards)  # compared once, and not while the clock runs
    return (
        lambda: (flashtile.decode(q, k, v, lengths),),
        lambda: (parallel.decode(q, k_here, v_here, lengths, shards, check=False),),
        lambda _, whole: whole,
    )


def _attention(
    problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[Call, Call, Callable[[int, torch.Tensor], torch.Tensor]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    shards = SequenceShards.dense(problem.seqlen, size)
    training = problem.kind == "training"
    dout = torch.randn_like(q)
    whole = [x.requires_grad_(training) for x in (q, k, v)]
    here = [shards.shard(x.detach(), rank).requires_grad_(training) for x in whole]
    dout_here = shards.shard(dout, rank)

    def alone() -> tuple[torch.Tensor, ...]:
        out = flashtile.attention(*whole, causal=True)
        return (out.detach(), *torch.autograd.grad(out, whole, dout)) if training else (out,)

    def together() -> tuple[torch.Tensor, ...]:
        out = parallel.attention(here[0], here[1], here[2], shards, causal=True, method=problem.method, check=False)
        return (out.detach(), *torch.autograd.grad(out, here, dout_here)) if training else (out,)

    return alone, together, lambda _, x: shards.shard(x, rank)


def paper_speedup(problem: Problem, link: Link) -> float:
    """What the paper model expects of this many ranks over a link of this speed."""
    size = dist.get_world_size()
    device = Device.named("h200")
    if problem.kind == "decode":
        num_bytes = 2.0 * problem.batch * problem.seqlen * problem.heads_kv * problem.head_dim * 2
        return parallel.decode_speedup(num_bytes, problem.batch, problem.heads_q, problem.head_dim, size, link, device)
    work = Workload(
        size, problem.heads_q, problem.heads_kv, (problem.seqlen,), batch=problem.batch, head_dim=problem.head_dim,
        training=problem.kind == "training",
    )  # fmt: skip
    return next(estimate.speedup for estimate in choose(work, link, device).estimates if estimate.method == problem.method)


def measured_link(device: torch.device, dry_run: bool) -> Link:
    """What this host's ring reaches: one large transfer for the rate, small gathers for the latency."""
    members = members_of()
    x = torch.zeros((1 << 16) if dry_run else (1 << 28), dtype=torch.uint8, device=device)
    room, small = torch.empty_like(x), torch.zeros(64, device=device)

    def send() -> tuple[torch.Tensor, ...]:
        Flight((x,), (room,), members, "a measured transfer").land()
        return ()

    def all_gather() -> tuple[torch.Tensor, ...]:
        return (gather(small, members, "a measured gather"),)

    for call in (send, all_gather):
        clocked(call, 3, device)
    return Link("measured", x.numel() / clocked(send, 5, device), clocked(all_gather, 20, device))


def shrunk(problem: Problem) -> Problem:
    """Small enough for a try without GPUs."""
    return Problem(**asdict(problem) | {"seqlen": 512 * dist.get_world_size(), "head_dim": 16})


def _begin(dry_run: bool) -> torch.device:
    if dry_run:
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
        return torch.device("cpu")
    import os

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))  # torchrun sets it
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


if __name__ == "__main__":
    typer.run(main)
