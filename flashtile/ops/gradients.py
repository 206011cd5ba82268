"""What autograd does for attention, eager or as an operator: what is kept for the backward call, and what that call is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flashtile.errors import UnsupportedError

Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""Of q, k, v and sinks; None where nobody wants one."""


def keep(
    ctx: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    seqused_k: torch.Tensor | None,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    softcap: float,
    scale: float | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    allow_tf32: bool,
    deterministic: bool | None,
    dropout_p: float,
    seed: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Keeps a forward call's arguments and results.

    All tensors go through ``save_for_backward``: so a change in place is noticed, and hooks on saved tensors (checkpointing,
    offloading) see them.
    """
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_k, sinks, alibi_slopes, seed)
    ctx.numbers = (max_seqlen_q, max_seqlen_k, causal, window, softcap, scale, allow_tf32, deterministic, dropout_p)
    ctx.set_materialize_grads(False)


def gradients(
    ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None, wanted: tuple[bool, ...], backward: Callable[..., Gradients]
) -> Gradients:
    """The gradients of q, k, v and sinks as far as they are ``wanted``, by ``backward``; dout or dlse is None where none flows."""
    if dout is None and dlse is None:
        return None, None, None, None
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_k, sinks, alibi_slopes, seed = ctx.saved_tensors
    max_seqlen_q, max_seqlen_k, causal, window, softcap, scale, allow_tf32, deterministic, dropout_p = ctx.numbers
    if dout is None:
        dout = torch.zeros_like(out)
    with torch.no_grad():
        found = backward(
            q, k, v, out, lse, dout, dlse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, causal, window,
            softcap, scale, sinks, alibi_slopes, allow_tf32, deterministic, wanted[3], dropout_p, seed,
        )  # fmt: skip
    dq, dk, dv, dsinks = (grad if want else None for grad, want in zip(found, wanted))
    if torch.is_grad_enabled():  # with create_graph=True
        return FirstDerivative.apply(dq, dk, dv, dsinks, q, k, v, sinks, dout, dlse)  # type: ignore[no-any-return, no-untyped-call]
    return dq, dk, dv, dsinks


class FirstDerivative(torch.autograd.Function):
    """Gradients as they are, of which a gradient in turn is an error: without this they would count as constants."""

    @staticmethod
    def forward(
        ctx: Any,
        dq: torch.Tensor | None,
        dk: torch.Tensor | None,
        dv: torch.Tensor | None,
        dsinks: torch.Tensor | None,
        *depends_on: torch.Tensor | None,
    ) -> Gradients:
        return dq, dk, dv, dsinks

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> None:
        raise UnsupportedError("attention has no second derivative: its gradients cannot be differentiated again.")
