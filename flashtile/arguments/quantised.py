"""Checks of a quantised cache: its dtype beside q's, and the scales that its values are multiplied by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashtile.arguments.tensors import check_same_dtype
from flashtile.errors import ArgumentError, DtypeError, ShapeError, message

if TYPE_CHECKING:
    import torch


def check_cache_dtype(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Both caches have q's dtype, or beside a 16-bit q both are float8_e4m3fn, or both int8."""
    import torch

    quantised = (torch.float8_e4m3fn, torch.int8)
    if k_cache.dtype not in quantised and v_cache.dtype not in quantised:
        check_same_dtype(q, k_cache=k_cache, v_cache=v_cache)
        return
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise DtypeError(message("q", "dtype float16 or bfloat16 beside a quantised cache", q.dtype, "Cast it with q.to(torch.bfloat16)."))
    if v_cache.dtype != k_cache.dtype:
        raise DtypeError(
            message("v_cache", f"k_cache's dtype, {k_cache.dtype}", v_cache.dtype, "Keys and values are quantised to one dtype.")
        )


def check_kv_scales(k_cache: torch.Tensor, heads_kv: int, batch: int, **scales: torch.Tensor | None) -> tuple[str, str]:
    """What k_scale and v_scale, the two named ``scales``, are given for each of: "tensor", "head", "sequence", or "none".

    Each is float32: of one element, (heads_kv,), or (batch, heads_kv), with any strides.
    """
    import torch

    found: list[str] = []
    for name, scale in scales.items():
        if scale is None:
            found.append("none")
            continue
        if k_cache.dtype not in (torch.float8_e4m3fn, torch.int8):
            raise ArgumentError(
                message(
                    name,
                    "None beside a cache that is not quantised",
                    f"a tensor beside k_cache of {k_cache.dtype}",
                    "Scales are for caches of float8_e4m3fn or int8: leave it out, or use scale= for scores.",
                )
            )
        if scale.dtype != torch.float32:
            raise DtypeError(message(name, "dtype float32", scale.dtype, f"Use {name}.float()."))
        granularity = granularity_of(tuple(scale.shape), heads_kv, batch)
        if granularity is None:
            raise ShapeError(
                message(
                    name,
                    f"one element, shape ({heads_kv},) or ({batch}, {heads_kv})",
                    f"shape {tuple(scale.shape)}",
                    "One value for the cache, for each key head, or for each sequence and key head.",
                )
            )
        found.append(granularity)
    k_scales, v_scales = found
    return k_scales, v_scales


def granularity_of(shape: tuple[int, ...], heads_kv: int, batch: int) -> str | None:
    """What a scale of that shape is for; None where it fits nothing."""
    if shape in ((), (1,), (1, 1)):
        return "tensor"
    return "head" if shape == (heads_kv,) else "sequence" if shape == (batch, heads_kv) else None
