"""The checks of a call's arguments: shapes, dtypes, strides, devices and numbers, never a tensor's values.

Each raises the error that names the argument, what was expected, what came and what would work.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flashtile.errors import ArgumentError, DtypeError, ShapeError, message

if TYPE_CHECKING:
    import torch


def check_tensors(*, q: torch.Tensor, **others: torch.Tensor | None) -> None:
    import torch

    for name, tensor in {"q": q, **others}.items():
        if tensor is None and name not in ("q", "k_cache", "v_cache", "seqlens_k"):
            continue
        if not isinstance(tensor, torch.Tensor):
            raise DtypeError(message(name, "a torch.Tensor", type(tensor).__name__, "Wrap it with torch.tensor(...)."))
        if tensor.layout != torch.strided:
            raise ShapeError(message(name, "a strided tensor", f"layout {tensor.layout}", f"Use {name}.to_dense()."))
        if tensor.device != q.device:
            raise ArgumentError(message(name, f"a tensor on q's device, {q.device}", tensor.device, f"Move it with {name}.to(q.device)."))


def check_lengths(seqlens_k: torch.Tensor) -> int:
    _check_int32("seqlens_k", seqlens_k, rank=1)
    return int(seqlens_k.shape[0])


def _check_int32(name: str, tensor: torch.Tensor, rank: int) -> None:
    import torch

    if tensor.dtype != torch.int32:
        raise DtypeError(message(name, "dtype int32", tensor.dtype, f"Use {name}.to(torch.int32)."))
    if tensor.ndim != rank:
        raise ShapeError(message(name, f"a tensor of rank {rank}", f"shape {tuple(tensor.shape)}", "Reshape it."))
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ShapeError(message(name, "a contiguous last dimension", f"strides {tensor.stride()}", f"Use {name}.contiguous()."))


def check_queries(q: torch.Tensor, cu_seqlens_q: torch.Tensor | None, max_seqlen_q: int | None, batch: int) -> tuple[int, int, int, int]:
    if cu_seqlens_q is None:
        if q.ndim != 4:
            raise ShapeError(
                message(
                    "q",
                    "shape (batch, seqlen_q, num_heads, head_dim)",
                    f"shape {tuple(q.shape)}",
                    "Packed queries (total_q, num_heads, head_dim) need cu_seqlens_q.",
                )
            )
        if q.shape[0] != batch:
            raise ShapeError(
                message("seqlens_k", f"one length for each of q's {q.shape[0]} sequences", f"{batch} lengths", "Pass shape (batch,).")
            )
        if max_seqlen_q is not None and (not is_int(max_seqlen_q) or max_seqlen_q != q.shape[1]):
            raise ArgumentError(
                message("max_seqlen_q", f"q's seqlen_q, {q.shape[1]}", max_seqlen_q, "It is only needed with cu_seqlens_q.")
            )
        total_q, seqlen_q = q.shape[0] * q.shape[1], q.shape[1]
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
        _check_int32("cu_seqlens_q", cu_seqlens_q, rank=1)
        if cu_seqlens_q.shape[0] != batch + 1:
            raise ShapeError(
                message(
                    "cu_seqlens_q",
                    f"batch + 1 = {batch + 1} entries",
                    f"{cu_seqlens_q.shape[0]}",
                    "Its first entry is 0, its last total_q.",
                )
            )
        total_q = q.shape[0]
        if max_seqlen_q is None:
            raise ArgumentError(
                message(
                    "max_seqlen_q", "the longest query of the batch with cu_seqlens_q", None, "Pass an int; the device is not read for it."
                )
            )
        if not is_int(max_seqlen_q) or not 0 <= max_seqlen_q <= total_q:
            raise ArgumentError(
                message("max_seqlen_q", f"an int from 0 to total_q ({total_q})", repr(max_seqlen_q), "Pass the longest query's length.")
            )
        seqlen_q = max_seqlen_q
    _check_last_dim("q", q)
    return total_q, seqlen_q, q.shape[-2], q.shape[-1]


def _check_last_dim(name: str, tensor: torch.Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ShapeError(
            message(
                name,
                "a contiguous last dimension (stride 1)",
                f"strides {tensor.stride()}",
                f"Use {name}.contiguous(); nothing is copied silently.",
            )
        )


def check_cache(k: torch.Tensor, v: torch.Tensor, page_table: torch.Tensor | None, batch: int) -> tuple[int, int, int, int]:
    kind = "(batch, capacity, num_heads_kv, head_dim)" if page_table is None else "(num_pages, page_size, num_heads_kv, head_dim)"
    for name, cache in (("k_cache", k), ("v_cache", v)):
        if cache.ndim != 4:
            raise ShapeError(
                message(
                    name,
                    f"shape {kind}",
                    f"shape {tuple(cache.shape)}",
                    "A cache in HND order is a transposed view: cache.transpose(1, 2).",
                )
            )
        _check_last_dim(name, cache)
    if k.shape[:3] != v.shape[:3]:
        raise ShapeError(
            message("v_cache", f"k_cache's leading shape {tuple(k.shape[:3])}", tuple(v.shape[:3]), "Only the last dimension may differ.")
        )
    if page_table is None:
        if k.shape[0] != batch:
            raise ShapeError(
                message(
                    "k_cache",
                    f"{batch} sequences, one for each length in seqlens_k",
                    f"shape {tuple(k.shape)}",
                    "Pass page_table for a paged cache.",
                )
            )
        return k.shape[2], v.shape[3], 0, k.shape[1]
    _check_int32("page_table", page_table, rank=2)
    if page_table.shape[0] != batch:
        raise ShapeError(
            message(
                "page_table", f"{batch} rows, one for each sequence", f"shape {tuple(page_table.shape)}", "Pass shape (batch, max_pages)."
            )
        )
    if k.shape[1] < 1:
        raise ShapeError(message("k_cache", "a page size of at least 1", f"shape {tuple(k.shape)}", "Pages lie in the second dimension."))
    return k.shape[2], v.shape[3], k.shape[1], page_table.shape[1] * k.shape[1]


def check_hint(max_seqlen_k: int | None, capacity: int) -> int:
    """The keys to plan for: at least one wherever the cache holds any, since the hint changes no result."""
    if max_seqlen_k is None:
        return capacity
    if not is_int(max_seqlen_k) or not 0 <= max_seqlen_k <= capacity:
        raise ArgumentError(
            message(
                "max_seqlen_k",
                f"an int from 0 to the cache's capacity, {capacity} keys",
                repr(max_seqlen_k),
                "Leave it out to plan for the capacity.",
            )
        )
    return max(max_seqlen_k, min(capacity, 1))


def check_heads(heads_q: int, heads_kv: int, head_dim: int, k: torch.Tensor) -> None:
    if k.shape[3] != head_dim:
        raise ShapeError(
            message("k_cache", f"q's head_dim, {head_dim}", k.shape[3], "q and k_cache share the last dimension; v_cache may differ.")
        )
    if heads_kv < 1 or heads_q < 1 or heads_q % heads_kv:
        raise ShapeError(
            message(
                "q",
                f"a number of heads that is a positive multiple of k_cache's {heads_kv}",
                heads_q,
                "Every key head serves the same number of query heads.",
            )
        )


def check_dtypes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None, out_dtype: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]:
    import torch

    if out_dtype is not None and not isinstance(out_dtype, torch.dtype):
        raise DtypeError(message("out_dtype", "a torch.dtype or None", repr(out_dtype), "For example out_dtype=torch.float32."))
    allowed = (torch.float16, torch.bfloat16, torch.float32)
    if q.dtype not in allowed:
        raise DtypeError(message("q", "dtype float16, bfloat16 or float32", q.dtype, "Cast it with q.to(torch.bfloat16)."))
    for name, cache in (("k_cache", k), ("v_cache", v)):
        if cache.dtype != q.dtype:
            raise DtypeError(message(name, f"q's dtype, {q.dtype}", cache.dtype, f"Cast it with {name}.to(q.dtype), or q to the cache's."))
    wanted = out_dtype or (out.dtype if out is not None else q.dtype)
    if wanted not in (q.dtype, torch.float32):
        raise DtypeError(message("out_dtype", f"q's dtype, {q.dtype}, or float32", wanted, "float32 returns partial results for merge()."))
    if out is not None and out.dtype != wanted:
        raise DtypeError(message("out", f"dtype {wanted}", out.dtype, "Let out and out_dtype agree."))
    return q.dtype, k.dtype, v.dtype, wanted


def check_out(out: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if out is None:
        return
    if tuple(out.shape) != shape:
        raise ShapeError(message("out", f"shape {shape}", f"shape {tuple(out.shape)}", "Leave it out to have it allocated."))
    _check_last_dim("out", out)
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride())):
        raise ShapeError(
            message(
                "out",
                "memory of its own for every element",
                f"strides {out.stride()}",
                "An expanded tensor cannot be written: use out.clone().",
            )
        )


def check_per_head(name: str, tensor: torch.Tensor | None, heads: int, batch: int | None) -> None:
    if tensor is None:
        return
    import torch

    shapes = [(heads,)] + ([(batch, heads)] if batch is not None else [])
    if tuple(tensor.shape) not in shapes:
        raise ShapeError(
            message(name, f"shape {' or '.join(map(str, shapes))}", f"shape {tuple(tensor.shape)}", "One value for each query head.")
        )
    if tensor.dtype != torch.float32:
        raise DtypeError(message(name, "dtype float32", tensor.dtype, f"Use {name}.float()."))
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ShapeError(message(name, "a contiguous last dimension", f"strides {tensor.stride()}", f"Use {name}.contiguous()."))


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ArgumentError(message(name, "True or False", repr(value), "Tensors and numbers are not read as switches."))


def check_number(name: str, value: object, minimum: float | None = None) -> None:
    """Raises ArgumentError unless ``value`` is a finite Python number, at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ArgumentError(message(name, "a finite Python number", repr(value), "Tensors are not read on the host."))
    if minimum is not None and value < minimum:
        raise ArgumentError(message(name, f"at least {minimum}", value, f"Use {name}=0.0 to switch it off."))
