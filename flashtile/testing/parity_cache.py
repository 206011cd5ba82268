"""Key-value caches of a Parity case, laid out in every way that flash_attn_with_kvcache takes, with NaN beside the keys."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch

from flashtile.testing.parity import OUT_FACTOR, Parity, Tensors, assert_lse_near, assert_near

Layout = Literal["full", "int", "lengths", "batch index"] | int
"""How lengths are given, or where sequences lie; a number is a page size."""


class Placed(NamedTuple):
    """A case's tensors (``k`` and ``v`` are the caches), what FlashAttention-2 is told of the cache, and what the reference is."""

    tensors: Tensors
    given: dict[str, Any]
    known: dict[str, Any]

    def given_to_three(self) -> dict[str, Any]:
        """What FlashAttention-3 is told."""
        return {"page_table" if name == "block_table" else name: value for name, value in self.given.items()}


def placed(case: Parity, layout: Layout, device: torch.device | str = "cpu") -> Placed:
    """The case's two sequences in caches as long as its keys; the second uses about a third of its own."""
    tensors = case.tensors(device)
    capacity = case.lengths_k
    if not isinstance(capacity, int) or case.batch != 2:
        raise ValueError("a cache holds two sequences of one capacity")
    lengths = torch.tensor([capacity - capacity // 16, capacity // 3], dtype=torch.int32, device=device)
    if layout == "full":
        return Placed(tensors, {}, {})
    if layout == "int":
        length = capacity - capacity // 5
        return Placed(tensors, {"cache_seqlens": length}, {"seqused_k": torch.full((2,), length)})
    if layout == "lengths":
        return Placed(tensors, {"cache_seqlens": lengths}, {"seqused_k": lengths})
    if layout == "batch index":
        index = torch.tensor([4, 1], device=device)
        caches = {name: _among_nan(tensors[name], index, 6) for name in ("k", "v")}
        given = {"cache_seqlens": lengths, "cache_batch_idx": index.to(torch.int32)}
        return Placed(tensors | caches, given, {"seqused_k": lengths, "page_table": index[:, None]})
    pages = -(-capacity // layout)
    order = torch.randperm(2 * pages + 1, generator=torch.Generator().manual_seed(1))[: 2 * pages].to(device)
    table = order.view(2, pages).to(torch.int32)
    caches = {name: _in_pages(tensors[name], order, pages, layout) for name in ("k", "v")}
    return Placed(tensors | caches, {"cache_seqlens": lengths, "block_table": table}, {"seqused_k": lengths, "page_table": table})


def assert_cache_parity(case: Parity, cache: Placed, out: torch.Tensor, lse: torch.Tensor, unseen: float) -> None:
    """Raises AssertionError unless a function's results are as near to float64 as FlashAttention's tests want outputs."""
    with torch.no_grad():
        expected, expected_lse, _ = case.expected(cache.tensors, torch.float64, **cache.known)
        in_dtype, _, _ = case.expected(cache.tensors, cache.tensors["q"].dtype, **cache.known)
    assert_near(out, expected, in_dtype, OUT_FACTOR, "out")
    assert_lse_near(lse, expected_lse, unseen)


def _among_nan(x: torch.Tensor, index: torch.Tensor, entries: int) -> torch.Tensor:
    cache = x.new_full((entries, *x.shape[1:]), math.nan)
    cache[index] = x
    return cache


def _in_pages(x: torch.Tensor, order: torch.Tensor, pages: int, page_size: int) -> torch.Tensor:
    batch, length, *rest = x.shape
    room = x.new_full((batch, pages * page_size, *rest), math.nan)
    room[:, :length] = x
    return _among_nan(room.view(batch * pages, page_size, *rest), order, len(order) + 1)
