"""The CPU engine's unit of work: sequences of equal lengths at once, their rows packed, in memory linear in the keys.

Rows are packed, (query position, head of the group), so that every key is read once for all heads it serves, and computed
some query positions at a time. The keys of a pass are cut where the mask needs to be applied, and into blocks where
they have to be gathered from pages or converted to float32; the blocks' partial results meet in ``Partials``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from flashtile.band import Band
from flashtile.kernels.call import BackwardCall, DecodeCall, ForwardCall
from flashtile.kernels.cpu_dropout import RowDropout
from flashtile.kernels.cpu_keys import KeyReader
from flashtile.kernels.cpu_mask import Mask, segments_of
from flashtile.kernels.cpu_scores import Partials, attend, needs_products


class Run(NamedTuple):
    """Sequences ``first`` to ``stop`` of one call, all of the same lengths.

    ``row`` is the first one's row in a packed q, ``key`` its key in packed k and v, where its successors' rows and keys follow; in
    a cache, each one's first key.
    """

    first: int
    stop: int
    row: int
    key: int
    seqlen_q: int
    seqlen_k: int


class Tokens(NamedTuple):
    """The tokens of each sequence of a call: where they start in packed tensors, or in each's part of a cache, and how many there
    are, never less than 0."""

    start: int
    length: int


def packed_tokens(cu_seqlens: torch.Tensor, total: int) -> list[Tokens]:
    """Each sequence's tokens of packed tensors with ``total`` of them, whatever ``cu_seqlens`` (b + 1,) says."""
    starts = [min(max(start, 0), total) for start in cu_seqlens.tolist()]
    return [Tokens(start, max(0, stop - start)) for start, stop in pairwise(starts)]


def tokens_of(call: ForwardCall | BackwardCall, reader: KeyReader) -> tuple[list[Tokens], list[Tokens]]:
    """Each sequence's queries and keys, clamped to what there is."""
    batch = call.q.shape[0] if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1
    if call.cu_seqlens_q is None:
        queries = [Tokens(0, call.q.shape[1])] * batch
    else:
        queries = packed_tokens(call.cu_seqlens_q, call.q.shape[0])
    if call.cu_seqlens_k is None:
        keys = [Tokens(0, reader.capacity)] * batch
    else:
        keys = packed_tokens(call.cu_seqlens_k, call.k.shape[0])
    if call.seqused_k is not None:
        keys = [Tokens(start, min(max(used, 0), length)) for used, (start, length) in zip(call.seqused_k.tolist(), keys)]
    return queries, keys


def runs_of(queries: Sequence[Tokens], keys: Sequence[Tokens], reader: KeyReader) -> Iterator[Run]:
    """Neighbouring sequences of equal lengths, as many as the reader can serve at once; opened in the reader.

    Sequences without queries are left out.
    """
    first = 0
    while first < len(keys):
        (row, seqlen_q), (key, seqlen_k) = queries[first], keys[first]
        stop, limit = first + 1, min(len(keys), first + reader.sequences_at_once(seqlen_k))
        while stop < limit and queries[stop].length == seqlen_q and keys[stop].length == seqlen_k:
            if keys[stop].start != (key + (stop - first) * seqlen_k if reader.packed else key):
                break
            stop += 1
        if seqlen_q > 0:
            reader.open(first, stop, key, seqlen_k)
            yield Run(first, stop, row, key, seqlen_q, seqlen_k)
        first = stop


def clear(call: DecodeCall | ForwardCall) -> None:
    """out 0 and lse -inf, for rows of a packed q that belong to nobody."""
    call.out.zero_()
    if call.lse is not None:
        call.lse.fill_(float("-inf"))


def tensors_of(call: DecodeCall | ForwardCall, run: Run) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """q and out (batch, seqlen_q, hq, d or dv) and lse (batch, hq, seqlen_q) of a run, as views."""
    packed = call.cu_seqlens_q is not None
    lse = None if call.lse is None else lse_of(call.lse, run, packed)
    return queries_of(call.q, run, packed), queries_of(call.out, run, packed), lse


def queries_of(tensor: torch.Tensor, run: Run, packed: bool) -> torch.Tensor:
    """A run's part of q, out or their gradients, (batch, seqlen_q, hq, d or dv), as a view."""
    return _sequences_of(tensor, run, packed, run.row, run.seqlen_q)


def keys_of(tensor: torch.Tensor, run: Run, packed: bool) -> torch.Tensor:
    """A run's part of k, v or their gradients, (batch, seqlen_k, hk, d or dv), as a view."""
    return _sequences_of(tensor, run, packed, run.key, run.seqlen_k)


def _sequences_of(tensor: torch.Tensor, run: Run, packed: bool, start: int, length: int) -> torch.Tensor:
    if not packed:
        return tensor[run.first : run.stop, :length]
    batch = run.stop - run.first
    return tensor[start : start + batch * length].view(batch, length, *tensor.shape[1:])


