"""What the CPU engine's rows see: the keys inside a band, cut by whether they need a mask, and the mask."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from flashtile.band import Band

MASK_BYTES = 1 << 20  # of one block's mask


class Segment(NamedTuple):
    """Keys ``start`` to ``stop``; ``masked`` where some row does not see all of them."""

    start: int
    stop: int
    masked: bool


def segments_of(band: Band, offset: int, here: slice, seqlen_k: int, rows: int, masked: bool) -> list[Segment]:
    """The keys that query positions ``here`` see; if a mask over all of them would be large, cut into what all rows see and the rest."""
    top, bottom = offset + here.start, offset + here.stop - 1
    first = 0 if band.left is None else max(0, top - band.left)
    last = seqlen_k if band.right is None else min(seqlen_k, bottom + band.right + 1)
    if first >= last:
        return []
    all_from = first if band.left is None else min(max(first, bottom - band.left), last)
    all_to = last if band.right is None else max(min(last, top + band.right + 1), first)
    if not masked and (all_from, all_to) == (first, last):
        return [Segment(first, last, False)]
    if masked or 4 * rows * (last - first) <= MASK_BYTES or all_from >= all_to:
        return [Segment(first, last, True)]
    cuts = [Segment(first, all_from, True), Segment(all_from, all_to, False), Segment(all_to, last, True)]
    return [cut for cut in cuts if cut.start < cut.stop]


def triangle_of(band: Band, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
    """(shift, blind) of a band without a left side: query i sees keys 0 to i + shift, so that the first ``blind`` queries see none."""
    shift = seqlen_k if band.right is None else min(seqlen_k - seqlen_q + band.right, seqlen_k)
    return shift, min(max(0, -shift), seqlen_q) if seqlen_k else seqlen_q


class MaskBlock(NamedTuple):
    """A mask over one block of keys: ``bias`` float32 (batch or 1, hk or 1, rows, keys) is added to the scores;
    ``blind`` bool (batch or 1, hk or 1, rows) marks rows that see none of these keys, None if there is no such row."""

    bias: torch.Tensor
    blind: torch.Tensor | None


class Mask:
    """The additive mask of some packed rows: band, ALiBi and pages that do not exist.

    Rows are ``num_positions`` query positions from ``first`` on, each with ``group`` heads; ``slopes`` (hq,) or
    (batch, hq); ``key_mask`` (batch, keys), False where a key lies on no page.
    """

    def __init__(
        self, band: Band, offset: int, first: int, num_positions: int, group: int,
        slopes: torch.Tensor | None, key_mask: torch.Tensor | None,
    ) -> None:  # fmt: skip
        self.band, self.offset, self.first = band, offset, first
        self.num_positions, self.group = num_positions, group
        self.slopes, self.key_mask = slopes, key_mask

    @property
    def everywhere(self) -> bool:
        """Whether no key at all can go without the mask."""
        return self.slopes is not None or self.key_mask is not None

    def block(self, start: int, stop: int) -> MaskBlock:
        """The mask over keys ``start`` to ``stop``."""
        diagonal = self.offset + self.first - start
        block = _band_block(self.band, diagonal, self.num_positions, self.group, stop - start)
        if not self.everywhere:
            return block
        bias = block.bias.view(1, 1, self.num_positions, self.group, -1)
        if self.slopes is not None:
            slopes = self.slopes.view(self.slopes.shape[0] if self.slopes.ndim == 2 else 1, -1, 1, self.group, 1)
            bias = bias - slopes * _distance(diagonal, self.num_positions, stop - start).abs()
        if self.key_mask is None:
            return MaskBlock(bias.flatten(2, 3), block.blind)
        bias = bias.masked_fill(~self.key_mask[:, None, None, None, start:stop], float("-inf")).flatten(2, 3)
        return MaskBlock(bias, (bias == float("-inf")).all(dim=-1))


def _distance(diagonal: int, num_positions: int, keys: int) -> torch.Tensor:
    """(positions, 1, keys): how far each key lies right of its position's diagonal; position 0's is key ``diagonal``."""
    return torch.arange(keys) - torch.arange(diagonal, diagonal + num_positions)[:, None, None]


@lru_cache(maxsize=16)
def _band_block(band: Band, diagonal: int, num_positions: int, group: int, keys: int) -> MaskBlock:
    """The mask of a band alone; every layer of a model asks for the same one. Never written to."""
    distance = _distance(diagonal, num_positions, keys)
    bias = torch.zeros(1, 1, num_positions, group, keys)
    if band.left is not None:
        bias.masked_fill_(distance < -band.left, float("-inf"))
    if band.right is not None:
        bias.masked_fill_(distance > band.right, float("-inf"))
    bias = bias.flatten(2, 3)
    blind = (bias == float("-inf")).all(dim=-1)
    return MaskBlock(bias, blind if bool(blind.any()) else None)


@lru_cache(maxsize=16)
def whole_part(band: Band, seqlen_q: int, seqlen_k: int, group: int) -> tuple[int, int, torch.Tensor | None] | None:
    """(start, stop, additive mask or None) where one block holds all keys that ``seqlen_q`` queries see, and each sees one; else None."""
    offset = seqlen_k - seqlen_q
    segments = segments_of(band, offset, slice(0, seqlen_q), seqlen_k, seqlen_q * group, masked=False)
    if len(segments) != 1:
        return None
    start, stop, masked = segments[0]
    if not masked:
        return start, stop, None
    if 4 * seqlen_q * group * (stop - start) > MASK_BYTES:
        return None
    block = _band_block(band, offset - start, seqlen_q, group, stop - start)
    return None if block.blind is not None else (start, stop, block.bias)
