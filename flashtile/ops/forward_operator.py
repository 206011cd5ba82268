"""The operator flashtile::forward, which is all that torch.compile sees of a forward call, and its gradient, flashtile::backward."""

from __future__ import annotations

import functools
from typing import Any

import torch

from flashtile.arguments import check_differentiable
from flashtile.errors import ArgumentError, UnsupportedError, message
from flashtile.ops.autocast import without_autocast
from flashtile.ops.backward import traced_backward
from flashtile.ops.forward import forward
from flashtile.ops.gradients import gradients, keep
from flashtile.planner.plans import ForwardPlan


@torch.library.custom_op("flashtile::forward", mutates_args=())
def forward_operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    page_table: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    scale: float | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    block_m: int | None,
    plan: str | None,
    allow_tf32: bool,
    deterministic: bool | None,
    want_lse: bool,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward` as torch.compile sees it: the plan is JSON text; lse has no element unless wanted; dropout has a seed."""
    if dropout_p and seed is None:
        raise ArgumentError(message("seed", "a tensor beside dropout_p", None, "flashtile.attention draws one by itself: call that."))
    with torch.no_grad(), without_autocast(q.device):
        out, lse = forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, page_table, seqused_k, causal,
            (window_left, window_right), softcap, scale, sinks, alibi_slopes, None, block_m,
            None if plan is None else _plan_of(plan), allow_tf32, deterministic, want_lse, dropout_p, seed,
        )  # fmt: skip
    return out, q.new_empty(0, dtype=torch.float32) if lse is None else lse


@forward_operator.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    page_table: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    scale: float | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    block_m: int | None,
    plan: str | None,
    allow_tf32: bool,
    deterministic: bool | None,
    want_lse: bool,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    *batch, queries, heads, _ = q.shape
    out = q.new_empty((*batch, queries, heads, v.shape[-1]))
    return out, q.new_empty((*batch, heads, queries) if want_lse else (0,), dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Called where autograd follows the operator: under torch.compile that is while its graph is made."""
    (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, page_table, seqused_k, causal, left, right, softcap, scale,
     sinks, alibi_slopes, _, _, allow_tf32, deterministic, want_lse, dropout_p, seed) = inputs  # fmt: skip
    check_differentiable(page_table=page_table, alibi_slopes=alibi_slopes, out=None)
    if not want_lse:
        raise UnsupportedError(
            message("want_lse", "True where a gradient is needed", want_lse, "flashtile.attention asks for it by itself: call that.")
        )
    keep(
        ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, causal, (left, right), softcap, scale, sinks,
        alibi_slopes, allow_tf32, deterministic, dropout_p, seed, *output,
    )  # fmt: skip


def _backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    needed = ctx.needs_input_grad
    dq, dk, dv, dsinks = gradients(ctx, dout, dlse, (*needed[:3], needed[14]), traced_backward)
    return dq, dk, dv, *[None] * 11, dsinks, *[None] * 8


forward_operator.register_autograd(_backward, setup_context=_keep)


@functools.lru_cache(maxsize=256)
def _plan_of(text: str) -> ForwardPlan:
    return ForwardPlan.from_json(text)
