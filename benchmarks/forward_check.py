"""The green check of forward results: rows drawn at random for every sequence and head, computed anew in float64."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch

from benchmarks.check import LIMITS
from benchmarks.forward_sets import InputSets
from benchmarks.refusals import WrongResult
from flashtile.testing.tolerance import assert_close, relative_l2

ROWS = 64
SCORE_ERROR = 2e-6  # of a score, a unit: what float32 leaves of large ones


class Expected(NamedTuple):
    """Right results of sampled rows: ``rows`` and ``heads`` (n,) index packed queries; out (n, dv), lse (n,) float64."""

    rows: torch.Tensor
    heads: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


class Oracle:
    """What sampled rows of input set 0 should be: at most 64 queries for every sequence and head, its first and last among them."""

    def __init__(self, sets: InputSets, seed: int = 0) -> None:
        self.sets = sets
        self.generator = torch.Generator(device=sets.device).manual_seed(seed)
        parts = [self._sequence(b, start) for b, start in enumerate(accumulate(sets.shape.seqlens_q[:-1], initial=0))]
        self.expected = Expected(*(torch.cat(column) for column in zip(*parts)))
        finite = self.expected.lse[self.expected.lse.isfinite()]
        self.largest = finite.abs().max().item() if finite.numel() else 1.0

    def _sequence(self, b: int, start: int) -> Expected:
        shape, device = self.sets.shape, self.sets.device
        seqlen_q, seqlen_k, heads = shape.seqlens_q[b], shape.seqlens_k[b], shape.num_heads_q
        count = min(ROWS, seqlen_q)
        rows = torch.randint(seqlen_q, (heads, count), device=device, generator=self.generator)
        rows[:, 0], rows[:, -1] = 0, seqlen_q - 1
        every = torch.arange(heads, device=device)[:, None].expand(heads, count)
        q = self.sets.flat_q(0)[start + rows, every].double()
        k, v = (t.double().transpose(0, 1) for t in self.sets.keys_of(0, b))
        group = heads // shape.num_heads_kv
        # (hk, group * count, seqlen_k)
        scores = q.view(shape.num_heads_kv, group * count, -1) @ k.transpose(1, 2) * self.sets.scale
        distance = torch.arange(seqlen_k, device=device) - rows.view(shape.num_heads_kv, group * count, 1) - (seqlen_k - seqlen_q)
        band = shape.band
        if band.left is not None:
            scores.masked_fill_(distance < -band.left, float("-inf"))
        if band.right is not None:
            scores.masked_fill_(distance > band.right, float("-inf"))
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp_().nan_to_num_(0.0)
        return Expected((start + rows).flatten(), every.flatten(), (weights @ v).reshape(heads * count, -1), lse.flatten())

    def error(self, result: Any) -> float:
        """The relative L2 error of a peer's ``out``, or of the first of several results; raises WrongResult beyond the limit."""
        out = self._rows(result)
        error = relative_l2(out, self.expected.out)
        limit = LIMITS[self.sets.dtype] + SCORE_ERROR * max(1.0, self.largest)
        if not error <= limit:
            raise WrongResult(f"relative L2 error {error:.3g} of {len(out)} rows; the limit is {limit:.3g}")
        return error

    def exact(self, result: tuple[torch.Tensor, torch.Tensor]) -> float:
        """The same for flashtile's own (out, lse), held to the tests' tolerance in every element, lse included."""
        out, lse = self._rows(result), result[1]
        lse = lse if self.sets.shape.packed else lse.transpose(0, 1).flatten(1)  # (hq, total_q)
        picked = lse[self.expected.heads, self.expected.rows]
        on_cpu = self.sets.device.type == "cpu"
        try:
            assert_close(out, picked, self.expected.out, self.expected.lse, dtype=self.sets.dtype, cpu_engine=on_cpu)
        except AssertionError as error:
            raise WrongResult(str(error)) from None
        if lse.isnan().any():
            raise WrongResult(f"lse has {int(lse.isnan().sum())} NaN")
        return relative_l2(out, self.expected.out)

    def _rows(self, result: Any) -> torch.Tensor:
        """The sampled rows of ``out``; raises WrongResult where a row anywhere was not written, or not finite."""
        out = result if isinstance(result, torch.Tensor) else result[0]
        out = out.reshape(-1, *out.shape[-2:])
        bad = ~out.isfinite()
        if bad.any():
            where = bad.nonzero()[0].tolist()
            raise WrongResult(f"out has {int(bad.sum())} elements NaN or infinite, the first at {where} (row, head, feature)")
        return out[self.expected.rows, self.expected.heads]
