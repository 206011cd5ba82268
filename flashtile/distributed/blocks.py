"""Blocks: attention of some queries over some keys, cut out of a mask, as calls with bands of their own. Integers alone.

A band's diagonal ends at a call's last query and last key, so it moves when a call has only a part of either. With queries [qs, qe)
and keys [ks, ke) of a sequence, and ``offset`` the whole sequence's ``seqlen_k - seqlen_q``, the same keys are seen with

    left' = left + (ke - qe - offset)    and    right' = right - (ke - qe - offset)

Rows that see nothing and keys that nobody sees are cut off first; then neither side is negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from flashtile.band import Band


@dataclass(frozen=True)
class Part:
    """Rows of a rank, one behind the other: of sequence n the ``lengths[n]`` positions from ``starts[n]``, from local row ``row``."""

    row: int
    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Block:
    """One call: rows [q_row, q_row + num_q) of the queries on k_row, num_k of the keys, under ``band``.

    ``q_lengths`` and ``k_lengths`` are the lengths of packed sequences, or one length each.
    """

    q_row: int
    k_row: int
    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    band: Band

    @property
    def num_q(self) -> int:
        return sum(self.q_lengths)

    @property
    def num_k(self) -> int:
        return sum(self.k_lengths)


@dataclass(frozen=True)
class _Span:
    """Queries [qs, qe) and keys [ks, ke) of one sequence."""

    qs: int
    qe: int
    ks: int
    ke: int

    @property
    def is_empty(self) -> bool:
        return self.qs >= self.qe or self.ks >= self.ke


def blocks_of(q_parts: Sequence[Part], k_parts: Sequence[Part], offsets: Sequence[int], band: Band) -> list[Block]:
    """The calls that together see what ``band`` lets queries see, each pair once. ``offsets`` are seqlen_k - seqlen_q of each sequence."""
    one = len(offsets) == 1
    if one and band == Band(None, 0) and offsets[0] == 0 and tuple(q_parts) == tuple(k_parts) and _ascends(q_parts):
        # the mask asks for the order of positions alone, and rows lie in it
        lengths = (sum(part.num_rows for part in q_parts),)
        return [Block(q_parts[0].row, k_parts[0].row, lengths, lengths, band)] if lengths[0] else []
    blocks = [block for q_part in q_parts for k_part in k_parts for block in _blocks_of_pair(q_part, k_part, offsets, band)]
    return _joined(blocks) if one else blocks


def _ascends(parts: Sequence[Part]) -> bool:
    return all(before.starts[0] + before.lengths[0] <= after.starts[0] for before, after in pairwise(parts))


def _blocks_of_pair(q_part: Part, k_part: Part, offsets: Sequence[int], band: Band) -> list[Block]:
    """One call for all sequences where their bands are the same and nothing is cut off; else one for each that sees something."""
    found: list[Block] = []
    whole = True
    q_row, k_row = q_part.row, k_part.row
    for n, offset in enumerate(offsets):
        given = _Span(q_part.starts[n], q_part.starts[n] + q_part.lengths[n], k_part.starts[n], k_part.starts[n] + k_part.lengths[n])
        span = _trimmed(given, offset, band)
        if not span.is_empty:
            lengths = (span.qe - span.qs,), (span.ke - span.ks,)
            found.append(Block(q_row + span.qs - given.qs, k_row + span.ks - given.ks, *lengths, _moved(span, offset, band)))
        whole = whole and (span == given or given.is_empty)
        q_row, k_row = q_row + q_part.lengths[n], k_row + k_part.lengths[n]
    if len(offsets) > 1 and found and whole and len({block.band for block in found}) == 1:
        return [Block(q_part.row, k_part.row, q_part.lengths, k_part.lengths, found[0].band)]
    return found


def _trimmed(span: _Span, offset: int, band: Band) -> _Span:
    """Without queries that see none of the keys, and keys that none of the queries sees."""
    qs, qe, ks, ke = span.qs, span.qe, span.ks, span.ke
    for _ in range(2):  # what one side loses may leave the other's ends unseen
        if band.right is not None:
            qs, ke = max(qs, ks - offset - band.right), min(ke, qe + offset + band.right)
        if band.left is not None:
            ks, qe = max(ks, qs + offset - band.left), min(qe, ke - offset + band.left)
    return _Span(qs, qe, ks, ke)


def _moved(span: _Span, offset: int, band: Band) -> Band:
    """The band of a call with this span; a side that hides nothing is open."""
    num_q, num_k = span.qe - span.qs, span.ke - span.ks
    past = span.ke - span.qe - offset
    left = None if band.left is None or band.left + past >= num_k - 1 else band.left + past
    right = None if band.right is None or band.right - past >= num_q - 1 else band.right - past
    return Band(left, right)


def _joined(blocks: list[Block]) -> list[Block]:
    """Neighbours that see everything become one call: first along the keys, then along the queries."""
    joined: list[Block] = []
    for block in blocks:
        last = joined[-1] if joined else None
        full = last is not None and block.band.is_full and last.band.is_full
        if last and full and (last.q_row, last.num_q) == (block.q_row, block.num_q) and last.k_row + last.num_k == block.k_row:
            joined[-1] = last = replace(last, k_lengths=(last.num_k + block.num_k,))
        else:
            joined.append(block)
    rows: list[Block] = []
    for block in joined:
        last = rows[-1] if rows else None
        full = last is not None and block.band.is_full and last.band.is_full
        if last and full and (last.k_row, last.num_k) == (block.k_row, block.num_k) and last.q_row + last.num_q == block.q_row:
            rows[-1] = replace(last, q_lengths=(last.num_q + block.num_q,))
        else:
            rows.append(block)
    return rows
