"""The debug switch: lengths and page ids, which live on the device and are otherwise clamped and masked there, checked on the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise

import torch

from flashtile.errors import ArgumentError, message
from flashtile.kernels.call import AppendCall, DecodeCall, ForwardCall

CHECKING: ContextVar[bool] = ContextVar("flashtile_checking", default=False)


@contextmanager
def checked() -> Iterator[None]:
    """Within ``with flashtile.checked():`` every call reads its lengths and page table on the host and complains.

    Raises ArgumentError that names the first entry of ``seqlens_k`` beyond the cache's capacity, of ``seqused_k`` beyond
    what its sequence has, of ``cu_seqlens_q`` or ``cu_seqlens_k`` that is out of order or out of its tensor, of more queries
    than ``max_seqlen_q``, of more keys than ``max_seqlen_k`` where a gradient is needed, or of ``page_table`` outside the
    cache where a query can see it. Without the switch such entries are clamped or masked on the device: they are never read
    or written outside, but the result is not what was meant.

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
    capacity = call.k_cache.shape[1]
    if call.page_table is not None:
        capacity *= call.page_table.shape[1]
    seqlens_k = _checked_lengths("seqlens_k", call.seqlens_k, [capacity] * len(seqlens_q), "the cache's capacity")
    if call.leftpad_k is not None:
        _checked_lengths("leftpad_k", call.leftpad_k, seqlens_k, "all keys of the sequence")
    if call.page_table is not None:
        _check_pages(call.page_table, call.k_cache, seqlens_q, seqlens_k, left)


def check_forward_values(call: ForwardCall, left: int | None) -> None:
    """Raises ArgumentError for the first bad length or page id; ``left`` is the window's left side, waits for the device."""
    seqlens_q = _query_lengths(call, call.max_seqlen_q)
    if call.cu_seqlens_k is not None:
        room = _lengths_between("cu_seqlens_k", call.cu_seqlens_k, call.k.shape[0])
    else:
        pages = 1 if call.page_table is None else call.page_table.shape[1]
        room = [pages * call.k.shape[1]] * len(seqlens_q)
    if call.seqused_k is None:
        return
    has = "what the sequence has" if call.page_table is None else "what its pages hold"
    seqlens_k = _checked_lengths("seqused_k", call.seqused_k, room, has)
    if call.page_table is not None:
        _check_pages(call.page_table, call.k, seqlens_q, seqlens_k, left)


def check_append_values(call: AppendCall) -> None:
    """Raises ArgumentError for the first bad length, page id or start of an append, waits for the device."""
    pages = None if call.page_table is None else call.page_table.tolist()
    capacity = call.k_cache.shape[1] * (1 if call.page_table is None else call.page_table.shape[1])
    batch = call.seqlens.shape[0]
    lengths = _checked_lengths("seqlens_k", call.seqlens, [capacity] * batch, "the cache's capacity")
    new = [call.k.shape[1]] * batch
    if call.cu_seqlens_k_new is not None:
        new = _lengths_between("cu_seqlens_k_new", call.cu_seqlens_k_new, call.k.shape[0], "k")
    for i, (length, more) in enumerate(zip(lengths, new)):
        if length + more > capacity:
            got = f"{length} and {more} new ones"
            raise ArgumentError(message(f"seqlens_k[{i}]", f"room for new keys in a cache of {capacity}", got, "Make room for more keys."))
        if pages is not None and more:
            page_size = call.k_cache.shape[1]
            _check_ids(i, pages[i], range(length // page_size, -(-(length + more) // page_size)), call.k_cache, length + more)


def check_longest_keys(cu_seqlens_k: torch.Tensor, total_k: int, max_seqlen_k: int) -> None:
    """Raises ArgumentError for the first sequence of packed keys that is longer than it was said to be, waits for the device."""
    for i, length in enumerate(_lengths_between("cu_seqlens_k", cu_seqlens_k, total_k)):
        if length > max_seqlen_k:
            raise ArgumentError(
                message(
                    f"cu_seqlens_k[{i + 1}]",
                    f"at most max_seqlen_k ({max_seqlen_k}) keys in sequence {i}, since a gradient is needed",
                    length,
                    "Pass the longest sequence's length as max_seqlen_k.",
                )
            )


def _checked_lengths(name: str, lengths: torch.Tensor, room: list[int], has: str) -> list[int]:
    values: list[int] = lengths.tolist()
    for i, (value, most) in enumerate(zip(values, room)):
        if not 0 <= value <= most:
            raise ArgumentError(
                message(f"{name}[{i}]", f"a length from 0 to {has}, {most}", value, "Make room for more keys, or correct the length.")
            )
    return values


def _query_lengths(call: DecodeCall | ForwardCall, max_seqlen_q: int | None) -> list[int]:
    if call.cu_seqlens_q is None:
        return [call.q.shape[1]] * call.q.shape[0]
    lengths = _lengths_between("cu_seqlens_q", call.cu_seqlens_q, call.q.shape[0])
    longest = call.q.shape[0] if max_seqlen_q is None else max_seqlen_q
    for i, length in enumerate(lengths):
        if length > longest:
            raise ArgumentError(
                message(
                    f"cu_seqlens_q[{i + 1}]",
                    f"at most max_seqlen_q ({longest}) queries in sequence {i}",
                    length,
                    "Pass the longest query's length as max_seqlen_q.",
                )
            )
    return lengths


def _lengths_between(name: str, cu_seqlens: torch.Tensor, total: int, tensor: str = "") -> list[int]:
    """The lengths of packed sequences by where they start in ``tensor``, which the name ends with if not told."""
    tensor = tensor or name[-1]
    starts: list[int] = cu_seqlens.tolist()
    if starts[0] != 0:
        raise ArgumentError(message(f"{name}[0]", "0", starts[0], f"The first sequence starts at {tensor}'s first row."))
    for i, (start, end) in enumerate(pairwise(starts)):
        if not start <= end <= total:
            raise ArgumentError(
                message(f"{name}[{i + 1}]", f"a row from {start} to total_{tensor} ({total})", end, "Pass the running sum of the lengths.")
            )
    return [end - start for start, end in pairwise(starts)]


def _check_pages(page_table: torch.Tensor, k: torch.Tensor, seqlens_q: list[int], seqlens_k: list[int], left: int | None) -> None:
    page_size = k.shape[1]
    for i, (seqlen_q, seqlen_k, pages) in enumerate(zip(seqlens_q, seqlens_k, page_table.tolist())):
        first = 0 if left is None else max(0, seqlen_k - seqlen_q - left)
        _check_ids(i, pages, range(first // page_size, -(-seqlen_k // page_size)), k, seqlen_k)


def _check_ids(sequence: int, pages: list[int], used: range, k: torch.Tensor, seqlen_k: int) -> None:
    num_pages, page_size = k.shape[:2]
    for j in used:
        if not 0 <= pages[j] < num_pages:
            raise ArgumentError(
                message(
                    f"page_table[{sequence}, {j}]",
                    f"a page id from 0 to {num_pages - 1}",
                    pages[j],
                    f"Sequence {sequence} has {seqlen_k} keys of {page_size} a page: give each page an id.",
                )
            )
