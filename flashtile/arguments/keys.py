"""Checks of k and v: one length for all sequences, packed, a cache, or its pages; and how they go with q."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashtile.arguments.counts import check_most
from flashtile.arguments.queries import check_starts
from flashtile.arguments.tensors import check_int32, check_last_dim
from flashtile.arguments.values import is_int
from flashtile.errors import ArgumentError, ShapeError, message

if TYPE_CHECKING:
    import torch

_PAGES = "(num_pages, page_size, num_heads_kv, head_dim)"


def check_lengths(seqlens_k: torch.Tensor) -> int:
    check_int32("seqlens_k", seqlens_k, rank=1)
    return int(seqlens_k.shape[0])


def check_leftpad(leftpad_k: torch.Tensor | None, batch: int) -> None:
    if leftpad_k is None:
        return
    check_int32("leftpad_k", leftpad_k, rank=1)
    if leftpad_k.shape[0] != batch:
        got = f"shape {tuple(leftpad_k.shape)}"
        raise ShapeError(message("leftpad_k", f"{batch} numbers, one for each sequence", got, "Pass shape (batch,)."))


def check_cache(k_cache: torch.Tensor, v_cache: torch.Tensor, page_table: torch.Tensor | None, batch: int) -> tuple[int, int, int, int]:
    """(key heads, the value's head_dim, page size or 0, capacity) of a decode call's cache."""
    shape = "(batch, capacity, num_heads_kv, head_dim)" if page_table is None else _PAGES
    heads_kv, head_dim_v = _check_pair(
        "k_cache", k_cache, "v_cache", v_cache, shape, "A lone sequence or page needs its dimension too: [None]."
    )
    if page_table is not None:
        return heads_kv, head_dim_v, *_check_pages("k_cache", k_cache, page_table, batch)
    if k_cache.shape[0] != batch:
        raise ShapeError(
            message(
                "k_cache",
                f"{batch} sequences, one for each length in seqlens_k",
                f"shape {tuple(k_cache.shape)}",
                "Pass page_table for a paged cache.",
            )
        )
    check_most("k_cache", k_cache.shape[1], "keys of a sequence")
    return heads_kv, head_dim_v, 0, k_cache.shape[1]


def check_keys(
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    page_table: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    batch: int,
    packed: bool,
) -> tuple[int, int, int, int]:
    """(key heads, the value's head_dim, page size or 0, the most keys of a sequence) of a forward call; ``packed`` says how q comes."""
    if seqused_k is not None:
        check_int32("seqused_k", seqused_k, rank=1)
        if seqused_k.shape[0] != batch:
            raise ShapeError(
                message("seqused_k", f"{batch} numbers, one for each sequence", f"shape {tuple(seqused_k.shape)}", "Pass shape (batch,).")
            )
    if not packed:
        packed_keys = "Packed keys need cu_seqlens_k: use attention_varlen."
        heads_kv, head_dim_v = _check_pair("k", k, "v", v, "(batch, seqlen_k, num_heads_kv, head_dim)", packed_keys)
        if k.shape[0] != batch:
            raise ShapeError(message("k", f"q's {batch} sequences", f"shape {tuple(k.shape)}", "q, k and v share the first dimension."))
        check_most("k", k.shape[1], "keys of a sequence")
        return heads_kv, head_dim_v, 0, k.shape[1]
    if page_table is None:
        if cu_seqlens_k is None:
            raise ArgumentError(
                message("cu_seqlens_k", "where each sequence's keys start, or page_table and seqused_k", None, "Pass batch + 1 starts.")
            )
        pages = "Pages need page_table and seqused_k in the place of cu_seqlens_k; sequences of one length are packed by .flatten(0, 1)."
        heads_kv, head_dim_v = _check_pair("k", k, "v", v, "(total_k, num_heads_kv, head_dim)", pages)
        check_starts("cu_seqlens_k", cu_seqlens_k, batch)
        check_most("k", k.shape[0], "packed keys")
        return heads_kv, head_dim_v, 0, k.shape[0]
    if cu_seqlens_k is not None:
        raise ArgumentError(
            message(
                "cu_seqlens_k", "None beside page_table", "both", "Keys are packed or in pages; seqused_k has the lengths of the latter."
            )
        )
    if seqused_k is None:
        raise ArgumentError(
            message(
                "seqused_k",
                "each sequence's number of keys beside page_table",
                None,
                "Pass (batch,) int32: pages do not say how full they are.",
            )
        )
    heads_kv, head_dim_v = _check_pair("k", k, "v", v, _PAGES, "Packed keys have cu_seqlens_k, and no page_table.")
    return heads_kv, head_dim_v, *_check_pages("k", k, page_table, batch)


def _check_pair(name_k: str, k: torch.Tensor, name_v: str, v: torch.Tensor, shape: str, other_ranks: str) -> tuple[int, int]:
    """(key heads, the value's head_dim) of k and v of ``shape``, which names the dimensions; ``other_ranks`` helps who has others."""
    for name, tensor in ((name_k, k), (name_v, v)):
        if tensor.ndim != shape.count(",") + 1:
            raise ShapeError(message(name, f"shape {shape}", f"shape {tuple(tensor.shape)}", other_ranks))
        check_last_dim(name, tensor)
    if k.shape[:-1] != v.shape[:-1]:
        raise ShapeError(
            message(name_v, f"{name_k}'s leading shape {tuple(k.shape[:-1])}", tuple(v.shape[:-1]), "Only the last dimension may differ.")
        )
    return k.shape[-2], v.shape[-1]


def _check_pages(name: str, k: torch.Tensor, page_table: torch.Tensor, batch: int) -> tuple[int, int]:
    """(page size, the most keys that a row of the table holds)."""
    check_int32("page_table", page_table, rank=2)
    if page_table.shape[0] != batch:
        raise ShapeError(
            message(
                "page_table", f"{batch} rows, one for each sequence", f"shape {tuple(page_table.shape)}", "Pass shape (batch, max_pages)."
            )
        )
    if k.shape[1] < 1:
        raise ShapeError(message(name, "a page size of at least 1", f"shape {tuple(k.shape)}", "Pages lie in the second dimension."))
    check_most(name, k.shape[0], "pages")
    capacity = page_table.shape[1] * k.shape[1]
    check_most("page_table", capacity, "keys of a sequence, max_pages * page_size")
    return k.shape[1], capacity


def check_hint(max_seqlen_k: int | None, capacity: int, what: str = "the cache's capacity") -> int:
    """The keys to plan for: at least one wherever there is room for any, since the hint changes no result."""
    if max_seqlen_k is None:
        return capacity
    if not is_int(max_seqlen_k) or not 0 <= max_seqlen_k <= capacity:
        raise ArgumentError(
            message(
                "max_seqlen_k", f"an int from 0 to {what}, {capacity} keys", repr(max_seqlen_k), "Leave it out to plan for all of them."
            )
        )
    return max(max_seqlen_k, min(capacity, 1))


def check_heads(heads_q: int, heads_kv: int, head_dim: int, **keys: torch.Tensor) -> None:
    """``keys`` is k alone, by its name."""
    [(name, k)] = keys.items()
    if k.shape[-1] != head_dim:
        raise ShapeError(
            message(name, f"q's head_dim, {head_dim}", k.shape[-1], f"q and {name} share the last dimension; v's may be another.")
        )
    if heads_kv < 1 or heads_q < 1 or heads_q % heads_kv:
        raise ShapeError(
            message(
                "q",
                f"a number of heads that is a positive multiple of {name}'s {heads_kv}",
                heads_q,
                "Every key head serves the same number of query heads; where heads come before tokens, pass .transpose(-3, -2).",
            )
        )
