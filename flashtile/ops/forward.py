"""A forward call (`attention`, `attention_varlen`), and the operator flashtile::forward."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from flashtile.arguments import check_no_gradient
from flashtile.checking import CHECKING, check_forward_values
from flashtile.errors import UnsupportedError
from flashtile.facts import Key, forward_key
from flashtile.kernels.call import ForwardCall, ForwardRunner
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


_PREPARED: dict[Key, Prepared] = {}


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
    want_lse: bool,
) -> Result:
    """One forward call on the tensors' own device; the lse is None unless wanted."""
    if softcap.__class__ is not float or not 0.0 <= softcap < math.inf:
        softcap = as_float("softcap", softcap, minimum=0.0)
    if scale is not None and (scale.__class__ is not float or scale - scale != 0.0):
        scale = as_float("scale", scale)
    key = forward_key(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, page_table, seqused_k, causal, window, softcap,
        sinks, alibi_slopes, out, block_m, plan, allow_tf32, want_lse,
    )  # fmt: skip
    prepared = None if key is None else _PREPARED.get(key)
    if prepared is None:
        problem = Problem.forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, page_table=page_table, seqused_k=seqused_k,
            causal=causal, window=window, softcap=softcap, scale=scale, sinks=sinks, alibi_slopes=alibi_slopes, out=out,
            lse=want_lse, allow_tf32=allow_tf32,
        )  # fmt: skip
        check_choice(plan, ForwardPlan, block_m=block_m)
        if torch.is_grad_enabled():
            check_no_gradient(q=q, k=k, v=v, sinks=sinks, alibi_slopes=alibi_slopes, out=out)
        prepared = _prepare(key, problem, q.device, holds_keys=k.numel() > 0, block_m=block_m, plan=plan)
    run, shape = prepared
    out, lse = results(q, out, shape, want_lse)
    call = ForwardCall(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, page_table, q.shape[1] if max_seqlen_q is None else max_seqlen_q,
        sinks, alibi_slopes, out, lse, shape.scale if scale is None else scale, softcap,
    )  # fmt: skip
    if CHECKING.get():
        check_forward_values(call, None if window is None else window[0])
    run(call)
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
        return remember(_PREPARED, key, Prepared(run, shape_of(problem)))


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
    want_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward` as torch.compile sees it: the plan is JSON text; lse has no element unless wanted."""
    out, lse = forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, page_table, seqused_k, causal,
        (window_left, window_right), softcap, scale, sinks, alibi_slopes, None, block_m,
        None if plan is None else _plan_of(plan), allow_tf32, want_lse,
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
    want_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    *batch, queries, heads, _ = q.shape
    out = q.new_empty((*batch, queries, heads, v.shape[-1]))
    return out, q.new_empty((*batch, heads, queries) if want_lse else (0,), dtype=torch.float32)


def _refuse_gradient(ctx: object, inputs: tuple[torch.Tensor | None, ...], output: object) -> None:
    """Called where autograd would follow the operator: under torch.compile that is while its graph is made."""
    q, k, v, *_ = inputs
    sinks, alibi_slopes = inputs[13:15]
    check_no_gradient(q=q, k=k, v=v, sinks=sinks, alibi_slopes=alibi_slopes)


def _no_backward(ctx: object, *grads: torch.Tensor) -> None:
    raise UnsupportedError("No gradient flows through attention.")


forward_operator.register_autograd(_no_backward, setup_context=_refuse_gradient)


@functools.lru_cache(maxsize=256)
def _plan_of(text: str) -> ForwardPlan:
    return ForwardPlan.from_json(text)
