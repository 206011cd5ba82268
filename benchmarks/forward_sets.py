"""Input sets of one forward problem: so many that together they are larger than four L2 caches."""

from __future__ import annotations

from itertools import accumulate
from math import ceil, log
from typing import Any

import torch

import flashtile
from benchmarks.forward_grids import Shape
from benchmarks.timing import Contestant
from flashtile.problem import Problem

MAX_SETS = 64
KEYS_A_STEP = 128  # over which ``growth`` bits are added


def num_sets(shape: Shape, device: torch.device) -> int:
    """One set where it is larger than four L2 caches by itself: nothing of it is left when its next call begins."""
    if device.type == "cpu":
        return 2
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MAX_SETS, ceil(4 * l2 / max(1, shape.bytes_in))))


class InputSets:
    """``count`` sets of random inputs of one problem.

    q[i] (b, seqlen_q, hq, d), or (total_q, hq, d) where the problem is packed; k[i], v[i] (b, seqlen_k, hk, d | dv), or
    (total_k, hk, d | dv), or (pages, page_size, hk, d | dv) with ``page_table`` (b, max_pages). ``cu_seqlens_q``, ``cu_seqlens_k``
    (b + 1,) and ``seqused_k`` (b,) are int32; every library that knows packed sequences gets the same. Without ``real``, tensors are
    of a kind that has no values (meta tensors, fake ones).
    """

    def __init__(self, shape: Shape, device: torch.device, count: int = 1, seed: int = 0, real: bool = True) -> None:
        self.shape, self.device, self.count = shape, device, count
        self.dtype: torch.dtype = getattr(torch, shape.dtype)
        self.scale: float = shape.head_dim**-0.5
        self.generator = torch.Generator(device=device).manual_seed(seed) if real else None
        ints = lambda values: torch.tensor(list(values), device=device, dtype=torch.int32)  # noqa: E731
        self.cu_seqlens_q = ints(accumulate(shape.seqlens_q, initial=0))
        self.cu_seqlens_k = ints(accumulate(shape.seqlens_k, initial=0))
        self.seqused_k = ints(shape.seqlens_k)
        self.max_seqlen_q, self.max_seqlen_k = max(shape.seqlens_q), max(shape.seqlens_k)
        self.page_table = self._scattered_pages() if shape.page_size else None
        rows_q = (sum(shape.seqlens_q),) if shape.packed else (shape.batch, self.max_seqlen_q)
        q = self._draw((count, *rows_q, shape.num_heads_q, shape.head_dim))
        k = self._draw((count, *self._key_rows(), shape.num_heads_kv, shape.head_dim))
        v = self._draw((count, *self._key_rows(), shape.num_heads_kv, shape.head_dim_v))
        if shape.growth:
            self._let_scores_grow(q, k)
        self.q, self.k, self.v = q.unbind(0), k.unbind(0), v.unbind(0)

    def _key_rows(self) -> tuple[int, ...]:
        if self.page_table is not None:
            return self.page_table.numel(), self.shape.page_size
        return (sum(self.shape.seqlens_k),) if self.shape.varlen else (self.shape.batch, self.max_seqlen_k)

    def _draw(self, size: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(size, device=self.device, dtype=self.dtype, generator=self.generator)

    def _scattered_pages(self) -> torch.Tensor:
        """Pages in random order, as a cache has them after a while; every sequence has as many as the longest needs."""
        per_sequence = ceil(self.max_seqlen_k / self.shape.page_size)
        ids = torch.randperm(self.shape.batch * per_sequence, device=self.device, generator=self.generator)
        return ids.to(torch.int32).view(self.shape.batch, per_sequence)

    def _let_scores_grow(self, q: torch.Tensor, k: torch.Tensor) -> None:
        """One feature carries the key's position: the first of q is a constant, that of k rises in even key heads and falls in odd ones."""
        steps = self.max_seqlen_k / KEYS_A_STEP
        highest = self.shape.growth * log(2) * steps / self.scale  # what q0 * k0 reaches
        ramp = torch.linspace(0, highest**0.5, self.max_seqlen_k, device=self.device)
        q[..., 0] = highest**0.5
        k[..., 0::2, 0] = ramp[:, None].to(self.dtype)
        k[..., 1::2, 0] = ramp.flip(0)[:, None].to(self.dtype)

    def args(self, i: int) -> dict[str, Any]:
        """Keyword arguments of ``flashtile.attention`` or ``attention_varlen`` for set ``i``."""
        args: dict[str, Any] = {"q": self.q[i], "k": self.k[i], "v": self.v[i], "causal": self.shape.causal, "window": self.shape.window}
        if self.shape.packed:
            args |= {"cu_seqlens_q": self.cu_seqlens_q, "max_seqlen_q": self.max_seqlen_q, "max_seqlen_k": self.max_seqlen_k}
            paged = self.page_table is not None
            args["cu_seqlens_k"] = None if paged else self.cu_seqlens_k
            args |= {"page_table": self.page_table, "seqused_k": self.seqused_k} if paged else {}
        return args

    def contestant(self, **more: Any) -> Contestant:
        """flashtile's (out, lse) for set i; every call's arguments lie ready, as a caller has them."""
        function = flashtile.attention_varlen_with_lse if self.shape.packed else flashtile.attention_with_lse
        calls = [self.args(i) | more for i in range(self.count)]
        count = self.count
        return lambda i: function(**calls[i % count])

    def out_like(self, value: float) -> torch.Tensor:
        """An ``out`` of set 0, filled with ``value``."""
        q = self.q[0]
        return torch.full((*q.shape[:-1], self.shape.head_dim_v), value, dtype=q.dtype, device=q.device)

    def flat_q(self, i: int) -> torch.Tensor:
        """The queries one after another, (total_q, hq, d)."""
        return self.q[i].reshape(-1, *self.q[i].shape[-2:])

    def keys_of(self, i: int, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k (seqlen_k, hk, d) and v (seqlen_k, hk, dv) of sequence ``b``."""
        length = self.shape.seqlens_k[b]
        if self.page_table is not None:
            pages = self.page_table[b].long()
            return self.k[i][pages].flatten(0, 1)[:length], self.v[i][pages].flatten(0, 1)[:length]
        if self.shape.varlen:
            start = sum(self.shape.seqlens_k[:b])
            return self.k[i][start : start + length], self.v[i][start : start + length]
        return self.k[i][b, :length], self.v[i][b, :length]


def problem_of(shape: Shape) -> Problem:
    """What the planner sees of a problem, its lse wanted; no memory is taken."""
    return Problem.forward(**InputSets(shape, torch.device("meta"), real=False).args(0), lse=True)
