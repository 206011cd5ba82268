"""What happens in a call: find the prepared kernel, allocate, run; and the same as an operator for torch.compile.

A call is checked, planned and bound to a kernel once for each key of `facts.decode_key`; after that it costs a
dictionary lookup. No kernel module is imported before a plan names it.
"""

from __future__ import annotations

import functools
import importlib
import math
import threading
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch

from flashtile.arguments import check_number, is_int
from flashtile.checking import CHECKING, check_decode_values
from flashtile.errors import ArgumentError, message
from flashtile.facts import Key, decode_key, rounded_hint
from flashtile.kernels.call import DecodeCall, DecodeRunner
from flashtile.planner.catalog import module_of
from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem

MAX_PREPARED = 4096


Result = tuple[torch.Tensor, torch.Tensor | None]


class Prepared(NamedTuple):
    """One checked, planned and bound kind of call."""

    run: DecodeRunner
    dtype_out: torch.dtype
    out_like_q: bool
    head_dim_v: int
    scale: float
    note: Callable[[tuple[object, ...], DecodeCall], Callable[..., Result | None] | None] | None  # of a runner that can be repeated


_PREPARED: dict[Key, Prepared] = {}
_PREPARING = threading.RLock()
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
    out: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    block_m: int | None,
    num_splits: int | None,
    plan: DecodePlan | None,
    allow_tf32: bool,
    want_lse: bool,
) -> Result:
    """One decode call on the tensors' own device; the lse is None unless wanted."""
    global _repeat
    hint = max_seqlen_k if max_seqlen_k is None else rounded_hint(max_seqlen_k, k_cache, page_table)
    args = (
        q, k_cache, v_cache, seqlens_k, page_table, cu_seqlens_q, max_seqlen_q, hint, causal, window, softcap, scale,
        sinks, alibi_slopes, out, out_dtype, block_m, num_splits, plan, allow_tf32, want_lse,
    )  # fmt: skip
    checking = CHECKING.get()
    if _repeat is not None and not checking:
        repeated = _repeat(*args)
        if repeated is not None:
            return repeated
    if softcap.__class__ is not float or not 0.0 <= softcap < math.inf:
        check_number("softcap", softcap, minimum=0.0)
        softcap = float(softcap)
    if scale is not None and (scale.__class__ is not float or scale - scale != 0.0):
        check_number("scale", scale)
        scale = float(scale)
    key = decode_key(
        q, k_cache, v_cache, seqlens_k, page_table, cu_seqlens_q, max_seqlen_q, max_seqlen_k, causal, window, softcap,
        sinks, alibi_slopes, out, out_dtype, block_m, num_splits, plan, allow_tf32, want_lse,
    )  # fmt: skip
    prepared = None if key is None else _PREPARED.get(key)
    if prepared is None:
        problem = Problem.decode(
            q, k_cache, v_cache, seqlens_k, page_table=page_table, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k, causal=causal, window=window, softcap=softcap, scale=scale, sinks=sinks,
            alibi_slopes=alibi_slopes, out=out, out_dtype=out_dtype, lse=want_lse, allow_tf32=allow_tf32,
        )  # fmt: skip
        _check_choice(block_m, num_splits, plan)
        holds_keys = k_cache.numel() > 0
        prepared = _prepare(key, problem, q.device, holds_keys, block_m=block_m, num_splits=num_splits, plan=plan)
    run, dtype_out, out_like_q, head_dim_v, default_scale, note = prepared

    if out is None:
        if out_like_q:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
        else:
            out = torch.empty((*q.shape[:-1], head_dim_v), dtype=dtype_out, device=q.device)
    lse = None
    if want_lse:
        *batch, queries, heads, _ = q.shape
        lse = torch.empty((*batch, heads, queries), dtype=torch.float32, device=q.device)
    call = DecodeCall(
        q, k_cache, v_cache, seqlens_k, page_table, cu_seqlens_q, sinks, alibi_slopes, out, lse,
        default_scale if scale is None else scale, softcap,
    )  # fmt: skip
    if checking:
        check_decode_values(call, max_seqlen_q, None if window is None else window[0])
    run(call)
    if note is not None:
        _repeat = note(args, call) or _repeat
    return out, lse


