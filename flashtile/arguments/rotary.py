"""Checks of the arguments of rotary position embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashtile.arguments.tensors import check_tensors
from flashtile.arguments.values import check_bool, is_int
from flashtile.errors import ArgumentError, DtypeError, ShapeError, UnsupportedError, message

if TYPE_CHECKING:
    import torch


def check_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: object,
    seqlen_offsets: int | torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
) -> None:
    """Raises for a wrong argument; no tensor is read."""
    import torch

    offsets = seqlen_offsets if isinstance(seqlen_offsets, torch.Tensor) else None
    check_tensors({"x": x, "cos": cos, "sin": sin}, seqlen_offsets=offsets, cu_seqlens=cu_seqlens)
    check_bool("interleaved", interleaved)
    rank, form = (4, "(batch, seqlen, heads, dim)") if cu_seqlens is None else (3, "(tokens, heads, dim) beside cu_seqlens")
    if x.ndim != rank:
        raise ShapeError(message("x", form, f"shape {tuple(x.shape)}", "Packed tokens come with cu_seqlens."))
    _check_floats("x", x)
    check_tables("cos", cos, "sin", sin, x.shape[-1])
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or batch < 0):
        got = f"shape {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        raise ShapeError(message("cu_seqlens", "(batch + 1,) int32", got, "Cast it with .to(torch.int32)."))
    if cu_seqlens is not None and not (is_int(max_seqlen) and max_seqlen >= 0):  # type: ignore[operator]
        raise ArgumentError(message("max_seqlen", "an int beside cu_seqlens", repr(max_seqlen), "The device is not read for it."))
    if offsets is None and not is_int(seqlen_offsets):
        raise ArgumentError(message("seqlen_offsets", "an int or a tensor (batch,)", repr(seqlen_offsets), "Use 0 for no offset."))
    if offsets is not None and (offsets.shape != (batch,) or offsets.dtype not in (torch.int32, torch.int64)):
        got = f"shape {tuple(offsets.shape)} {offsets.dtype}"
        raise ShapeError(message("seqlen_offsets", f"({batch},) int32 or int64", got, "One offset a sequence."))


def check_tables(name_cos: str, cos: torch.Tensor, name_sin: str, sin: torch.Tensor, head_dim: int) -> None:
    """cos and sin, by the names that a caller knows them by, for heads of ``head_dim`` elements."""
    _check_floats(name_cos, cos)
    both = f"{name_cos} and {name_sin}"
    if cos.ndim != 2 or sin.shape != cos.shape or sin.dtype != cos.dtype:
        got = f"{tuple(cos.shape)} {cos.dtype} and {tuple(sin.shape)} {sin.dtype}"
        raise ShapeError(message(both, "(positions, rotary_dim / 2), of one shape and dtype", got, "Build them together."))
    if 2 * cos.shape[1] > head_dim:
        got = f"a rotary_dim of {2 * cos.shape[1]} for heads of {head_dim}"
        raise ShapeError(message(name_cos, "at most half of a head's elements a row", got, "rotary_dim is at most the head's dim."))
    if cos.requires_grad or sin.requires_grad:
        raise UnsupportedError(message(both, "tensors that need no gradient", "requires_grad=True", "Detach them."))


def _check_floats(name: str, tensor: torch.Tensor) -> None:
    import torch

    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise DtypeError(message(name, "float16, bfloat16 or float32", tensor.dtype, "Cast it first."))
