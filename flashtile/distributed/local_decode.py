"""What one rank computes of a decode call: attention over the keys that it holds, wherever in their sequences these lie.

Positions of a rank's keys ascend, so what a query sees of them is a range of their numbers on the rank. A lone query's range is told
to `flashtile.decode` by its length and its left padding. Of several queries, all see the keys that the first of them sees
(one call, rows together), and each some of the last few (another call, each query a sequence of its own over the same keys).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flashtile.api import decode_with_lse, merge
from flashtile.band import Band
from flashtile.distributed.cache_shards import CacheShards
from flashtile.distributed.exchange import Partials


@dataclass(frozen=True)
class Cache:
    """One rank's part of a cache: ``capacity`` keys of each of ``batch`` sequences, as ``shards`` says. Scales may be None."""

    k: torch.Tensor
    v: torch.Tensor
    page_table: torch.Tensor | None
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    shards: CacheShards
    rank: int

    @property
    def capacity(self) -> int:
        return self.k.shape[1] * (1 if self.page_table is None else self.page_table.shape[1])

    def held_before(self, positions: torch.Tensor) -> torch.Tensor:
        return self.shards.held_before(positions, self.rank, self.capacity)


@dataclass(frozen=True)
class Queries:
    """(batch, seqlen_q, heads, dim), or packed (total_q, heads, dim) with their starts and the longest."""

    q: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    max_seqlen_q: int

    def sequences(self, batch: int) -> torch.Tensor:
        """(rows,) int64: each row's sequence; ``batch`` for rows of nobody."""
        if self.cu_seqlens_q is None:
            return torch.arange(batch, device=self.q.device).repeat_interleave(self.q.shape[1], output_size=batch * self.q.shape[1])
        rows = torch.arange(self.q.shape[0], device=self.q.device, dtype=torch.int32)
        return torch.searchsorted(self.cu_seqlens_q[1:].contiguous(), rows, right=True)


@dataclass(frozen=True)
class Asked:
    """``seqlens_k`` (batch,) of the whole sequences, and what a query sees of them and how it scores it."""

    seqlens_k: torch.Tensor
    band: Band
    leftpad_k: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    scores: dict[str, Any]  # softcap, scale and allow_tf32


def decode_here(queries: Queries, cache: Cache, asked: Asked, sinks: torch.Tensor | None, mine: Partials) -> None:
    """Writes partial results over this rank's keys; ``sinks`` join where they are given, on one rank."""
    lone = queries.cu_seqlens_q is None and queries.q.shape[1] <= 1
    total = asked.seqlens_k.clamp(0, cache.capacity * cache.shards.num_ranks)
    if lone and asked.band.left is None and asked.alibi_slopes is None:
        _together(queries, cache, asked, cache.held_before(total), mine.out, mine.lse)
    elif asked.band.left is None and asked.alibi_slopes is None:
        _in_two(queries, cache, asked, total, mine)
    else:
        ranges = _Ranges.of(queries, cache, asked, total)
        hint = cache.capacity if asked.band.left is None else min(cache.capacity, asked.band.left + (asked.band.right or 0) + 1)
        _one_by_one(queries, cache, asked, ranges, ranges.first, hint, mine.out, mine.lse)
    if sinks is not None:
        _join_sinks(queries, sinks, mine)


@dataclass(frozen=True)
class _Ranges:
    """Of each row, all (rows,): its sequence, its position, and its keys' numbers on this rank from ``first`` to before ``end``."""

    sequence: torch.Tensor
    position: torch.Tensor
    first: torch.Tensor
    end: torch.Tensor

    @classmethod
    def of(cls, queries: Queries, cache: Cache, asked: Asked, total: torch.Tensor) -> _Ranges:
        batch = total.shape[0]
        sequence = queries.sequences(batch)
        nobodys = sequence == batch
        sequence = sequence.clamp(max=max(0, batch - 1))
        rows = torch.arange(sequence.shape[0], device=total.device, dtype=torch.int32)
        if queries.cu_seqlens_q is None:
            seqlen_q = queries.q.shape[1]
            position = total[sequence] - seqlen_q + rows % max(1, seqlen_q)
        else:
            position = total[sequence] - queries.cu_seqlens_q[1:][sequence] + rows
        last = total[sequence] if asked.band.right is None else torch.minimum(total[sequence], position + asked.band.right + 1)
        end = torch.where(nobodys, 0, cache.held_before(last))
        first = torch.zeros_like(end) if asked.band.left is None else cache.held_before(position - asked.band.left)
        if asked.leftpad_k is not None:
            first = torch.maximum(first, cache.held_before(asked.leftpad_k)[sequence])
        return cls(sequence, position, first.int(), end.int())


