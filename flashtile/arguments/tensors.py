"""Checks of one tensor, or of what all tensors of a call share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashtile.errors import ArgumentError, DtypeError, ShapeError, message

if TYPE_CHECKING:
    import torch


def check_tensors(required: dict[str, torch.Tensor], **optional: torch.Tensor | None) -> None:
    """Raises unless all are strided tensors, but for None in ``optional``, on the device of the first that is required."""
    import torch

    first = next(iter(required))
    for name, tensor in {**required, **optional}.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise DtypeError(message(name, "a torch.Tensor", type(tensor).__name__, "Wrap it with torch.tensor(...)."))
        if tensor.is_nested:
            raise ShapeError(
                message(name, "a strided tensor", "a nested tensor", "Sequences of unlike lengths are packed: attention_varlen.")
            )
        if tensor.layout != torch.strided:
            raise ShapeError(message(name, "a strided tensor", f"layout {tensor.layout}", f"Use {name}.to_dense()."))
        if not torch.compiler.is_compiling() and tensor.is_neg():  # compilers cannot ask, and resolve them
            raise ShapeError(
                message(name, "numbers that lie in memory as they are", "a view of their negatives", f"Use {name}.resolve_neg().")
            )
        device = required[first].device
        if tensor.device != device:
            raise ArgumentError(
                message(name, f"a tensor on {first}'s device, {device}", tensor.device, f"Move it with {name}.to({first}.device).")
            )


def check_int32(name: str, tensor: torch.Tensor, rank: int) -> None:
    import torch

    if tensor.dtype != torch.int32:
        raise DtypeError(message(name, "dtype int32", tensor.dtype, f"Use {name}.to(torch.int32)."))
    if tensor.ndim != rank:
        raise ShapeError(message(name, f"a tensor of rank {rank}", f"shape {tuple(tensor.shape)}", "Reshape it."))
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ShapeError(message(name, "a contiguous last dimension", f"strides {tensor.stride()}", f"Use {name}.contiguous()."))


def check_last_dim(name: str, tensor: torch.Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ShapeError(
            message(
                name,
                "a contiguous last dimension (stride 1)",
                f"strides {tensor.stride()}",
                f"Use {name}.contiguous(); nothing is copied silently.",
            )
        )


def check_same_dtype(q: torch.Tensor, **keys: torch.Tensor) -> None:
    import torch

    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise DtypeError(message("q", "dtype float16, bfloat16 or float32", q.dtype, "Cast it with q.to(torch.bfloat16)."))
    for name, tensor in keys.items():
        if tensor.dtype != q.dtype:
            raise DtypeError(
                message(name, f"q's dtype, {q.dtype}", tensor.dtype, f"Cast it with {name}.to(q.dtype), or q to {name}'s dtype.")
            )


def check_out_dtype(q: torch.Tensor, out: torch.Tensor | None, out_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a result that may be float32 whatever q is; ``out_dtype`` and ``out`` have to agree on it."""
    import torch

    if out_dtype is not None and not isinstance(out_dtype, torch.dtype):
        raise DtypeError(message("out_dtype", "a torch.dtype or None", repr(out_dtype), "For example out_dtype=torch.float32."))
    wanted = out_dtype or (out.dtype if out is not None else q.dtype)
    if wanted not in (q.dtype, torch.float32):
        raise DtypeError(message("out_dtype", f"q's dtype, {q.dtype}, or float32", wanted, "float32 returns partial results for merge()."))
    if out is not None and out.dtype != wanted:
        raise DtypeError(message("out", f"dtype {wanted}", out.dtype, "Let out and out_dtype agree."))
    return wanted


def check_out(out: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if out is None:
        return
    if out.dtype != dtype:
        raise DtypeError(message("out", f"dtype {dtype}", out.dtype, "Leave it out to have it allocated."))
    if tuple(out.shape) != shape:
        raise ShapeError(message("out", f"shape {shape}", f"shape {tuple(out.shape)}", "Leave it out to have it allocated."))
    check_last_dim("out", out)
    check_writable("out", out)


def check_writable(name: str, tensor: torch.Tensor) -> None:
    """Raises ShapeError for an expanded tensor, of which several elements are one."""
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride())):
        wanted, got = "memory of its own for every element", f"strides {tensor.stride()}"
        raise ShapeError(message(name, wanted, got, f"An expanded tensor cannot be written: use {name}.clone()."))


def check_per_head(name: str, tensor: torch.Tensor | None, heads: int, batch: int | None) -> None:
    """``name`` is (heads,), or where a batch is given (batch, heads) as well."""
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
