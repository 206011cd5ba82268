"""The green check of gradients: of some sequences and key heads, computed anew in float64, all queries and keys of them."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch

from benchmarks.backward_sets import BackwardSets
from benchmarks.refusals import WrongResult
from flashtile.testing.head_gradients import GRADIENT_LIMITS, HeadGradients, head_gradients
from flashtile.testing.tolerance import relative_l2

PEERS_FACTOR = 1.5  # peers round where they like, and add dQ in any order


class Expected(NamedTuple):
    """Right gradients of key head ``head`` of sequence ``b`` and the query heads that share it."""

    b: int
    head: int
    grads: HeadGradients


class GradientOracle:
    """What the gradients of input set 0 should be: first and last sequence, the longest and the shortest, a key head of each."""

    def __init__(self, sets: BackwardSets) -> None:
        self.sets = sets
        lengths, last, heads = sets.shape.seqlens_q, sets.shape.batch - 1, sets.shape.num_heads_kv
        middle = heads // 2
        wanted = ((0, 0), (last, heads - 1), (lengths.index(max(lengths)), middle), (lengths.index(min(lengths)), middle))
        self.expected = [self._gradients(b, head) for b, head in dict.fromkeys(wanted)]

    def error(self, result: Any) -> float:
        """The worst relative L2 error of a peer's (dq, dk, dv); raises WrongResult beyond the limit, or where an element is not finite."""
        return self._worst(result, PEERS_FACTOR * GRADIENT_LIMITS[self.sets.dtype])

    def exact(self, result: Any) -> float:
        """The same for flashtile's own gradients, with a narrower limit."""
        return self._worst(result, GRADIENT_LIMITS[self.sets.dtype])

    def _worst(self, result: Any, limit: float) -> float:
        worst = 0.0
        grads = dict(zip(("dq", "dk", "dv"), result))
        for name, grad in grads.items():
            bad = ~grad.isfinite()
            if bad.any():
                raise WrongResult(f"{name} has {int(bad.sum())} elements NaN or infinite, the first at {bad.nonzero()[0].tolist()}")
        for expected in self.expected:
            for name, grad in grads.items():
                error = relative_l2(self._part(grad, expected, name), getattr(expected.grads, name))
                if not error <= limit:
                    where = f"{name}, sequence {expected.b}, key head {expected.head}"
                    raise WrongResult(f"relative L2 error {error:.3g} of {where}; the limit is {limit:.3g}")
                worst = max(worst, error)
        return worst

    def _part(self, grad: torch.Tensor, expected: Expected, name: str) -> torch.Tensor:
        """The piece of ``grad`` that ``expected`` has."""
        rows = self._sequence(grad, expected.b, self.sets.shape.seqlens_q if name == "dq" else self.sets.shape.seqlens_k)
        if name != "dq":
            return rows[:, expected.head]
        return rows[:, self._group(expected.head)]

    def _group(self, head: int) -> slice:
        group = self.sets.shape.num_heads_q // self.sets.shape.num_heads_kv
        return slice(head * group, (head + 1) * group)

    def _sequence(self, tensor: torch.Tensor, b: int, lengths: tuple[int, ...]) -> torch.Tensor:
        """Sequence ``b`` of a batch or of packed rows: (its length, heads, dim)."""
        if not self.sets.shape.packed:
            return tensor[b]
        start = list(accumulate(lengths, initial=0))[b]
        return tensor[start : start + lengths[b]]

    def _gradients(self, b: int, head: int) -> Expected:
        shape, sets = self.sets.shape, self.sets
        q, dout = (self._sequence(tensors[0], b, shape.seqlens_q)[:, self._group(head)] for tensors in (sets.q, sets.dout))
        k, v = (tensor[:, head] for tensor in sets.keys_of(0, b))
        return Expected(b, head, head_gradients(q, k, v, dout, shape.band, sets.scale))