def _in_two(queries: Queries, cache: Cache, asked: Asked, total: torch.Tensor, mine: Partials) -> None:
    """The keys that a sequence's first query sees, for all of its queries; then the rest, for each query by itself."""
    if asked.band.right is None:
        _together(queries, cache, asked, cache.held_before(total), mine.out, mine.lse)
        return
    starts = queries.cu_seqlens_q
    seqlens_q: Any = queries.q.shape[1] if starts is None else starts[1:] - starts[:-1]
    for_all = cache.held_before(torch.minimum(total, total - seqlens_q + asked.band.right + 1))
    ranges = _Ranges.of(queries, cache, asked, total)
    body = torch.empty_like(mine.out), torch.empty_like(mine.lse)
    tail = torch.empty_like(mine.out), torch.empty_like(mine.lse)
    _together(queries, cache, asked, for_all, *body)
    first = torch.maximum(ranges.first, for_all[ranges.sequence])
    _one_by_one(queries, cache, asked, ranges, first, min(cache.capacity, queries.max_seqlen_q), *tail)
    out, lse = merge((body[0], tail[0]), (body[1], tail[1]))
    mine.out.copy_(out)
    mine.lse.copy_(lse)


def _together(queries: Queries, cache: Cache, asked: Asked, lengths: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Every query sees the first ``lengths`` (batch,) of its sequence's keys here, but for the left padding."""
    ragged = queries.cu_seqlens_q is not None
    _, found = decode_with_lse(
        queries.q, cache.k, cache.v, lengths.int(), page_table=cache.page_table, cu_seqlens_q=queries.cu_seqlens_q,
        max_seqlen_q=queries.max_seqlen_q if ragged else None, causal=False, k_scale=cache.k_scale, v_scale=cache.v_scale,
        leftpad_k=None if asked.leftpad_k is None else cache.held_before(asked.leftpad_k).int(), out=out, **asked.scores,
    )  # fmt: skip
    lse.copy_(found)


def _one_by_one(
    queries: Queries, cache: Cache, asked: Asked, ranges: _Ranges, first: torch.Tensor, hint: int, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Each row a sequence of one query, which sees the keys [first, ranges.end) of its sequence here."""
    rows, heads = ranges.end.shape[0], out.shape[-2]
    sequence = ranges.sequence
    # without pages, a sequence's part of the cache is a page
    table = sequence[:, None].int() if cache.page_table is None else cache.page_table[sequence]
    slopes = asked.alibi_slopes if asked.alibi_slopes is None or asked.alibi_slopes.ndim == 1 else asked.alibi_slopes[sequence]
    k_scale, v_scale = (x if x is None or x.ndim < 2 else x[sequence] for x in (cache.k_scale, cache.v_scale))
    part, found = decode_with_lse(
        queries.q.reshape(rows, 1, heads, -1), cache.k, cache.v, ranges.end, page_table=table, max_seqlen_k=max(1, hint), causal=False,
        alibi_slopes=slopes, leftpad_k=first, out_dtype=torch.float32, k_scale=k_scale, v_scale=v_scale,
        **asked.scores,
    )  # fmt: skip
    found = found.squeeze(-1)  # (rows, heads)
    if slopes is not None:
        # the kernel counts distances from the last key here; the query stands so many positions behind it
        behind = ranges.position - cache.rank * cache.capacity - (ranges.end - 1)
        found = found - slopes * behind[:, None]
    out.copy_(part.view(out.shape))
    if lse.ndim == 3:
        found = found.view(lse.shape[0], lse.shape[2], heads)
    lse.copy_(found.transpose(-1, -2))


def _join_sinks(queries: Queries, sinks: torch.Tensor, mine: Partials) -> None:
    """A logit a head that joins the denominators of all rows but nobody's."""
    logits = sinks[:, None].expand(mine.lse.shape)
    if queries.cu_seqlens_q is not None:
        rows = torch.arange(mine.lse.shape[-1], device=sinks.device)
        logits = torch.where(rows < queries.cu_seqlens_q[-1], logits, -torch.inf)
    whole = torch.logaddexp(mine.lse, logits)
    mine.out *= torch.exp(mine.lse - whole).nan_to_num_(0.0).transpose(-1, -2).unsqueeze(-1)
    mine.lse.copy_(whole)
