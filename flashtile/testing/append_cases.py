"""Appends to a cache, with what they should write, key by key in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class Written(NamedTuple):
    """What an append leaves behind: both caches, the lengths from now on, and q turned (None where no table turns it)."""

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    seqlens_k: torch.Tensor
    q: torch.Tensor | None


@dataclass(frozen=True)
class AppendCase:
    """One append. ``new`` and ``queries`` are numbers of tokens, of each sequence where they are packed; no ``pairs``, no tables.

    Pages lie in no order, and one of the last sequence's has an id outside the cache; what is not yet written is NaN.
    """

    seqlens: tuple[int, ...] = (3, 36, 0)
    new: int | tuple[int, ...] = 5
    queries: int | tuple[int, ...] = 5
    heads: tuple[int, int] = (6, 2)
    dims: tuple[int, int] = (32, 16)
    pairs: int | None = 8
    interleaved: bool = False
    queries_advance: bool = True
    own_positions: bool = False
    dtype: str = "float16"
    dtype_table: str = "float32"
    page_size: int = 0
    capacity: int = 40
    positions: int = 44

    def arguments(self, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """What `append_kv` is given."""
        rng = torch.Generator().manual_seed(seed)
        batch, dtype = len(self.seqlens), getattr(torch, self.dtype)
        heads_q, heads_kv = self.heads

        def rows(tokens: int | tuple[int, ...], heads: int, dim: int) -> torch.Tensor:
            shape = (batch, tokens) if isinstance(tokens, int) else (sum(tokens) + 2,)
            return torch.randn((*shape, heads, dim), generator=rng).to(dtype)

        args: dict[str, Any] = {}
        room = (batch, self.capacity)
        if self.page_size:
            pages = self.capacity // self.page_size
            table = torch.randperm(batch * pages + 1, generator=rng)[: batch * pages].view(batch, pages).to(torch.int32)
            table[-1, -1] = batch * pages + 1
            args["page_table"], room = table, (batch * pages + 1, self.page_size)
        for name, dim in zip(("k", "v"), self.dims):
            args[name] = rows(self.new, heads_kv, dim)
            # heads before keys in memory, which is a layout that caches have
            args[f"{name}_cache"] = torch.full((room[0], heads_kv, room[1], dim), math.nan).to(dtype).transpose(1, 2)
        args["seqlens_k"] = torch.tensor(self.seqlens, dtype=torch.int32)
        if not isinstance(self.new, int):
            args["cu_seqlens_k_new"] = torch.tensor((0, *self.new)).cumsum(0).to(torch.int32)
        if self.queries:
            args["q"] = rows(self.queries, heads_q, self.dims[0])
            if not isinstance(self.queries, int):
                args["cu_seqlens_q"] = torch.tensor((0, *self.queries)).cumsum(0).to(torch.int32)
                args["max_seqlen_q"] = max(self.queries)
        if self.pairs is not None:
            angles = torch.outer(torch.arange(self.positions), 100.0 ** (-torch.arange(self.pairs) / max(1, self.pairs)))
            args["rotary_cos"], args["rotary_sin"] = (f(angles).to(getattr(torch, self.dtype_table)) for f in (torch.cos, torch.sin))
            args |= {"rotary_interleaved": self.interleaved, "queries_advance": self.queries_advance}
            if self.own_positions:
                args["rotary_seqlens"] = torch.tensor([7 * b - 2 for b in range(batch)], dtype=torch.int32)
        return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in args.items()}


def written(args: dict[str, Any]) -> Written:
    """What an append with these arguments should leave behind, float64; ``args`` stay as they are."""
    k_cache, v_cache = args["k_cache"].cpu().double(), args["v_cache"].cpu().double()
    table = args["page_table"].tolist() if "page_table" in args else None
    page_size = k_cache.shape[1]
    capacity = page_size * (1 if table is None else len(table[0]))
    lengths = args["seqlens_k"].tolist()
    positions = args["rotary_seqlens"].tolist() if "rotary_seqlens" in args else lengths
    after = []
    keys, values = _sequences(args["k"], args.get("cu_seqlens_k_new")), _sequences(args["v"], args.get("cu_seqlens_k_new"))
    for b, given in enumerate(lengths):
        length = min(max(given, 0), capacity)
        after.append(min(length + len(keys[b]), capacity))
        for i in range(after[-1] - length):
            at = length + i
            entry, slot = (b, at) if table is None else (table[b][at // page_size], at % page_size)
            if 0 <= entry < len(k_cache):
                k_cache[entry, slot] = _turned(keys[b][i], positions[b] + i, args)
                v_cache[entry, slot] = values[b][i].double()
    if "rotary_cos" not in args or "q" not in args:
        return Written(k_cache, v_cache, torch.tensor(after, dtype=torch.int32), args["q"].cpu() if "q" in args else None)
    step = 1 if args["queries_advance"] else 0
    queries = _sequences(args["q"], args.get("cu_seqlens_q"))
    turned = [_turned(x, positions[b] + step * i, args) for b, sequence in enumerate(queries) for i, x in enumerate(sequence)]
    shape = args["q"].shape
    q = torch.stack(turned) if turned else torch.zeros(0, *shape[-2:], dtype=torch.float64)
    return Written(k_cache, v_cache, torch.tensor(after, dtype=torch.int32), q.view(shape) if len(shape) == 4 else q)


def assert_written(args: dict[str, Any], result: tuple[torch.Tensor, torch.Tensor | None], expected: Written) -> None:
    """Raises AssertionError unless the caches in ``args``, the lengths and q are what was expected, but for rounding."""
    seqlens_k, q = result
    torch.testing.assert_close(seqlens_k.cpu(), expected.seqlens_k, rtol=0, atol=0)
    assert_caches(args["k_cache"], args["v_cache"], expected)
    if (q is None) != (expected.q is None):
        raise AssertionError(f"q is {q}, expected {expected.q}")
    if q is not None and expected.q is not None:
        _assert_turned(q[: len(expected.q)], expected.q)


def assert_caches(k_cache: torch.Tensor, v_cache: torch.Tensor, expected: Written) -> None:
    """Raises AssertionError unless the keys are what was expected, but for rounding, and the values are to the bit."""
    _assert_turned(k_cache, expected.k_cache)
    torch.testing.assert_close(v_cache.cpu().double(), expected.v_cache, rtol=0, atol=0, equal_nan=True)


def _assert_turned(x: torch.Tensor, expected: torch.Tensor) -> None:
    atol = 4 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(x.cpu().double(), expected.double(), rtol=torch.finfo(x.dtype).eps, atol=atol, equal_nan=True)


def _sequences(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> list[torch.Tensor]:
    if cu_seqlens is None:
        return list(x.cpu())
    starts = cu_seqlens.tolist()
    return [x.cpu()[first:end] for first, end in itertools.pairwise(starts)]


def _turned(heads: torch.Tensor, at: int, args: dict[str, Any]) -> torch.Tensor:
    """One token's heads (heads, dim) in float64, turned as at position ``at``, pair by pair."""
    out = heads.double().clone()
    if "rotary_cos" not in args:
        return out
    cos, sin = args["rotary_cos"].cpu().double(), args["rotary_sin"].cpu().double()
    pairs = cos.shape[1]
    if not 0 <= at < len(cos):
        return out
    for i in range(pairs):
        one, two = (2 * i, 2 * i + 1) if args["rotary_interleaved"] else (i, i + pairs)
        x, y = heads[:, one].double(), heads[:, two].double()
        out[:, one], out[:, two] = x * cos[at, i] - y * sin[at, i], x * sin[at, i] + y * cos[at, i]
    return out
