"""The CPU engine's forward beside torch's scaled_dot_product_attention: checked first, then timed in turn.

    python -m benchmarks.cpu_forward                    the whole grid, some minutes
    python -m benchmarks.cpu_forward --only bfloat16    problems whose name contains the text

Writes benchmarks/results/cpu_forward.json, with times as in benchmarks/cpu_decode.py. The peer gets its mask ready made where
queries are fewer than keys, since its own causal mask is another there. Target: at least 0.95x at 1 x 1024 tokens, 8 heads of 128.
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

RESULTS = Path(__file__).parent / "results" / "cpu_forward.json"


@dataclass(frozen=True)
class Shape:
    """One problem: heads are (query heads, key heads), dims those of keys and values."""

    dtype: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    causal: bool
    heads: tuple[int, int] = (8, 8)
    dims: tuple[int, int] = (128, 128)

    @property
    def name(self) -> str:
        dims = "x".join(str(dim) for dim in sorted(set(self.dims), reverse=True))
        kind = "causal" if self.causal else "full"
        return f"{self.dtype} {self.heads[0]}/{self.heads[1]} d{dims} {kind} {self.batch} x {self.seqlen_q} on {self.seqlen_k}"


def grid() -> Iterator[Shape]:
    """The target's problem; lengths and batches; grouped heads; chunks of queries on more keys; other head dims."""
    for dtype in ("bfloat16", "float32", "float16"):
        for causal in (False, True):
            yield Shape(dtype, 1, 1024, 1024, causal)
            for batch, seqlen in ((16, 64), (4, 256), (1, 4096)):
                yield Shape(dtype, batch, seqlen, seqlen, causal)
            yield Shape(dtype, 1, 1024, 1024, causal, heads=(32, 8))
            yield Shape(dtype, 16, 32, 32, causal, heads=(32, 8))
            yield Shape(dtype, 1, 256, 4096, causal)
            yield Shape(dtype, 4, 8, 1024, causal, heads=(32, 8))
            for dims in ((64, 64), (256, 256), (192, 128)):
                yield Shape(dtype, 1, 1024, 1024, causal, dims=dims)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="Problems whose name contains this text.")
    parser.add_argument("--seconds", type=float, default=2.0, help="Time for one problem, both sides together.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="Where the JSON goes.")
    options = parser.parse_args()
    shapes = [shape for shape in grid() if options.only in shape.name]
    rows = [measure(shape, options.seconds) for shape in track(shapes, description="timing", console=Console(stderr=True))]
    options.output.write_text(json.dumps({"machine": machine(), "problems": rows}, indent=1) + "\n")
    report("CPU forward", rows)


def measure(shape: Shape, seconds: float) -> dict[str, Any]:
    """Checks one problem against the reference, then times both sides."""
    rng = torch.Generator().manual_seed(0)
    sizes = (shape.seqlen_q, shape.heads[0], shape.dims[0]), (shape.seqlen_k, shape.heads[1], shape.dims[0])
    q, k, v = (
        torch.randn(shape.batch, *size, generator=rng).to(getattr(torch, shape.dtype)) for size in (*sizes, (*sizes[1][:2], shape.dims[1]))
    )
    ours = partial(flashtile.attention, q, k, v, causal=shape.causal)
    expected, _ = reference.attention(q[:1], k[:1], v[:1], band=Band.of(shape.causal), dtype=torch.float32)
    assert_close(ours()[:1], None, expected, None, what=shape.name)
    (ours_us, ours_fast), (peer_us, peer_fast) = in_turn(ours, _peer(q, k, v, shape.causal), seconds)
    return {
        "name": shape.name, **asdict(shape), "flashtile_us": ours_us, "sdpa_us": peer_us, "speedup": peer_us / ours_us,
        "flashtile_fastest_tenth_us": ours_fast, "sdpa_fastest_tenth_us": peer_fast, "speedup_fastest_tenth": peer_fast / ours_fast,
    }  # fmt: skip


def _peer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Callable[[], torch.Tensor]:
    square = q.shape[1] == k.shape[1]
    mask = Band.of(causal).dense(q.shape[1], k.shape[1]) if causal and not square else None
    gqa = q.shape[2] != k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and square, enable_gqa=gqa)


if __name__ == "__main__":
    main()
