"""Checks of q: one length for all sequences, or packed sequences of their own lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashtile.arguments.counts import check_most
from flashtile.arguments.tensors import check_int32, check_last_dim
from flashtile.arguments.values import is_int
from flashtile.errors import ArgumentError, ShapeError, message

if TYPE_CHECKING:
    import torch


def check_queries(
    q: torch.Tensor, cu_seqlens_q: torch.Tensor | None, max_seqlen_q: int | None, batch: int | None = None
) -> tuple[int, int, int, int, int]:
    """(batch, total_q, seqlen_q, heads, head_dim); a decode call's ``batch`` is that of its lengths."""
    if cu_seqlens_q is None:
        if q.ndim != 4:
            packed = "need cu_seqlens_q." if batch is not None else "need cu_seqlens_q: use attention_varlen."
            raise ShapeError(
                message(
                    "q",
                    "shape (batch, seqlen_q, num_heads, head_dim)",
                    f"shape {tuple(q.shape)}",
                    f"Packed queries (total_q, num_heads, head_dim) {packed}",
                )
            )
        if batch is not None and q.shape[0] != batch:
            raise ShapeError(
                message("seqlens_k", f"one length for each of q's {q.shape[0]} sequences", f"{batch} lengths", "Pass shape (batch,).")
            )
        if max_seqlen_q is not None and (not is_int(max_seqlen_q) or max_seqlen_q != q.shape[1]):
            raise ArgumentError(
                message("max_seqlen_q", f"q's seqlen_q, {q.shape[1]}", max_seqlen_q, "It is only needed with cu_seqlens_q.")
            )
        batch, total_q, seqlen_q = q.shape[0], q.shape[0] * q.shape[1], q.shape[1]
    else:
        if q.ndim != 3:
            raise ShapeError(
                message(
                    "q",
                    "shape (total_q, num_heads, head_dim) with cu_seqlens_q",
                    f"shape {tuple(q.shape)}",
                    "Pack the sequences: q.flatten(0, 1).",
                )
            )
        batch, total_q = check_starts("cu_seqlens_q", cu_seqlens_q, batch), q.shape[0]
        seqlen_q = _check_longest(max_seqlen_q, total_q)
    check_last_dim("q", q)
    check_most("q", total_q, "queries")
    return batch, total_q, seqlen_q, q.shape[-2], q.shape[-1]


def check_starts(name: str, starts: torch.Tensor, batch: int | None) -> int:
    """The batch that the starts of packed sequences stand for: ``batch``, where that is known already."""
    check_int32(name, starts, rank=1)
    total = f"total_{name[-1]}"
    if batch is None and starts.shape[0] < 1:
        raise ShapeError(message(name, "batch + 1 entries, one at least", "0", f"Its first entry is 0, its last {total}."))
    if batch is not None and starts.shape[0] != batch + 1:
        raise ShapeError(
            message(name, f"batch + 1 = {batch + 1} entries", f"{starts.shape[0]}", f"Its first entry is 0, its last {total}.")
        )
    return int(starts.shape[0]) - 1


def _check_longest(max_seqlen_q: int | None, total_q: int) -> int:
    if max_seqlen_q is None:
        raise ArgumentError(
            message("max_seqlen_q", "the longest query of the batch with cu_seqlens_q", None, "Pass an int; the device is not read for it.")
        )
    if not is_int(max_seqlen_q) or not 0 <= max_seqlen_q <= total_q:
        raise ArgumentError(
            message("max_seqlen_q", f"an int from 0 to total_q ({total_q})", repr(max_seqlen_q), "Pass the longest query's length.")
        )
    return max_seqlen_q


def check_varlen(cu_seqlens_q: torch.Tensor | None, **others: object) -> None:
    """Without ``cu_seqlens_q`` all sequences have one length, and nothing else may speak of lengths."""
    given = [name for name, value in others.items() if value is not None]
    if cu_seqlens_q is None and given:
        raise ArgumentError(
            message(
                "cu_seqlens_q",
                f"a tensor of batch + 1 starts beside {given[0]}",
                None,
                "Sequences of one length go to attention, unpacked.",
            )
        )
