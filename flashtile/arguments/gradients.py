"""Checks of a call that autograd follows: what has a gradient, and what has none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashtile.errors import UnsupportedError, message

if TYPE_CHECKING:
    import torch

_INSTEAD = "Call it under torch.no_grad(), or detach what needs no gradient."


def needs_gradient(*tensors: object) -> bool:
    """Whether autograd has to follow a call with these arguments, of which some may be None, or no tensors at all."""
    import torch

    return torch.is_grad_enabled() and any(isinstance(tensor, torch.Tensor) and tensor.requires_grad for tensor in tensors)


def check_differentiable(*, page_table: object, alibi_slopes: torch.Tensor | None, out: torch.Tensor | None) -> None:
    """Raises UnsupportedError for what has no gradient, instead of detaching a result in silence; for calls that need one."""
    if alibi_slopes is not None and getattr(alibi_slopes, "requires_grad", False):
        raise UnsupportedError(
            message(
                "alibi_slopes",
                "a tensor that needs no gradient",
                "requires_grad=True",
                "Gradients flow to q, k, v and sinks alone: pass alibi_slopes.detach(), or call it under torch.no_grad().",
            )
        )
    if page_table is not None:
        raise UnsupportedError(
            message(
                "page_table",
                "None where q, k, v or sinks require a gradient",
                "a page table",
                f"Keys in pages have none: pack k and v, with cu_seqlens_k. {_INSTEAD}",
            )
        )
    if out is not None:
        raise UnsupportedError(
            message(
                "out",
                "None where a tensor requires a gradient",
                "a tensor to write to",
                f"Autograd does not follow what is written to a given tensor: leave it out to have it allocated. {_INSTEAD}",
            )
        )
