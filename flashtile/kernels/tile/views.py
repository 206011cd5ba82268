"""Views: a tensor as a kernel sees it, a pointer with its strides. Fields that are None are compiled away.

Offsets are int64 wherever an index multiplies a stride that the caller chose, so that caches beyond 2^31 elements are right.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashtile.band import Band

_WIDEST = 2**30  # a side of a window that hides no key, and that int32 key positions can be moved by


class RowsView(NamedTuple):
    """q and out: (sequence, query position, head, dim), the last dim contiguous. Packed tensors have stride_b 0."""

    ptr: Any
    stride_b: Any
    stride_m: Any
    stride_h: Any


class KeysView(NamedTuple):
    """K or V: (sequence or page, key, head, dim), the last dim contiguous. V's strides are None where they are K's."""

    ptr: Any
    stride_b: Any
    stride_n: Any
    stride_h: Any


class LseView(NamedTuple):
    """lse: float32 (sequence, head, query position); ptr is None where it is not wanted."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_m: Any


class StatisticsView(NamedTuple):
    """What the backward needs of each query, float32 (sequence, head, query position), positions side by side: lse in base 2, inf
    for a query that saw no key; and delta. Packed queries have stride_b 0.
    """

    lse_log2: Any
    delta: Any
    stride_b: Any
    stride_h: Any


class PartialsView(NamedTuple):
    """Split results in one float32 buffer: out [token, head, split, dim] normalised, from ``lse_start`` on lse
    [token, head, split] (natural log). ptr is None where nothing is split. Of programs that share a line: out
    [slot, row, dim] and lse [slot, row], two slots a program, a row block each; num_splits is None.
    """

    ptr: Any
    lse_start: Any
    num_splits: Any


class LengthsView(NamedTuple):
    """Lengths on the device: seqlens_k (batch,), cu_seqlens_q (batch + 1,) or None; what they are clamped to; and leftpad_k (batch,)
    or None, the first keys of each sequence, which no query sees."""

    seqlens_k: Any
    cu_seqlens_q: Any
    capacity: Any
    seqlen_q: Any
    total_q: Any
    leftpad_k: Any


class TokensView(NamedTuple):
    """What a forward call knows of its sequences: cu_seqlens_q and cu_seqlens_k (batch + 1,) or None, seqused_k (batch,) or
    None, all on the device; and what they are clamped to: queries and keys of a sequence, and of a packed q and k.

    ``seqlen_k`` is a sequence's room for keys: k's length, or that of all pages of a row of the page table. It is not used
    where cu_seqlens_k is given.
    """

    cu_seqlens_q: Any
    cu_seqlens_k: Any
    seqused_k: Any
    seqlen_q: Any
    seqlen_k: Any
    total_q: Any
    total_k: Any


class PagesView(NamedTuple):
    """The page table (batch, max_pages) int32, or None; ids outside [0, num_pages) are masked."""

    table: Any
    stride_b: Any
    num_pages: Any


class ScoresView(NamedTuple):
    """What happens to q.k: scale_log2 = scale * log2(e); softcap (None: off); ALiBi slopes (None: off) with their batch stride."""

    scale_log2: Any
    softcap: Any
    slopes: Any
    slopes_stride_b: Any


class KvScalesView(NamedTuple):
    """What stored keys and values are multiplied by: each float32 (sequence, head), strides 0 where all share one; None for 1."""

    k: Any
    k_stride_b: Any
    k_stride_h: Any
    v: Any
    v_stride_b: Any
    v_stride_h: Any


class DropoutView(NamedTuple):
    """Which entries of the softmax are dropped: seed (2,) int64 on the device, or None (nothing is); the least word that keeps an
    entry (u32); and what is kept is multiplied by."""

    seed: Any
    threshold: Any
    scale: Any


class BandView(NamedTuple):
    """Band(left, right) with None for an unbounded side."""

    left: Any
    right: Any


def band_view(band: Band) -> BandView:
    """The band as kernels are given it."""
    return BandView(*(None if side is None else min(side, _WIDEST) for side in (band.left, band.right)))


@triton.jit
def row_offsets(view, b, m, h):
    """(rows,) element offsets of (sequence b, query positions m, heads h)."""
    return b.to(tl.int64) * view.stride_b + m.to(tl.int64) * view.stride_m + h.to(tl.int64) * view.stride_h
