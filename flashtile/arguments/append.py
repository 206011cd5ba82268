"""Checks of the arguments of an append to a cache, with rotary embeddings or without."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashtile.arguments.keys import check_cache, check_heads
from flashtile.arguments.quantised import check_kv_scales
from flashtile.arguments.queries import check_queries, check_starts
from flashtile.arguments.rotary import check_tables
from flashtile.arguments.tensors import check_int32, check_last_dim, check_tensors, check_writable
from flashtile.arguments.values import check_bool
from flashtile.errors import ArgumentError, DtypeError, ShapeError, message

if TYPE_CHECKING:
    import torch


def check_append(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seqlens_k: torch.Tensor,
    page_table: torch.Tensor | None,
    cu_seqlens_k_new: torch.Tensor | None,
    q: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int | None,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
    rotary_seqlens: torch.Tensor | None,
    rotary_interleaved: object,
    queries_advance: object,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Raises for a wrong argument; no tensor is read."""
    check_tensors(
        {"k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "seqlens_k": seqlens_k}, page_table=page_table,
        cu_seqlens_k_new=cu_seqlens_k_new, q=q, cu_seqlens_q=cu_seqlens_q, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
        rotary_seqlens=rotary_seqlens, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    check_bool("rotary_interleaved", rotary_interleaved)
    check_bool("queries_advance", queries_advance)
    check_int32("seqlens_k", seqlens_k, rank=1)
    batch = seqlens_k.shape[0]
    heads_kv, _, _, _ = check_cache(k_cache, v_cache, page_table, batch)
    check_kv_scales(k_cache, heads_kv, batch, k_scale=k_scale, v_scale=v_scale)
    _check_new("k", k, k_cache, cu_seqlens_k_new, batch)
    _check_new("v", v, v_cache, cu_seqlens_k_new, batch)
    if k.dtype != v.dtype or k_cache.dtype != v_cache.dtype:
        got = f"{k.dtype}, {v.dtype}, {k_cache.dtype} and {v_cache.dtype}"
        raise DtypeError(message("k, v and their caches", "one dtype for both, new and stored", got, "Cast one of them."))
    if k.dtype == k_cache.dtype and (k_scale is not None or v_scale is not None):
        raise ArgumentError(message("k_scale and v_scale", f"None beside k of the cache's {k.dtype}", "a tensor", "Codes are not scaled."))
    if k.shape[:-1] != v.shape[:-1]:
        raise ShapeError(
            message("v", f"k's leading shape {tuple(k.shape[:-1])}", tuple(v.shape[:-1]), "Only the last dimension may differ.")
        )
    if (rotary_cos is None) != (rotary_sin is None):
        raise ArgumentError(message("rotary_cos and rotary_sin", "both or neither", "one of them", "Build them together."))
    if rotary_seqlens is not None:
        if rotary_cos is None:
            raise ArgumentError(message("rotary_seqlens", "None without rotary_cos", "a tensor", "Nothing is turned."))
        check_int32("rotary_seqlens", rotary_seqlens, rank=1)
        if rotary_seqlens.shape[0] != batch:
            got = f"shape {tuple(rotary_seqlens.shape)}"
            raise ShapeError(message("rotary_seqlens", f"({batch},), a position for each sequence", got, "Pass shape (batch,)."))
    if q is None:
        for name, given in (("cu_seqlens_q", cu_seqlens_q), ("max_seqlen_q", max_seqlen_q)):
            if given is not None:
                raise ArgumentError(message(name, "None without q", type(given).__name__, "It says where q's sequences lie."))
    else:
        check_queries(q, cu_seqlens_q, max_seqlen_q, batch)
        check_heads(q.shape[-2], heads_kv, q.shape[-1], k=k)
    if rotary_cos is not None and rotary_sin is not None:
        check_tables("rotary_cos", rotary_cos, "rotary_sin", rotary_sin, k.shape[-1])
        import torch

        for name, turned in (("k", k), ("q", q)):
            if turned is not None and turned.dtype not in (torch.float16, torch.bfloat16, torch.float32):
                raise DtypeError(message(name, "float16, bfloat16 or float32 beside rotary_cos", turned.dtype, "Turn it before."))
        if q is not None and q.dtype != k.dtype:
            raise DtypeError(message("q", f"k's dtype, {k.dtype}", q.dtype, f"Cast it with q.to({k.dtype})."))


def _check_new(name: str, new: torch.Tensor, cache: torch.Tensor, cu_seqlens_k_new: torch.Tensor | None, batch: int) -> None:
    """New keys or values beside their cache."""
    heads, dim = cache.shape[-2:]
    form = f"(batch, seqlen_new, {heads}, {dim})" if cu_seqlens_k_new is None else f"(total_new, {heads}, {dim}) beside cu_seqlens_k_new"
    if new.ndim != (4 if cu_seqlens_k_new is None else 3) or tuple(new.shape[-2:]) != (heads, dim):
        raise ShapeError(message(name, form, f"shape {tuple(new.shape)}", f"{name}_cache's heads, and its last dimension."))
    if cu_seqlens_k_new is None and new.shape[0] != batch:
        raise ShapeError(message(name, f"{batch} sequences, one for each length", f"shape {tuple(new.shape)}", "Lengths are (batch,)."))
    if cu_seqlens_k_new is not None:
        check_starts("cu_seqlens_k_new", cu_seqlens_k_new, batch)
    check_last_dim(name, new)
    import torch

    floats = new.dtype in (torch.float16, torch.bfloat16, torch.float32)
    if new.dtype != cache.dtype and not (floats and cache.dtype in (torch.float8_e4m3fn, torch.int8)):
        raise DtypeError(message(name, f"{name}_cache's dtype, {cache.dtype}", new.dtype, f"Cast it with {name}.to({cache.dtype})."))
    check_writable(f"{name}_cache", cache)