def lse_of(lse: torch.Tensor, run: Run, packed: bool) -> torch.Tensor:
    """A run's part of lse or its gradient, (batch, hq, seqlen_q), as a view."""
    if not packed:
        return lse[run.first : run.stop]
    batch = run.stop - run.first
    return lse[:, run.row : run.row + batch * run.seqlen_q].view(-1, batch, run.seqlen_q).transpose(0, 1)


def run_packed(call: DecodeCall | ForwardCall, run: Run, reader: KeyReader, band: Band, positions: int) -> None:
    """All rows of a run that the reader has opened, ``positions`` query positions at a time."""
    batch, heads_kv = run.stop - run.first, reader.num_heads
    q, out, lse = tensors_of(call, run)
    # Split the head dimension: (batch, seqlen_q, hk, group, d); lse (batch, hk, group, seqlen_q)
    q = q.view(batch, run.seqlen_q, heads_kv, -1, q.shape[-1])
    out = out.view(batch, run.seqlen_q, heads_kv, -1, out.shape[-1])
    lse = None if lse is None else lse.view(batch, heads_kv, -1, run.seqlen_q)
    for start in range(0, run.seqlen_q, positions):
        here = slice(start, min(start + positions, run.seqlen_q))
        part_out, part_lse = _attend_rows(call, run, reader, band, q[:, here], here)
        group = q.shape[3]
        out[:, here].copy_(part_out.view(batch, heads_kv, -1, group, out.shape[-1]).transpose(1, 2))
        if lse is not None:
            lse[..., here].copy_(part_lse.view(batch, heads_kv, -1, group).transpose(2, 3))


def _attend_rows(
    call: DecodeCall | ForwardCall, run: Run, reader: KeyReader, band: Band, q: torch.Tensor, here: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query positions ``here`` of a run against all keys they see: out (batch, hk, rows, dv) and lse (batch, hk, rows).

    q (batch, positions, hk, group, d); rows are (position, head of the group). With dropout a run has one sequence.
    """
    batch, num_positions, heads_kv, group, head_dim = q.shape
    rows = q.transpose(1, 2).reshape(batch, heads_kv, num_positions * group, head_dim)
    rows = rows.float() if reader.through_float32 else rows
    k_scale, v_scale = (_scale_of(scale, run, heads_kv) for scale in _scales_of(call))
    rows = rows if k_scale is None else rows * k_scale
    offset = run.seqlen_k - run.seqlen_q
    slopes = call.alibi_slopes
    slopes = slopes[run.first : run.stop] if slopes is not None and slopes.ndim == 2 else slopes
    mask = Mask(band, offset, here.start, num_positions, group, slopes, reader.key_mask)
    dropout: RowDropout | None = None
    if isinstance(call, ForwardCall) and call.dropout is not None:
        dropout = RowDropout(call.dropout, run.first, heads_kv, group, here)
    products = dropout is not None or needs_products(call.softcap, head_dim, call.out.shape[-1])
    partials = Partials()
    for segment in segments_of(band, offset, here, run.seqlen_k, rows.shape[2], masked=mask.everywhere):
        step = reader.keys_at_once(batch, rows.shape[2] if segment.masked or products else 0)
        for start in range(segment.start, segment.stop, step):
            stop = min(start + step, segment.stop)
            k, v = reader.read(start, stop)
            factors = None if dropout is None else dropout.factors(start, stop)
            attend(rows, k, v, mask.block(start, stop) if segment.masked else None, call.scale, call.softcap, partials, factors)
    out, lse = partials.merged((batch, heads_kv, num_positions * group, call.out.shape[-1]))
    out = out if v_scale is None else out * v_scale
    # (hk, rows): rows are (position, head of the group)
    return (out, lse) if call.sinks is None else join_sinks(out, lse, call.sinks.view(-1, group).repeat(1, num_positions))


def _scales_of(call: DecodeCall | ForwardCall) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (call.k_scale, call.v_scale) if isinstance(call, DecodeCall) else (None, None)


def _scale_of(scale: torch.Tensor | None, run: Run, heads_kv: int) -> torch.Tensor | None:
    """What keys or values of a run's sequences are multiplied by, (1 or batch, hk, 1, 1)."""
    if scale is None:
        return None
    by_sequence = scale.expand(run.stop, heads_kv) if scale.ndim < 2 or scale.shape[0] == 1 else scale
    return by_sequence[run.first : run.stop, :, None, None].expand(-1, heads_kv, 1, 1)


def join_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds a sink to each row's softmax denominator: out (..., dv), lse (...), sinks as wide as lse or broadcast to it."""
    joined = torch.logaddexp(lse, sinks)
    share = torch.exp(lse - joined).masked_fill_(lse == float("-inf"), 0.0)
    return out * share.unsqueeze(-1), joined
