"""Tensors of a study's point: rotating sets, so that a call never finds its keys in the L2 cache, and what they should give."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch

import flashtile
from flashtile import reference
from flashtile.planner.plans import DecodePlan
from flashtile.study.points import DTYPE, NUM_HEADS_KV, Point
from flashtile.testing.tolerance import relative_l2

COLD_BYTES = 400_000_000
MAX_SETS = 256
CHECKED_SEQUENCES = 3
LIMIT = 5e-3  # relative L2 error of bfloat16 results (testing/tolerance.py derives it)
QUANTISED_SPREAD = 20.0  # what values are multiplied by before they are quantised


class WrongResult(Exception):
    """A plan's result is off: says by how much and where."""


class Inputs:
    """``count`` sets of random tensors of one point: q[i] (b, seqlen_q, hq, d), k[i] and v[i] (b, keys, hk, d)."""

    def __init__(self, point: Point, device: torch.device, seed: int = 0) -> None:
        self.point, self.device = point, device
        self.count = num_sets(point, device)
        generator = torch.Generator(device=device).manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, dtype=getattr(torch, DTYPE), generator=generator)

        cache = (point.batch, point.keys, NUM_HEADS_KV, point.head_dim)
        self.q = [draw(point.batch, point.seqlen_q, NUM_HEADS_KV * point.group, point.head_dim) for _ in range(self.count)]
        self.k = [self._stored(draw(*cache)) for _ in range(self.count)]
        self.v = [self._stored(draw(*cache)) for _ in range(self.count)]
        self.scale = torch.full((1,), 1 / QUANTISED_SPREAD, device=device) if point.quantised else None
        self.seqlens_k = torch.full((point.batch,), point.keys, dtype=torch.int32, device=device)
        self._expected: list[tuple[int, torch.Tensor]] = []

    def args(self, i: int, sequences: slice = slice(None)) -> dict[str, Any]:
        """Keyword arguments of ``flashtile.decode`` for set ``i``, or of some of its sequences."""
        caches = {"k_cache": self.k[i][sequences], "v_cache": self.v[i][sequences]}
        scales = {} if self.scale is None else {"k_scale": self.scale, "v_scale": self.scale}
        return {"q": self.q[i][sequences], **caches, "seqlens_k": self.seqlens_k[sequences], **scales}

    def check(self, plan: DecodePlan) -> float:
        """The worst relative L2 error of a plan on set 0, into an ``out`` full of NaN; raises WrongResult beyond the limit."""
        out = torch.full_like(self.q[0], float("nan"))
        flashtile.decode(**self.args(0), plan=plan, out=out)
        return self.error(out)

    def error(self, out: torch.Tensor) -> float:
        """The worst relative L2 error of any checked sequence of set 0; raises WrongResult beyond the limit, and for NaN."""
        worst = 0.0
        for sequence, expected in self._expectations():
            error = relative_l2(out[sequence].float(), expected)
            if not error <= LIMIT:
                raise WrongResult(f"relative L2 error {error:.3g} in sequence {sequence}; the limit is {LIMIT}")
            worst = max(worst, error)
        return worst

    def _expectations(self) -> list[tuple[int, torch.Tensor]]:
        """The reference's results (float32) of the first, a middle and the last sequence of set 0."""
        if not self._expected:
            batch = self.point.batch
            for b in sorted({0, batch // 2, batch - 1})[:CHECKED_SEQUENCES]:
                out, _ = reference.decode(**self.args(0, slice(b, b + 1)), dtype=torch.float32)
                self._expected.append((b, out[0]))
        return self._expected

    def _stored(self, values: torch.Tensor) -> torch.Tensor:
        """Values of a size of about 1 as the cache has them."""
        return values.mul_(QUANTISED_SPREAD).to(getattr(torch, self.point.dtype_kv)) if self.point.quantised else values


def num_sets(point: Point, device: torch.device) -> int:
    """How many sets make a round trip longer than four L2 caches (and 400 MB); 1 on a CPU."""
    if device.type == "cpu":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MAX_SETS, ceil(max(COLD_BYTES, 4 * l2) / point.kv_bytes)))


def bytes_of(point: Point, device: torch.device) -> int:
    """Memory that the sets take, with room for drawing the last cache and for the reference of one sequence in float32."""
    drawn = point.kv_bytes if point.quantised else 0
    reference_bytes = 4 * point.keys * NUM_HEADS_KV * point.group * (2 * point.head_dim + 2 * point.seqlen_q)
    return point.kv_bytes * num_sets(point, device) + drawn + reference_bytes
