"""A decode call, and the operator flashtile::decode. On a GPU, calls of a kind that comes again take the way of `replay`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from flashtile.arguments import check_no_tangent
from flashtile.checking import CHECKING, check_decode_values
from flashtile.facts import Key, decode_key, rounded_hint
from flashtile.kernels.call import DecodeCall, DecodeRunner
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
from flashtile.planner.after_append import joins_append
from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem


class Prepared(NamedTuple):
    """One checked, planned and bound kind of call."""

    run: DecodeRunner
    shape: Shape
    note: Callable[[tuple[object, ...], DecodeCall], Callable[..., Result | None] | None] | None  # of a runner that can be repeated


_PREPARED: dict[Key, Prepared] = {}
_repeat: Callable[..., Result | None] | None = None  # decode's arguments to its result, or None for a call that was not recorded


def decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seqlens_k: torch.Tensor,
    page_table: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    softcap: float,
    scale: float | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    leftpad_k: torch.Tensor | None,
    out: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    block_m: int | None,
    num_splits: int | None,
    plan: DecodePlan | None,
    allow_tf32: bool,
    after_append: bool,
    want_lse: bool,
) -> Result:
    """One decode call on the tensors' own device; the lse is None unless wanted."""
    global _repeat
    if forward_ad._current_level >= 0:
        check_no_tangent(q, k_cache, v_cache, sinks, alibi_slopes, k_scale, v_scale)
    hint = max_seqlen_k if max_seqlen_k is None else rounded_hint(max_seqlen_k, k_cache, page_table)
    args = (
        q, k_cache, v_cache, seqlens_k, page_table, cu_seqlens_q, max_seqlen_q, hint, causal, window, softcap, scale,
        sinks, alibi_slopes, k_scale, v_scale, leftpad_k, out, out_dtype, block_m, num_splits, plan, allow_tf32, after_append, want_lse,
    )  # fmt: skip
    checking = CHECKING.get()
    if _repeat is not None and not checking:
        repeated = _repeat(*args)
        if repeated is not None:
            if out is not None and torch.is_grad_enabled():
                note_written(out)
            return repeated
    if softcap.__class__ is not float or not 0.0 <= softcap < math.inf:
        softcap = as_float("softcap", softcap, minimum=0.0)
    if scale is not None and (scale.__class__ is not float or scale - scale != 0.0):
        scale = as_float("scale", scale)
    key = decode_key(
        q, k_cache, v_cache, seqlens_k, page_table, cu_seqlens_q, max_seqlen_q, max_seqlen_k, causal, window, softcap,
        sinks, alibi_slopes, k_scale, v_scale, leftpad_k, out, out_dtype, block_m, num_splits, plan, allow_tf32, after_append, want_lse,
    )  # fmt: skip
    prepared = None if key is None else _PREPARED.get(key)
    if prepared is None:
        problem = Problem.decode(
            q, k_cache, v_cache, seqlens_k, page_table=page_table, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k, causal=causal, window=window, softcap=softcap, scale=scale, sinks=sinks,
            alibi_slopes=alibi_slopes, k_scale=k_scale, v_scale=v_scale, leftpad_k=leftpad_k, out=out, out_dtype=out_dtype, lse=want_lse,
            allow_tf32=allow_tf32, after_append=after_append,
        )  # fmt: skip
        check_choice(plan, DecodePlan, block_m=block_m, num_splits=num_splits)
        holds_keys = k_cache.numel() > 0
        prepared = _prepare(key, problem, q.device, holds_keys, block_m=block_m, num_splits=num_splits, plan=plan)
    run, shape, note = prepared
    given, (out, lse) = out, results(q, out, shape, want_lse)
    call = DecodeCall(
        q, k_cache, v_cache, seqlens_k, page_table, cu_seqlens_q, sinks, alibi_slopes, out, lse,
        shape.scale if scale is None else scale, softcap, k_scale, v_scale, leftpad_k,
    )  # fmt: skip
    if checking:
        check_decode_values(call, max_seqlen_q, None if window is None else window[0])
    run(call)
    if given is not None and torch.is_grad_enabled():
        note_written(given)
    if note is not None:
        _repeat = note(args, call) or _repeat
    return out, lse


def _prepare(
    key: Key | None,
    problem: Problem,
    device: torch.device,
    holds_keys: bool,
    *,
    block_m: int | None,
    num_splits: int | None,
    plan: DecodePlan | None,
) -> Prepared:
    """Plans a checked problem and binds its kernel; remembers the result under ``key``."""
    with PREPARING:
        if key is not None and key in _PREPARED:
            return _PREPARED[key]
        figures = Device.of(device)
        plan = plan_decode(problem, figures, block_m=block_m, num_splits=num_splits, plan=plan)
        if problem.after_append and not joins_append(problem, plan, figures):
            problem = problem.with_(after_append=False)
        run: DecodeRunner | None = runner_without_kernel(problem, holds_keys)
        if run is None:
            run = bound(kernel_module(plan), problem, plan, device)
        return remember(_PREPARED, key, Prepared(run, shape_of(problem), getattr(run, "note", None)))


@torch.library.custom_op("flashtile::decode", mutates_args=())
def decode_operator(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seqlens_k: torch.Tensor,
    page_table: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    scale: float | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    leftpad_k: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    block_m: int | None,
    num_splits: int | None,
    plan: str | None,
    allow_tf32: bool,
    after_append: bool,
    want_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`decode` as torch.compile sees it: the plan is JSON text; lse has no element unless wanted."""
    out, lse = decode(
        q, k_cache, v_cache, seqlens_k, page_table, cu_seqlens_q, max_seqlen_q, max_seqlen_k, causal,
        (window_left, window_right), softcap, scale, sinks, alibi_slopes, k_scale, v_scale, leftpad_k, None, out_dtype, block_m, num_splits,
        None if plan is None else _plan_of(plan), allow_tf32, after_append, want_lse,
    )  # fmt: skip
    return out, q.new_empty(0, dtype=torch.float32) if lse is None else lse


@decode_operator.register_fake
def _(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seqlens_k: torch.Tensor,
    page_table: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    scale: float | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    leftpad_k: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    block_m: int | None,
    num_splits: int | None,
    plan: str | None,
    allow_tf32: bool,
    after_append: bool,
    want_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    *batch, queries, heads, _ = q.shape
    out = q.new_empty((*batch, queries, heads, v_cache.shape[-1]), dtype=out_dtype or q.dtype)
    return out, q.new_empty((*batch, heads, queries) if want_lse else (0,), dtype=torch.float32)


@functools.lru_cache(maxsize=256)
def _plan_of(text: str) -> DecodePlan:
    return DecodePlan.from_json(text)
