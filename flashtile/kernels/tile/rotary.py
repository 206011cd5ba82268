"""Rotary embeddings on the device: the angles of tokens, and rows of heads turned by them on their way from one place to another.

Source: RoFormer (Su, Lu, Pan, Murtadha, Wen, Liu 2021).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashtile.kernels.tile.quantised import stored


class TablesView(NamedTuple):
    """cos and sin, each (rows, pairs) side by side, and where tokens stand: a sequence's first token at ``offsets[b] + offset``
    (offsets: int32 or int64, or None)."""

    cos: Any
    sin: Any
    rows: Any
    offsets: Any
    offset: Any


class SequencesView(NamedTuple):
    """Where each sequence's tokens are: ``cu_seqlens`` (batch + 1,) int32 into ``tokens`` packed rows, or None and ``tokens`` each."""

    cu_seqlens: Any
    tokens: Any


@triton.jit
def tokens_of(sequences, b):
    """[first, end) of sequence b's tokens within its view: from 0 unless packed."""
    if sequences.cu_seqlens is None:
        return b * 0, b * 0 + sequences.tokens
    else:
        first = tl.minimum(tl.maximum(tl.load(sequences.cu_seqlens + b), 0), sequences.tokens)
        end = tl.minimum(tl.maximum(tl.load(sequences.cu_seqlens + b + 1), first), sequences.tokens)
        return first, end


@triton.jit
def angles_at(tables, at, real, PAIRS: tl.constexpr, PAIRS_HELD: tl.constexpr):
    """cos and sin [rows, PAIRS_HELD] float32 at positions ``at`` (rows,); 1 and 0, which turn nothing, beyond the tables."""
    pair = tl.arange(0, PAIRS_HELD)
    known = real & (at >= 0) & (at < tables.rows)
    entry = at.to(tl.int64)[:, None] * PAIRS + pair[None, :]
    mask = known[:, None] & (pair < PAIRS)[None, :]
    cos = tl.load(tables.cos + entry, mask=mask, other=1.0).to(tl.float32)
    sin = tl.load(tables.sin + entry, mask=mask, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def move_turned(
    source, target, real, cos, sin, scale,
    PAIRS: tl.constexpr, PAIRS_HELD: tl.constexpr, HEAD_DIM: tl.constexpr, REST_HELD: tl.constexpr,
    INTERLEAVED: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Heads that begin at pointers ``source`` (rows,) go to ``target``, the first 2 * PAIRS elements turned.

    ``source`` may be ``target``: with IN_PLACE it is, and the rest of each head stays where it is. ``scale`` [rows, 1] is that of a
    ``target`` that holds codes, else None.
    """
    dtype: tl.constexpr = target.dtype.element_ty
    if INTERLEAVED:
        # [rows, 2 * PAIRS_HELD]
        d = tl.arange(0, 2 * PAIRS_HELD)
        mask = real[:, None] & (d < 2 * PAIRS)[None, :]
        both = tl.load(source[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, [both.shape[0], PAIRS_HELD, 2]))
        turned = tl.join(first * cos - second * sin, first * sin + second * cos)
        turned = tl.reshape(turned, [both.shape[0], 2 * PAIRS_HELD])
        tl.store(target[:, None] + d[None, :], stored(turned, scale, dtype), mask=mask)
    else:
        # [rows, PAIRS_HELD]
        pair = tl.arange(0, PAIRS_HELD)
        mask = real[:, None] & (pair < PAIRS)[None, :]
        first = tl.load(source[:, None] + pair[None, :], mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source[:, None] + PAIRS + pair[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(target[:, None] + pair[None, :], stored(first * cos - second * sin, scale, dtype), mask=mask)
        tl.store(target[:, None] + PAIRS + pair[None, :], stored(first * sin + second * cos, scale, dtype), mask=mask)
    if HEAD_DIM > 2 * PAIRS and not IN_PLACE:
        rest = 2 * PAIRS + tl.arange(0, REST_HELD)
        mask = real[:, None] & (rest < HEAD_DIM)[None, :]
        tl.store(target[:, None] + rest[None, :], stored(tl.load(source[:, None] + rest[None, :], mask=mask), scale, dtype), mask=mask)


def held(count: int) -> int:
    """A power of two that has room for so many elements."""
    return 1 << max(0, count - 1).bit_length()
