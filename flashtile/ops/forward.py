"""A forward call (`attention`, `attention_varlen`), and how autograd follows it where no compiler does.

On a GPU, calls of a kind that comes again take the way of `replay`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from flashtile.arguments import check_bool, check_differentiable, check_dropout, check_no_tangent, needs_gradient
from flashtile.checking import CHECKING, check_forward_values, check_longest_keys
from flashtile.dropout import draw_seed
from flashtile.facts import Key, forward_key, rounded_hint
from flashtile.kernels.call import Dropout, ForwardCall, ForwardRunner
from flashtile.ops.autocast import cast_by_autocast, taken_as_they_come
from flashtile.ops.backward import backward, traced_backward
from flashtile.ops.gradients import gradients, keep
from flashtile.ops.modes import note_written
from flashtile.ops.prepared import (
    PREPARING,
    Result,
    Shape,
    as_float,
    bound,
    check_choice,
    kernel_module,
    remember,
    results,
    runner_without_kernel,
    shape_of,
)
from flashtile.planner.choose import plan_forward
from flashtile.planner.device import Device
from flashtile.planner.plans import ForwardPlan
from flashtile.problem import Problem


class Prepared(NamedTuple):
    """One checked, planned and bound kind of call."""

    run: ForwardRunner
    shape: Shape
    note: Callable[[tuple[object, ...], ForwardCall], Callable[..., Result | None] | None] | None  # of a runner that can be repeated


_PREPARED: dict[Key, Prepared] = {}
_repeat: Callable[..., Result | None] | None = None  # forward's arguments to its result, or None for a call that was not recorded


def forward(
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
    window: tuple[int | None, int | None] | None,
    softcap: float,
    scale: float | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    out: torch.Tensor | None,
    block_m: int | None,
    plan: ForwardPlan | None,
    allow_tf32: bool,
    deterministic: bool | None,
    want_lse: bool,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> Result:
    """One forward call on the tensors' own device; the lse is None unless wanted. A ``seed`` is drawn where dropout has none."""
    global _repeat
    if forward_ad._current_level >= 0:
        check_no_tangent(q, k, v, sinks, alibi_slopes)
    hint = max_seqlen_k if max_seqlen_k is None else rounded_hint(max_seqlen_k, k, page_table, 0 if page_table is None else 1)
    args = (
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, hint, page_table, seqused_k, causal, window, softcap, scale,
        sinks, alibi_slopes, out, block_m, plan, allow_tf32, deterministic, want_lse,
    )  # fmt: skip
    checking = CHECKING.get()
    drops_none = dropout_p.__class__ in (float, int) and not dropout_p
    if _repeat is not None and drops_none and not checking and taken_as_they_come(q, k, v, sinks, alibi_slopes, out):
        repeated = _repeat(*args)
        if repeated is not None:
            if out is not None and torch.is_grad_enabled():
                note_written(out)
            return repeated
    if softcap.__class__ is not float or not 0.0 <= softcap < math.inf:
        softcap = as_float("softcap", softcap, minimum=0.0)
    if scale is not None and (scale.__class__ is not float or scale - scale != 0.0):
        scale = as_float("scale", scale)
    if deterministic is not None:
        check_bool("deterministic", deterministic)
    if dropout_p.__class__ is not float or dropout_p:
        check_dropout(dropout_p)
        if dropout_p and seed is None and isinstance(q, torch.Tensor):
            seed = draw_seed(q.device)
    key = forward_key(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, page_table, seqused_k, causal, window, softcap,
        sinks, alibi_slopes, out, block_m, plan, allow_tf32, want_lse, bool(dropout_p),
    )  # fmt: skip
    prepared = None if key is None else _PREPARED.get(key)
    if key is None:
        cast = cast_by_autocast(q, k, v)
        if cast is not None:
            return forward(
                *cast, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, page_table, seqused_k, causal, window, softcap, scale,
                sinks, alibi_slopes, out, block_m, plan, allow_tf32, deterministic, want_lse, dropout_p, seed,
            )  # fmt: skip
        if needs_gradient(q, k, v, sinks, alibi_slopes, out):
            check_differentiable(page_table=page_table, alibi_slopes=alibi_slopes, out=out)
            if checking and cu_seqlens_k is not None and max_seqlen_k is not None:
                check_longest_keys(cu_seqlens_k, k.shape[0], max_seqlen_k)
            return Attention.apply(  # type: ignore[no-any-return, no-untyped-call]
                q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, causal, window, softcap, scale,
                alibi_slopes, block_m, plan, allow_tf32, deterministic, dropout_p, seed,
            )  # fmt: skip
    if prepared is None:
        problem = Problem.forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, page_table=page_table, seqused_k=seqused_k,
            causal=causal, window=window, softcap=softcap, scale=scale, sinks=sinks, alibi_slopes=alibi_slopes, out=out,
            lse=want_lse, allow_tf32=allow_tf32, dropout_p=dropout_p,
        )  # fmt: skip
        check_choice(plan, ForwardPlan, block_m=block_m)
        prepared = _prepare(key, problem, q.device, holds_keys=k.numel() > 0, block_m=block_m, plan=plan)
    run, shape, note = prepared
    given, (out, lse) = out, results(q, out, shape, want_lse)
    call = ForwardCall(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, page_table, q.shape[1] if max_seqlen_q is None else max_seqlen_q,
        sinks, alibi_slopes, out, lse, shape.scale if scale is None else scale, softcap,
        None if seed is None else Dropout(dropout_p, seed),
    )  # fmt: skip
    if checking:
        check_forward_values(call, None if window is None else window[0])
    run(call)
    if given is not None and torch.is_grad_enabled():
        note_written(given)
    if note is not None and drops_none:
        _repeat = note(args, call) or _repeat
    return out, lse


