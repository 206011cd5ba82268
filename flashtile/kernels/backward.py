"""Backward: the gradients of attention, portable over GPUs, in two passes over the scores.

The first pass owns keys and sums dK and dV (backward_keys.py), the second owns queries and sums dQ (backward_queries.py); a
small kernel computes delta before (backward_delta.py). Every sum has one owner and one order: there are no atomics, and
results do not vary from run to run.

Source: FlashAttention-2 (Dao 2023).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from flashtile.errors import UnsupportedError
from flashtile.kernels.backward_delta import backward_delta_kernel, delta_spec, rows_at_once, sinks_spec
from flashtile.kernels.backward_keys import keys_spec
from flashtile.kernels.backward_queries import queries_spec
from flashtile.kernels.call import BackwardCall, BackwardRunner
from flashtile.kernels.launch import Launch, Spec, launcher, on_device, pointer_of, workspace
from flashtile.kernels.operands import Layout, dropout_view, lse_view, rows_view, scores_view, with_keys
from flashtile.kernels.sections import heads_at_once
from flashtile.kernels.tile.views import band_view
from flashtile.planner.plans import BackwardPlan
from flashtile.problem import Problem

_MAX_GRID_X = 2**31 - 1


class CallViews(NamedTuple):
    """What several kernels of a call are handed: views of numbers, and the number of sequences. ``statistics`` is a StatisticsView, written
    by ``delta_pass`` and read by both passes; ``sums`` are (pointer, blocks) of what it clears, if anything."""

    batch: int
    dout: tuple[Any, ...]
    statistics: tuple[Any, ...]
    tokens: tuple[Any, ...]
    sums: tuple[Any, int | None] = (None, None)


_Pass = Callable[[int, BackwardCall, CallViews], None]


def specs(problem: Problem, plan: BackwardPlan) -> tuple[Spec, ...]:
    """What ``bind`` will launch, for tensors as they are commonly allocated and no gradient through lse."""
    usual = delta_spec(problem, dlse=False, dsinks=problem.sinks), keys_spec(problem, plan), queries_spec(problem, plan)
    return (*usual, sinks_spec()) if problem.sinks else usual


def prepare(problem: Problem, plan: BackwardPlan, device: torch.device) -> None:
    """Compiles what ``bind`` will launch."""
    for spec in specs(problem, plan):
        launcher(spec, device)


def bind(problem: Problem, plan: BackwardPlan, device: torch.device) -> BackwardRunner:
    """What runs calls of ``problem`` as ``plan`` says."""
    pointer = pointer_of(backward_delta_kernel)
    heads, delta_rows = problem.num_heads_q, rows_at_once(problem)
    passes = delta_pass(problem, device), _keys_pass(problem, plan, device), _queries_pass(problem, plan, device)

    def run(stream: int, call: BackwardCall) -> None:
        q, cu_seqlens_q = call.q, call.cu_seqlens_q
        batch, total_q = q.shape[0], q.shape[0] * q.shape[1]
        if cu_seqlens_q is not None:
            batch, total_q = cu_seqlens_q.shape[0] - 1, q.shape[0]
        if batch == 0:
            clear_gradients(call)
            return
        blocks = max(_blocks(call.max_seqlen_q, min(delta_rows, plan.dq_block_m)), _blocks(_max_seqlen_k(call), plan.block_n))
        if batch * heads * blocks > _MAX_GRID_X:
            limit = f"a grid of {batch} x {heads} x {blocks} programs: at most {_MAX_GRID_X}"
            raise UnsupportedError("The call does not fit a launch.", {plan.kernel: [limit]})
        lse_log2, delta = workspace(heads * total_q, q.device), workspace(heads * total_q, q.device)
        strides = (heads * q.shape[1], q.shape[1]) if cu_seqlens_q is None else (0, total_q)
        lengths = (None if tensor is None else pointer(tensor) for tensor in (cu_seqlens_q, call.cu_seqlens_k, call.seqused_k))
        tokens = (*lengths, call.max_seqlen_q, call.k.shape[1], total_q, call.k.shape[0])
        views = CallViews(batch, rows_view(call.dout, pointer), (pointer(lse_log2), pointer(delta), *strides), tokens)
        for launch_pass in passes:
            launch_pass(stream, call, views)

    return on_device(run, device)


def delta_pass(problem: Problem, device: torch.device, *, sums: bool = False, dependents: bool = False) -> _Pass:
    """Writes what both passes need of each query, and dsinks where it is wanted; with ``sums`` also clears those of each call.

    ``dependents``: what is launched next takes its place on the device early, and waits there for this.
    """
    pointer, heads, block_m = pointer_of(backward_delta_kernel), problem.num_heads_q, rows_at_once(problem)

    @functools.cache
    def launch_of(dlse: bool, dsinks: bool) -> Launch:
        return launcher(delta_spec(problem, dlse=dlse, dsinks=dsinks, sums=sums, dependents=dependents), device)

    launch_of(False, problem.sinks)

    def run(stream: int, call: BackwardCall, views: CallViews) -> None:
        row_blocks = _blocks(call.max_seqlen_q, block_m)
        sinks, parts, num_parts = None, None, views.batch * row_blocks
        if call.dsinks is not None and call.sinks is not None:
            sinks = pointer(call.sinks)
            parts = workspace(heads * num_parts, call.q.device)  # by this name until both kernels are launched
        launch = launch_of(call.dlse is not None, parts is not None)
        launch.run(
            heads * num_parts, 1, stream, rows_view(call.out, pointer), views.dout, lse_view(call.lse, pointer),
            lse_view(call.dlse, pointer), views.statistics,
            sinks, None if parts is None else pointer(parts), *views.sums, views.tokens, heads, views.batch, row_blocks, *launch.constants,
        )  # fmt: skip
        if call.dsinks is not None and parts is not None:
            launch = launcher(sinks_spec(), device)
            launch.run(heads, 1, stream, pointer(parts), pointer(call.dsinks), num_parts, *launch.constants)

    return run


def _keys_pass(problem: Problem, plan: BackwardPlan, device: torch.device) -> _Pass:
    """Writes dk and dv."""
    pointer, heads = pointer_of(backward_delta_kernel), problem.num_heads_kv
    at_once = max(1, heads_at_once(problem, device, plan.block_n) // problem.group)
    transposed = band_view(problem.band.transposed())

    def launch_of(layout: Layout) -> Launch:
        return launcher(keys_spec(problem, plan, layout), device)

    walked = with_keys(problem, plan.block_m, pointer, launch_of)

    def run(stream: int, call: BackwardCall, views: CallViews) -> None:
        launch, q, dout = walked(call.q, call.dout)
        key_blocks, units = _blocks(_max_seqlen_k(call), plan.block_n), views.batch * heads
        launch.run(
            units * key_blocks, 1, stream, q, dout, views.statistics, rows_view(call.k, pointer), rows_view(call.v, pointer),
            rows_view(call.dk, pointer), rows_view(call.dv, pointer), views.tokens,
            scores_view(call.scale, call.softcap, call.alibi_slopes, pointer), transposed, dropout_view(call.dropout, pointer),
            heads, views.batch, key_blocks, min(at_once, units), *launch.constants,
        )  # fmt: skip

    return run


def _queries_pass(problem: Problem, plan: BackwardPlan, device: torch.device) -> _Pass:
    """Writes dq."""
    pointer, heads = pointer_of(backward_delta_kernel), problem.num_heads_q
    at_once, band = heads_at_once(problem, device, plan.dq_block_m), band_view(problem.band)

    def launch_of(layout: Layout) -> Launch:
        return launcher(queries_spec(problem, plan, layout), device)

    walked = with_keys(problem, plan.dq_block_n, pointer, launch_of)

    def run(stream: int, call: BackwardCall, views: CallViews) -> None:
        launch, k, v = walked(call.k, call.v)
        row_blocks, units = _blocks(call.max_seqlen_q, plan.dq_block_m), views.batch * heads
        launch.run(
            units * row_blocks, 1, stream, rows_view(call.q, pointer), views.dout, views.statistics, k, v,
            rows_view(call.dq, pointer), views.tokens, scores_view(call.scale, call.softcap, call.alibi_slopes, pointer), band,
            dropout_view(call.dropout, pointer), heads, views.batch, row_blocks, min(at_once, units), *launch.constants,
        )  # fmt: skip

    return run


def clear_gradients(call: BackwardCall) -> None:
    """The gradients where there is no sequence."""
    for gradient in (call.dq, call.dk, call.dv, call.dsinks):
        if gradient is not None:
            gradient.zero_()


def _max_seqlen_k(call: BackwardCall) -> int:
    return call.k.shape[1] if call.cu_seqlens_k is None else call.max_seqlen_k


def _blocks(length: int, block: int) -> int:
    """Programs that a sequence gets; at least one, which clears what belongs to nobody."""
    return max(1, -(-length // block))
