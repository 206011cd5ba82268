"""Checks of a call that autograd follows: what has a gradient, and what has none."""

from __future__ import annotations

from flashtile.errors import ArgumentError, UnsupportedError, message

_INSTEAD = "Call it under torch.no_grad(), or detach what needs no gradient."


def needs_gradient(*tensors: object) -> bool:
    """Whether autograd has to follow a call with these arguments, of which some may be None, or no tensors at all."""
    import torch

    return torch.is_grad_enabled() and any(isinstance(tensor, torch.Tensor) and tensor.requires_grad for tensor in tensors)


def check_differentiable(*, page_table: object, alibi_slopes: object, out: object) -> None:
    """For calls that need a gradient: raises for what has none, instead of detaching a result in silence."""
    check_no_out(out)
    if getattr(alibi_slopes, "requires_grad", False):
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


def check_no_out(out: object) -> None:
    """Raises ArgumentError for an ``out`` that is given in a call that needs a gradient."""
    if out is not None:
        raise ArgumentError(
            message(
                "out",
                "None where a tensor requires a gradient",
                "a tensor to write to",
                f"Autograd does not follow what is written to a given tensor: leave it out to have it allocated. {_INSTEAD}",
            )
        )


def check_no_tangent(*tensors: object) -> None:
    """Raises UnsupportedError for a dual tensor of forward-mode differentiation, whose tangent no kernel would see."""
    import torch
    from torch.autograd import forward_ad

    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise UnsupportedError("There is no forward mode AD of these calls: expected tensors without a tangent. Use reverse mode.")
