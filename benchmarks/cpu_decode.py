"""The CPU engine beside torch's scaled_dot_product_attention: checked first, then timed in turn.

    python -m benchmarks.cpu_decode                    the whole grid, some minutes
    python -m benchmarks.cpu_decode --only bfloat16    problems whose name contains the text

Writes benchmarks/results/cpu_decode.json. Times are of calls that alternate with the peer's in one process:
the median, and the fastest tenth, which other load on the machine blurs less; the speedup is that of the medians. The
peer gets its mask ready made. Targets: at least 0.95x wherever the peer takes 100 us or more, and at
least 5x on bfloat16, heads 32/8, 1 x 4096.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track

import flashtile
from benchmarks.cpu_timing import in_turn, machine, report
from flashtile import reference
from flashtile.band import Band
from flashtile.testing.tolerance import assert_close

RESULTS = Path(__file__).parent / "results" / "cpu_decode.json"
MAX_CACHE_BYTES = 300 << 20


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
    report("CPU decode", rows)


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


if __name__ == "__main__":
    main()