def _prepare(
    key: Key | None, problem: Problem, device: torch.device, *, holds_keys: bool, block_m: int | None, plan: ForwardPlan | None
) -> Prepared:
    """Plans a checked problem and binds its kernel; remembers the result under ``key``."""
    with PREPARING:
        if key is not None and key in _PREPARED:
            return _PREPARED[key]
        plan = plan_forward(problem, Device.of(device), block_m=block_m, plan=plan)
        run: ForwardRunner | None = runner_without_kernel(problem, holds_keys)
        if run is None:
            run = bound(kernel_module(plan), problem, plan, device)
        return remember(_PREPARED, key, Prepared(run, shape_of(problem), getattr(run, "note", None)))


class Attention(torch.autograd.Function):
    """A forward call that autograd follows; gradients for q, k, v and sinks, through out and lse."""

    @staticmethod
    def forward(  # with a setup_context apart from it, each call would pay for torch's binding of its arguments by name
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        cu_seqlens_q: torch.Tensor | None,
        cu_seqlens_k: torch.Tensor | None,
        max_seqlen_q: int | None,
        max_seqlen_k: int | None,
        seqused_k: torch.Tensor | None,
        causal: bool,
        window: tuple[int | None, int | None] | None,
        softcap: float,
        scale: float | None,
        alibi_slopes: torch.Tensor | None,
        block_m: int | None,
        plan: ForwardPlan | None,
        allow_tf32: bool,
        deterministic: bool | None,
        dropout_p: float,
        seed: torch.Tensor | None,
    ) -> Result:
        out, lse = forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, seqused_k, causal, window, softcap, scale,
            sinks, alibi_slopes, None, block_m, plan, allow_tf32, None, True, dropout_p, seed,
        )  # fmt: skip
        keep(
            ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, causal, window, softcap, scale, sinks,
            alibi_slopes, allow_tf32, deterministic, dropout_p, seed, out, lse,
        )  # fmt: skip
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        run = traced_backward if torch.compiler.is_compiling() else backward
        return (*gradients(ctx, dout, dlse, ctx.needs_input_grad[:4], run), *[None] * 16)
