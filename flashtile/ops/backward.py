"""A backward call, and the operator flashtile::backward: the gradients of q, k, v and sinks from those of out and lse."""

from __future__ import annotations

from typing import Any

import torch

from flashtile.facts import Key, backward_key
from flashtile.kernels.call import BackwardCall, BackwardRunner, Dropout
from flashtile.ops.prepared import PREPARING, bound, has_scores, kernel_module, remember
from flashtile.planner.choose import plan_backward
from flashtile.planner.device import Device
from flashtile.problem import Problem
from flashtile.rounding import alignment_of

_PREPARED: dict[Key, BackwardRunner] = {}


def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
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
    want_dsinks: bool,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    into: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dq, dk and dv, laid out like q, k and v, and dsinks or None, on the tensors' own device.

    The arguments are those of a forward call, what it returned (lse too), and the gradients of out (its shape and dtype) and
    of lse (None for none). ``deterministic`` follows torch's switch, as it stands now, where it is None. ``into`` are tensors like q, k
    and v, with a contiguous last dimension, to write dq, dk and dv to.
    """
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    dq, dk, dv = into or (gradient_like(q), gradient_like(k), gradient_like(v))
    dsinks = torch.empty_like(sinks) if sinks is not None and want_dsinks else None
    # dlse is promised like lse, contiguous: of one number a row, a copy costs little.
    call = BackwardCall(
        q, k, v, out, lse, _readable(dout), None if dlse is None else dlse.resolve_neg().contiguous(), dq, dk, dv, dsinks,
        cu_seqlens_q, cu_seqlens_k, seqused_k,
        q.shape[1] if max_seqlen_q is None else max_seqlen_q,
        k.shape[0 if cu_seqlens_k is not None else 1] if max_seqlen_k is None else max_seqlen_k,
        sinks, alibi_slopes, q.shape[-1] ** -0.5 if scale is None else scale, softcap,
        None if seed is None else Dropout(dropout_p, seed),
    )  # fmt: skip
    key = backward_key(
        q, k, v, out, call.dout, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, causal, window,
        softcap, sinks, alibi_slopes, allow_tf32, deterministic, seed is not None,
    )  # fmt: skip
    run = None if key is None else _PREPARED.get(key)
    if run is None:
        problem = Problem.forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k=seqused_k, causal=causal, window=window,
            softcap=softcap, scale=scale, sinks=sinks, alibi_slopes=alibi_slopes, out=call.dout, lse=True, allow_tf32=allow_tf32,
            dropout_p=dropout_p,
        )  # fmt: skip
        aligned = min(problem.alignment, alignment_of(dq, dk, dv, out))
        problem = problem.with_(operation="backward", alignment=aligned, deterministic=deterministic)
        run = _prepare(key, problem, q.device, holds_keys=k.numel() > 0)
    run(call)
    return dq, dk, dv, dsinks


def gradient_like(x: torch.Tensor) -> torch.Tensor:
    """A tensor for x's gradient, laid out like x; contiguous where x's elements overlap, so that torch might order dimensions otherwise."""
    gradient = torch.empty_like(x)
    return gradient if gradient.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def _readable(dout: torch.Tensor) -> torch.Tensor:
    """dout, or a copy where kernels cannot read it.

    They take any strides with a contiguous last dimension, as of q. The gradient of a sum has one element for all (stride 0), and
    that of a transposed result any last stride: such gradients are torch's, so the caller could not have laid them out otherwise.
    Nor could he help that torch negates the gradient of a conjugate when it is read.
    """
    dout = dout.resolve_neg()
    fits = dout.stride(-1) == 1 and 0 not in dout.stride()
    return dout if fits else dout.contiguous()


def _prepare(key: Key | None, problem: Problem, device: torch.device, *, holds_keys: bool) -> BackwardRunner:
    """Plans a checked problem and binds its kernel; remembers the result under ``key``."""
    with PREPARING:
        if key is not None and key in _PREPARED:
            return _PREPARED[key]
        plan = plan_backward(problem, Device.of(device))
        run: BackwardRunner = _run_without_scores
        if has_scores(problem, holds_keys):
            run = bound(kernel_module(plan), problem, plan, device)
        return remember(_PREPARED, key, run)


def _run_without_scores(call: BackwardCall) -> None:
    """No query, or no key: where there is a sink, it is all that a row's lse consists of."""
    for grad in (call.dq, call.dk, call.dv):
        grad.zero_()
    if call.dsinks is None:
        return
    if call.dlse is None:
        call.dsinks.zero_()
    else:
        # dlse is ([b,] hq, queries); rows that belong to nobody have lse -inf
        of_rows = torch.where(call.lse == -torch.inf, 0.0, call.dlse)
        call.dsinks.copy_(of_rows.sum(dim=[dim for dim in range(of_rows.ndim) if dim != of_rows.ndim - 2]))


@torch.library.custom_op("flashtile::backward", mutates_args=())
def backward_operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    seqused_k: torch.Tensor | None,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    scale: float | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    allow_tf32: bool,
    deterministic: bool | None,
    want_dsinks: bool,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`backward` as torch.compile sees it; dsinks has no element unless there are sinks and it is wanted."""
    with torch.no_grad():
        dq, dk, dv, dsinks = backward(
            q, k, v, out, lse, dout, dlse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, causal,
            (window_left, window_right), softcap, scale, sinks, alibi_slopes, allow_tf32, deterministic, want_dsinks,
            dropout_p, seed,
        )  # fmt: skip
    return dq, dk, dv, lse.new_empty(0) if dsinks is None else dsinks


@backward_operator.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    seqused_k: torch.Tensor | None,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    scale: float | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    allow_tf32: bool,
    deterministic: bool | None,
    want_dsinks: bool,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dsinks = torch.empty_like(sinks) if sinks is not None and want_dsinks else lse.new_empty(0)
    return gradient_like(q), gradient_like(k), gradient_like(v), dsinks


def traced_backward(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`backward` through its operator, which takes the window's sides as two arguments."""
    before, window, after = args[:13], args[13], args[14:]
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.flashtile.backward(
        *before, *(window or (None, None)), *after
    )
    return found
