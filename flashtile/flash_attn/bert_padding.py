"""Padded batches to packed sequences and back: FlashAttention's ``bert_padding``, in differentiable torch operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from flashtile.arguments import is_int
from flashtile.errors import ArgumentError, ShapeError, message


class IndexFirstAxis(torch.autograd.Function):
    """Rows of a tensor by their indices, of which none comes twice."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, input: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(indices)
        ctx.rows = input.shape[0]  # type: ignore[attr-defined]
        return input[indices]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (indices,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return _placed(grad, indices, ctx.rows), None  # type: ignore[attr-defined]


class IndexPutFirstAxis(torch.autograd.Function):
    """The inverse of IndexFirstAxis: rows to their places among ``first_axis_dim``, zeros elsewhere."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int) -> torch.Tensor:
        ctx.save_for_backward(indices)
        return _placed(values, indices, first_axis_dim)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (indices,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad[indices], None, None


class IndexFirstAxisResidual(torch.autograd.Function):
    """Rows by their indices, and the whole tensor beside them, for what goes around a layer over the rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, input: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(indices)
        return input[indices], input.detach()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor, grad_residual: torch.Tensor) -> tuple[torch.Tensor, None]:
        (indices,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_residual.index_add(0, indices, grad), None


def index_first_axis(input: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """``input[indices]`` (len(indices), ...), for int64 ``indices`` (n,) of which none comes twice; its gradient needs no atomics."""
    rows: torch.Tensor = IndexFirstAxis.apply(input, indices)  # type: ignore[no-untyped-call]
    return rows


def index_put_first_axis(values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int) -> torch.Tensor:
    """Zeros (first_axis_dim, ...) with ``values`` (n, ...) in the rows of ``indices`` (n,)."""
    placed: torch.Tensor = IndexPutFirstAxis.apply(values, indices, first_axis_dim)  # type: ignore[no-untyped-call]
    return placed


def index_first_axis_residual(input: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``input[indices]`` and ``input``."""
    both: tuple[torch.Tensor, torch.Tensor] = IndexFirstAxisResidual.apply(input, indices)  # type: ignore[no-untyped-call]
    return both


def unpad_input(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor, unused_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Takes the tokens of a padded batch that a mask selects, side by side.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or int: 1 where a token counts.
        unused_mask: like attention_mask: tokens that are allocated but not used. They are packed too.

    Returns:
        hidden_states: (total, ...), the tokens that either mask selects.
        indices: (total,) int64, where they stood in the flattened batch.
        cu_seqlens: (batch + 1,) int32, where each sequence starts, unused tokens included.
        max_seqlen_in_batch: the longest sequence, unused tokens included; to know it, the host waits for the device.
        seqused: (batch,) int32, the tokens of each sequence that ``attention_mask`` selects.
    """
    _check_mask("attention_mask", hidden_states, attention_mask)
    allocated = attention_mask
    if unused_mask is not None:
        _check_mask("unused_mask", hidden_states, unused_mask)
        allocated = attention_mask + unused_mask
    lengths = allocated.sum(dim=-1, dtype=torch.int32)
    used = lengths if unused_mask is None else attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(allocated.flatten(), as_tuple=False).flatten()
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, _starts_of(lengths), _longest(lengths), used


def unpad_input_for_concatenated_sequences(
    hidden_states: torch.Tensor, attention_mask_in_length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Takes the tokens of a padded batch whose rows hold several short sequences each.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen) int: in each row the lengths of its sequences, in order, and zeros; so
            ``[[2, 3, 0, 0, 0, 0]]`` are tokens 0 and 1 of one sequence, 2 to 4 of the next, and one token of padding.

    Returns:
        hidden_states: (total, ...), the tokens of all sequences.
        indices: (total,) int64, where they stood in the flattened batch.
        cu_seqlens: (sequences + 1,) int32, where each sequence starts.
        max_seqlen_in_batch: the longest sequence; to know it, the host waits for the device.
    """
    _check_mask("attention_mask_in_length", hidden_states, attention_mask_in_length)
    filled = attention_mask_in_length.sum(dim=-1, keepdim=True)
    real = torch.arange(attention_mask_in_length.shape[-1], device=filled.device) < filled
    indices = torch.nonzero(real.flatten(), as_tuple=False).flatten()
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[torch.nonzero(lengths, as_tuple=False).flatten()].to(torch.int32)
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, _starts_of(lengths), _longest(lengths)


def pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """The inverse of `unpad_input`: (batch, seqlen, ...) with zeros where ``indices`` names no token.

    Args:
        hidden_states: (total, ...).
        indices: (total,) int64, where each token stands in the flattened batch.
    """
    if not isinstance(hidden_states, torch.Tensor) or hidden_states.ndim < 1:
        raise ArgumentError(message("hidden_states", "a tensor (total, ...)", repr(hidden_states), "It is what unpad_input gave first."))
    if not isinstance(indices, torch.Tensor) or indices.shape != hidden_states.shape[:1]:
        got = f"shape {tuple(indices.shape)}" if isinstance(indices, torch.Tensor) else repr(indices)
        raise ArgumentError(message("indices", f"a tensor ({hidden_states.shape[0]},)", got, "It is what unpad_input gave second."))
    for name, count in (("batch", batch), ("seqlen", seqlen)):
        if not is_int(count) or count < 0:
            raise ArgumentError(message(name, "an int that is not negative", repr(count), "It is a size of the padded batch."))
    return index_put_first_axis(hidden_states, indices, batch * seqlen).view(batch, seqlen, *hidden_states.shape[1:])


def _placed(values: torch.Tensor, indices: torch.Tensor, rows: int) -> torch.Tensor:
    placed = values.new_zeros((rows, *values.shape[1:]))
    placed[indices] = values
    return placed


def _starts_of(lengths: torch.Tensor) -> torch.Tensor:
    return F.pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0))


def _longest(lengths: torch.Tensor) -> int:
    return int(lengths.max()) if lengths.numel() else 0


def _check_mask(name: str, hidden_states: torch.Tensor, mask: torch.Tensor) -> None:
    for argument, tensor in (("hidden_states", hidden_states), (name, mask)):
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentError(message(argument, "a tensor (batch, seqlen, ...)", repr(tensor), "Lists become one by torch.tensor."))
    if hidden_states.ndim < 2 or mask.shape != hidden_states.shape[:2]:
        got = f"shape {tuple(mask.shape)} beside hidden_states {tuple(hidden_states.shape)}"
        raise ShapeError(message(name, "(batch, seqlen), hidden_states' first two dimensions", got, "Pass one number a token."))