def _check_choice(block_m: int | None, num_splits: int | None, plan: DecodePlan | None) -> None:
    for name, value in (("block_m", block_m), ("num_splits", num_splits)):
        if value is not None and not is_int(value):
            raise ArgumentError(message(name, "an int or None", repr(value), "Leave it out to have it planned."))
    if plan is not None and not isinstance(plan, DecodePlan):
        raise ArgumentError(message("plan", "a DecodePlan or None", repr(plan), "DecodePlan.from_json reads one from text."))


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
    with _PREPARING:
        if key is not None and key in _PREPARED:
            return _PREPARED[key]
        plan = plan_decode(problem, Device.of(device), block_m=block_m, num_splits=num_splits, plan=plan)
        run: DecodeRunner
        if problem.total_q == 0:
            run = _run_nothing
        elif not holds_keys or problem.seqlen_k == 0 or problem.batch == 0:
            run = _run_without_keys
        else:
            run = kernel_module(plan).bind(problem, plan, device)
            if device.type == "cpu":
                run = torch.no_grad()(run)  # the CPU engine is made of torch's differentiable operations
        like_q = problem.dtype_out == problem.dtype_q and problem.head_dim_v == problem.head_dim
        prepared = Prepared(
            run, getattr(torch, problem.dtype_out), like_q, problem.head_dim_v, problem.head_dim**-0.5, getattr(run, "note", None)
        )  # fmt: skip
        if key is not None:
            if len(_PREPARED) >= MAX_PREPARED:
                _PREPARED.pop(next(iter(_PREPARED)))
            _PREPARED[key] = prepared
        return prepared


def kernel_module(plan: DecodePlan) -> ModuleType:
    """The module of the kernel that a plan names, imported now."""
    return importlib.import_module(module_of(plan.kernel))


def _run_nothing(call: DecodeCall) -> None:
    """No query: out and lse have no element."""


def _run_without_keys(call: DecodeCall) -> None:
    """No sequence, or a cache that holds no key: out 0, lse that of the sink alone."""
    call.out.zero_()
    if call.lse is not None:
        call.lse.fill_(-math.inf)
        if call.sinks is not None:
            call.lse.copy_(call.sinks[:, None].expand_as(call.lse))
            _forget_unowned_rows(call)


def _forget_unowned_rows(call: DecodeCall) -> None:
    """Packed rows beyond the last sequence belong to nobody: their lse is -inf, sink or none."""
    if call.cu_seqlens_q is not None and call.lse is not None:
        rows = torch.arange(call.q.shape[0], device=call.q.device)
        call.lse.masked_fill_(rows >= call.cu_seqlens_q[-1], -math.inf)


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
    out_dtype: torch.dtype | None,
    block_m: int | None,
    num_splits: int | None,
    plan: str | None,
    allow_tf32: bool,
    want_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`decode` as torch.compile sees it: the plan is JSON text; lse has no element unless wanted."""
    out, lse = decode(
        q, k_cache, v_cache, seqlens_k, page_table, cu_seqlens_q, max_seqlen_q, max_seqlen_k, causal,
        (window_left, window_right), softcap, scale, sinks, alibi_slopes, None, out_dtype, block_m, num_splits,
        None if plan is None else _plan_of(plan), allow_tf32, want_lse,
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
    out_dtype: torch.dtype | None,
    block_m: int | None,
    num_splits: int | None,
    plan: str | None,
    allow_tf32: bool,
    want_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    *batch, queries, heads, _ = q.shape
    out = q.new_empty((*batch, queries, heads, v_cache.shape[-1]), dtype=out_dtype or q.dtype)
    return out, q.new_empty((*batch, heads, queries) if want_lse else (0,), dtype=torch.float32)


@functools.lru_cache(maxsize=256)
def _plan_of(text: str) -> DecodePlan:
    return DecodePlan.from_json(text)
