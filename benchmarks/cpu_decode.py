"""The CPU engine beside torch's scaled_dot_product_attention: checked first, then timed in turn.

    python benchmarks/cpu_decode.py                    the whole grid, some minutes
    python benchmarks/cpu_decode.py --only bfloat16    problems whose name contains the text

Writes benchmarks/results/cpu_decode.json. Times are of calls that alternate with the peer's in one process:
the median, and the fastest tenth, which other load on the machine blurs less; the speedup is that of the medians. The
peer gets its mask ready made. Targets: at least 0.95x wherever the peer takes 100 us or more, and at
least 5x on bfloat16, heads 32/8, 1 x 4096.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table

import flashtile
from flashtile import reference
from flashtile.band import Band
from flashtile.testing.tolerance import assert_close

RESULTS = Path(__file__).parent / "results" / "cpu_decode.json"
MAX_CACHE_BYTES = 300 << 20
WORTH_COMPARING_US = 100.0
TARGET = 0.95


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


def measure(shape: Shape, seconds: float) -> dict[str, Any]:
    """Checks one problem against the reference, then times both sides."""
    dtype = getattr(torch, shape.dtype)
    rng = torch.Generator().manual_seed(0)
    (heads_q, heads_kv), dim = shape.heads, shape.head_dim
    q = torch.randn(shape.batch, shape.seqlen_q, heads_q, dim, generator=rng).to(dtype)
    k, v = (torch.randn(shape.batch, shape.seqlen_k, heads_kv, dim, generator=rng).to(dtype) for _ in range(2))
    seqlens_k = torch.full((shape.batch,), shape.seqlen_k, dtype=torch.int32)
    ours = partial(flashtile.decode, q, k, v, seqlens_k, causal=shape.causal)
    peer = _peer(q, k, v, shape.causal)
    expected, _ = reference.decode(q[:1], k[:1], v[:1], seqlens_k[:1], causal=shape.causal, dtype=torch.float32)
    assert_close(ours()[:1], None, expected, None, what=shape.name)
    (ours_us, ours_fast), (peer_us, peer_fast) = in_turn(ours, peer, seconds)
    return {
        "name": shape.name, **asdict(shape), "flashtile_us": ours_us, "sdpa_us": peer_us, "speedup": peer_us / ours_us,
        "flashtile_fastest_tenth_us": ours_fast, "sdpa_fastest_tenth_us": peer_fast, "speedup_fastest_tenth": peer_fast / ours_fast,
    }  # fmt: skip


def _peer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Callable[[], torch.Tensor]:
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    mask = Band.of(causal).dense(seqlen_q, seqlen_k) if causal and seqlen_q > 1 else None
    gqa = q.shape[2] != k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)


def in_turn(ours: Callable[[], torch.Tensor], peer: Callable[[], torch.Tensor], seconds: float) -> list[tuple[float, float]]:
    """Median and fastest tenth, in microseconds, of calls that alternate for about ``seconds``, at least five of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for call in (ours, peer):
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for taken, call in zip(times, (ours, peer)):
            start = time.perf_counter()
            call()
            taken.append((time.perf_counter() - start) * 1e6)
    return [(statistics.median(taken), sorted(taken)[len(taken) // 10]) for taken in times]


def machine() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),  # processes that wanted a core, this one's threads included: far above the threads, medians mean little
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


def report(rows: list[dict[str, Any]]) -> None:
    """A table, and how many problems miss the target by the median and by the fastest tenth."""
    table = Table("problem", "flashtile us", "SDPA us", "speedup", "fastest tenth", title="CPU decode")
    compared = [row for row in rows if row["sdpa_fastest_tenth_us"] >= WORTH_COMPARING_US]
    for row in rows:
        style = "red" if row in compared and row["speedup"] < TARGET else None
        times = f"{row['flashtile_us']:.0f}", f"{row['sdpa_us']:.0f}"
        table.add_row(row["name"], *times, f"{row['speedup']:.2f}x", f"{row['speedup_fastest_tenth']:.2f}x", style=style)
    console = Console()
    console.print(table)
    for key in ("speedup", "speedup_fastest_tenth") if compared else ():
        mean = math.exp(statistics.fmean(math.log(row[key]) for row in compared))
        missed = sum(row[key] < TARGET for row in compared)
        console.print(f"{key}: {len(compared)} problems of {WORTH_COMPARING_US:.0f} us or more, mean {mean:.2f}x, {missed} below {TARGET}x")


if __name__ == "__main__":
    main()
