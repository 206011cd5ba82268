"""The CPU engine beside torch's scaled_dot_product_attention: checked first, then timed in turn.

    python benchmarks/cpu_decode.py                    the whole grid, some minutes
    python benchmarks/cpu_decode.py --only bfloat16    problems whose name contains the text

Writes benchmarks/results/cpu_decode.json. A time is the median of calls that alternate with the peer's, in one
process; the peer gets its mask ready made. Targets: at least 0.95x wherever the peer takes 100 us or more, and at
least 5x on bfloat16, heads 32/8, 1 x 4096.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table

from flashtile import reference
from flashtile.band import Band
from flashtile.kernels.call import DecodeCall
from flashtile.kernels.cpu import bind
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem
from flashtile.testing.tolerance import assert_close

RESULTS = Path(__file__).parent / "results" / "cpu_decode.json"
MAX_CACHE_BYTES = 300 << 20
WORTH_COMPARING_US = 100.0


@dataclass(frozen=True)
class Shape:
    """One problem: heads are (query heads, key heads)."""

    dtype: str
    batch: int
    seqlen_k: int
    heads: tuple[int, int]
    head_dim: int = 128
    seqlen_q: int = 1
    causal: bool = True

    @property
    def name(self) -> str:
        queries = f"q{self.seqlen_q}{'' if self.causal or self.seqlen_q == 1 else ' full'}"
        return f"{self.dtype} {self.heads[0]}/{self.heads[1]} d{self.head_dim} {queries} {self.batch} x {self.seqlen_k}"

    @property
    def cache_bytes(self) -> int:
        size = 4 if self.dtype == "float32" else 2
        return 2 * self.batch * self.seqlen_k * self.heads[1] * self.head_dim * size


def grid() -> Iterator[Shape]:
    """Batches, lengths, heads, dtypes; then speculative queries; then other head dims."""
    for dtype in ("bfloat16", "float16", "float32"):
        for heads in ((32, 8), (32, 32), (16, 1)):
            for batch in (1, 4, 16):
                for seqlen_k in (128, 777, 4096, 16384):
                    yield Shape(dtype, batch, seqlen_k, heads)
            for causal in (True, False):
                for batch, seqlen_k in ((1, 128), (1, 4096), (4, 1024)):
                    yield Shape(dtype, batch, seqlen_k, heads, seqlen_q=4, causal=causal)
            for head_dim in (64, 256):
                for batch, seqlen_k in ((1, 512), (1, 4096), (4, 1024)):
                    yield Shape(dtype, batch, seqlen_k, heads, head_dim)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="Problems whose name contains this text.")
    parser.add_argument("--seconds", type=float, default=0.4, help="Time for one problem, both sides together.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="Where the JSON goes.")
    options = parser.parse_args()
    shapes = [s for s in grid() if s.cache_bytes <= MAX_CACHE_BYTES and options.only in s.name]
    rows = [measure(shape, options.seconds) for shape in track(shapes, description="timing", console=Console(stderr=True))]
    options.output.write_text(json.dumps({"machine": machine(), "problems": rows}, indent=1) + "\n")
    report(rows)


def measure(shape: Shape, seconds: float) -> dict[str, object]:
    """Checks one problem against the reference, then times both sides."""
    dtype = getattr(torch, shape.dtype)
    rng = torch.Generator().manual_seed(0)
    (heads_q, heads_kv), dim = shape.heads, shape.head_dim
    q = torch.randn(shape.batch, shape.seqlen_q, heads_q, dim, generator=rng).to(dtype)
    k, v = (torch.randn(shape.batch, shape.seqlen_k, heads_kv, dim, generator=rng).to(dtype) for _ in range(2))
    seqlens_k = torch.full((shape.batch,), shape.seqlen_k, dtype=torch.int32)
    ours = _engine(q, k, v, seqlens_k, shape.causal)
    peer = _peer(q, k, v, shape.causal)
    expected, _ = reference.decode(q[:1], k[:1], v[:1], seqlens_k[:1], causal=shape.causal, dtype=torch.float32)
    assert_close(ours()[:1], None, expected, None, what=shape.name)
    ours_us, peer_us = in_turn(ours, peer, seconds)
    return {"name": shape.name, **asdict(shape), "flashtile_us": ours_us, "sdpa_us": peer_us, "speedup": peer_us / ours_us}


def _engine(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seqlens_k: torch.Tensor, causal: bool) -> Callable[[], torch.Tensor]:
    run = bind(Problem.decode(q, k, v, seqlens_k, causal=causal), DecodePlan(kernel="cpu.decode", block_m=128), q.device)

    def decode() -> torch.Tensor:
        out = torch.empty_like(q)
        run(DecodeCall(q, k, v, seqlens_k, None, None, None, None, out, None, q.shape[-1] ** -0.5, 0.0))
        return out

    return decode


def _peer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Callable[[], torch.Tensor]:
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    mask = Band.of(causal).dense(seqlen_q, seqlen_k) if causal and seqlen_q > 1 else None
    gqa = q.shape[2] != k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)


def in_turn(ours: Callable[[], torch.Tensor], peer: Callable[[], torch.Tensor], seconds: float) -> tuple[float, float]:
    """Medians in microseconds of calls that alternate for about ``seconds``, at least five of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for call in (ours, peer):
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for taken, call in zip(times, (ours, peer)):
            start = time.perf_counter()
            call()
            taken.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times[0]), statistics.median(times[1])


def machine() -> dict[str, object]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    )
    return names[0] if names else platform.processor()


def report(rows: list[dict[str, object]]) -> None:
    table = Table("problem", "flashtile us", "SDPA us", "speedup", title="CPU decode")
    for row in rows:
        speedup = float(str(row["speedup"]))
        style = "red" if speedup < 0.95 and float(str(row["sdpa_us"])) >= WORTH_COMPARING_US else None
        table.add_row(str(row["name"]), f"{row['flashtile_us']:.0f}", f"{row['sdpa_us']:.0f}", f"{speedup:.2f}x", style=style)
    compared = [float(str(row["speedup"])) for row in rows if float(str(row["sdpa_us"])) >= WORTH_COMPARING_US]
    console = Console()
    console.print(table)
    if compared:
        mean = math.exp(statistics.fmean(map(math.log, compared)))
        missed = sum(speedup < 0.95 for speedup in compared)
        console.print(f"{len(compared)} problems of {WORTH_COMPARING_US:.0f} us or more: geometric mean {mean:.2f}x, {missed} below 0.95x")


if __name__ == "__main__":
    main()
