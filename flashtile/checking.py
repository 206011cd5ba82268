"""The debug switch: lengths and page ids, which live on the device and are otherwise clamped and masked there, checked on the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise

import torch

from flashtile.errors import ArgumentError, message
from flashtile.kernels.call import DecodeCall

CHECKING: ContextVar[bool] = ContextVar("flashtile_checking", default=False)


@contextmanager
def checked() -> Iterator[None]:
    """Within ``with flashtile.checked():`` every decode call reads its lengths and page table on the host and complains.

    Raises ArgumentError that names the first entry of ``seqlens_k`` beyond the cache's capacity, of ``cu_seqlens_q``
    that is out of order or out of q, or of ``page_table`` outside the cache where a query can see it. Without the
    switch such entries are clamped or masked on the device: they are never read or written outside, but the result is
    not what was meant.

    Each call waits for its device, so this is for finding a bug: it costs time and cannot run while a CUDA graph is
    captured. It holds for the current thread or task, and costs nothing measurable when it is off.
    """
    token = CHECKING.set(True)
    try:
        yield
    finally:
        CHECKING.reset(token)


def check_decode_values(call: DecodeCall, max_seqlen_q: int | None, left: int | None) -> None:
    """Raises ArgumentError for the first bad length or page id; ``left`` is the window's left side, waits for the device."""
    seqlens_q = _query_lengths(call, max_seqlen_q)
    seqlens_k = call.seqlens_k.tolist()
    capacity = call.k_cache.shape[1]
    if call.page_table is not None:
        capacity *= call.page_table.shape[1]
    for i, seqlen_k in enumerate(seqlens_k):
        if not 0 <= seqlen_k <= capacity:
            raise ArgumentError(
                message(
                    f"seqlens_k[{i}]",
                    f"a length from 0 to the cache's capacity, {capacity}",
                    seqlen_k,
                    "Make room for more keys, or correct the length.",
                )
            )
    if call.page_table is not None:
        _check_pages(call.page_table, call.k_cache, seqlens_q, seqlens_k, left)


def _query_lengths(call: DecodeCall, max_seqlen_q: int | None) -> list[int]:
    if call.cu_seqlens_q is None:
        return [call.q.shape[1]] * call.q.shape[0]
    starts = call.cu_seqlens_q.tolist()
    total_q = call.q.shape[0]
    if starts[0] != 0:
        raise ArgumentError(message("cu_seqlens_q[0]", "0", starts[0], "The first sequence starts at q's first row."))
    longest = total_q if max_seqlen_q is None else max_seqlen_q
    lengths = []
    for i, (start, end) in enumerate(pairwise(starts)):
        if not start <= end <= total_q:
            raise ArgumentError(
                message(
                    f"cu_seqlens_q[{i + 1}]",
                    f"a row from {start} to total_q ({total_q})",
                    end,
                    "Pass the running sum of the queries' lengths.",
                )
            )
        if end - start > longest:
            raise ArgumentError(
                message(
                    f"cu_seqlens_q[{i + 1}]",
                    f"at most max_seqlen_q ({longest}) queries in sequence {i}",
                    end - start,
                    "Pass the longest query's length as max_seqlen_q.",
                )
            )
        lengths.append(end - start)
    return lengths


def _check_pages(page_table: torch.Tensor, k_cache: torch.Tensor, seqlens_q: list[int], seqlens_k: list[int], left: int | None) -> None:
    num_pages, page_size = k_cache.shape[:2]
    for i, (seqlen_q, seqlen_k, pages) in enumerate(zip(seqlens_q, seqlens_k, page_table.tolist())):
        first = 0 if left is None else max(0, seqlen_k - seqlen_q - left)
        for j in range(first // page_size, -(-seqlen_k // page_size)):
            if not 0 <= pages[j] < num_pages:
                raise ArgumentError(
                    message(
                        f"page_table[{i}, {j}]",
                        f"a page id from 0 to {num_pages - 1}",
                        pages[j],
                        f"Sequence {i} has {seqlen_k} keys of {page_size} a page: give each page an id.",
                    )
                )
