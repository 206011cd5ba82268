"""The green check that stands before and after every timing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.refusals import WrongResult
from benchmarks.sets import InputSets
from flashtile import reference
from flashtile.testing.tolerance import relative_l2

# relative L2 error of one sequence's out: what rounding to the dtype gives, twice (tolerance.py derives it)
LIMITS = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 2e-5}
MAX_SEQUENCES = 64


class Oracle:
    """The reference's results (float32) for input set 0, kept for every contestant of a problem."""

    def __init__(self, sets: InputSets) -> None:
        self.dtype = sets.dtype
        self.shape = tuple(sets.q[0].shape)
        batch = sets.entry.batch
        step = max(1, -(-batch // MAX_SEQUENCES))
        self.sequences = sorted({*range(0, batch, step), batch - 1}) if batch else []
        self.expected = [reference.decode(**sets.sequence(0, b), dtype=torch.float32)[0][0] for b in self.sequences]

    def error(self, out: torch.Tensor) -> float:
        """The worst relative L2 error of any checked sequence; raises WrongResult beyond the limit, or for a NaN."""
        if tuple(out.shape) != self.shape:
            raise WrongResult(f"out has shape {tuple(out.shape)}, expected {self.shape}")
        worst = 0.0
        for b, expected in zip(self.sequences, self.expected):
            error = relative_l2(out[b].float(), expected)
            if not error <= LIMITS[self.dtype]:
                raise WrongResult(f"relative L2 error {error:.3g} in sequence {b}; the limit is {LIMITS[self.dtype]:.3g}")
            worst = max(worst, error)
        return worst


def poisoned(call: Callable[[dict[str, Any]], Any], sets: InputSets) -> torch.Tensor:
    """Runs ``call`` (``flashtile.decode`` on keyword arguments) on set 0 into an ``out`` full of NaN."""
    out = torch.full_like(sets.q[0], float("nan"))
    call(sets.args(0) | {"out": out})
    return out
