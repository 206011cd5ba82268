"""Before the backward's passes: what they need of every row, and the sinks' gradient, which needs nothing else.

delta = rowsum(out * dout) - dlse. A sink has no value and takes exp(sink - lse) of a row, so that its gradient is
-sum over rows of exp(sink - lse) * delta: each program leaves its rows' part, and a second kernel adds the parts up in order.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from flashtile.kernels.launch import Arg, Spec
from flashtile.kernels.operands import lse_spec, rows_spec, statistics_spec, tokens_spec
from flashtile.kernels.tile.rows import load_rows
from flashtile.kernels.tile.schedule import sequence_rows
from flashtile.kernels.tile.softmax import LOG2E
from flashtile.kernels.tile.views import LseView, row_offsets
from flashtile.problem import Problem

_ELEMENTS = 4096  # of out, and of dout, that a program holds
_WARPS = 4
PARTS_AT_ONCE = 1024
CLEARED_AT_ONCE = tl.constexpr(4096)


@triton.jit
def backward_delta_kernel(
    out, dout, lse, dlse, statistics, sinks, sink_parts, sums, sums_blocks, tokens, num_heads, batch, row_blocks,
    BLOCK_M: tl.constexpr, HEAD_DIM_V: tl.constexpr, DV: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * row blocks * query heads), heads of the same rows side by side.

    ``sink_parts`` is float32 (query heads, batch * row blocks), or None where the sinks' gradient is not wanted. A row that
    saw no key gets delta 0, whatever its gradients are. ``sums``: float32 (sums_blocks, CLEARED_AT_ONCE), to which a later kernel
    adds, and which becomes zero here; or None.
    """
    program = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
    if sums is not None:
        zeros = tl.zeros([CLEARED_AT_ONCE], tl.float32)
        for block in tl.range(program, sums_blocks, tl.num_programs(0), num_stages=1):
            tl.store(sums + block * CLEARED_AT_ONCE + tl.arange(0, CLEARED_AT_ONCE), zeros)
    h = program % num_heads
    b = program // num_heads // row_blocks
    row_block = program // num_heads % row_blocks
    row_start, seqlen_q = sequence_rows(tokens, b)
    # (BLOCK_M,)
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < seqlen_q
    b_rows = b * 0 if tokens.cu_seqlens_q is not None else b
    row += row_start
    # [BLOCK_M, DV]
    out_tile = load_rows(out.ptr, row_offsets(out, b_rows, row, h), real, DV, HEAD_DIM_V).to(tl.float32)
    dout_tile = load_rows(dout.ptr, row_offsets(dout, b_rows, row, h), real, DV, HEAD_DIM_V).to(tl.float32)
    total = tl.sum(out_tile * dout_tile, 1)
    if dlse.ptr is not None:
        total -= tl.load(dlse.ptr + _offsets(dlse, b_rows, h, row), mask=real, other=0.0)
    natural = tl.load(lse.ptr + _offsets(lse, b_rows, h, row), mask=real, other=float("-inf"))
    seen = natural > float("-inf")
    total = tl.where(seen, total, 0.0)
    at = b_rows.to(tl.int64) * statistics.stride_b + h.to(tl.int64) * statistics.stride_h + row
    tl.store(statistics.lse_log2 + at, tl.where(seen, natural * LOG2E, float("inf")), mask=real)
    tl.store(statistics.delta + at, total, mask=real)
    if sink_parts is not None:
        share = tl.exp2((tl.load(sinks + h) - tl.where(seen, natural, 0.0)) * LOG2E)
        part = -tl.sum(tl.where(seen, share * total, 0.0), 0)
        parts = batch.to(tl.int64) * row_blocks
        tl.store(sink_parts + h * parts + b * row_blocks + row_block, part)


@triton.jit
def _offsets(view, b, h, row):
    """(rows,) element offsets into an LseView."""
    return b.to(tl.int64) * view.stride_b + h.to(tl.int64) * view.stride_h + row.to(tl.int64) * view.stride_m


@triton.jit
def backward_sinks_kernel(sink_parts, dsinks, num_parts, PARTS_AT_ONCE: tl.constexpr):
    """Grid: (query heads,). dsinks (query heads,) is each head's sum over its parts, in an order that never changes."""
    h = tl.program_id(0)
    # (PARTS_AT_ONCE,)
    n = tl.arange(0, PARTS_AT_ONCE)
    total = tl.zeros([PARTS_AT_ONCE], tl.float32)
    for start in tl.range(0, num_parts, PARTS_AT_ONCE, num_stages=1):
        total += tl.load(sink_parts + h.to(tl.int64) * num_parts + start + n, mask=start + n < num_parts, other=0.0)
    tl.store(dsinks + h, tl.sum(total, 0))


def rows_at_once(problem: Problem) -> int:
    """Rows of a program of the delta kernel."""
    return _ELEMENTS // _held_dim(problem)


def delta_spec(problem: Problem, *, dlse: bool, dsinks: bool, sums: bool = False, dependents: bool = False) -> Spec:
    """The delta kernel, for calls with or without a gradient through lse and one of the sinks, and sums to be cleared.

    ``dependents``: what is launched next may take its place on the device at once, and waits there.
    """
    i32 = Arg("i32")
    sink = Arg("*fp32") if dsinks else None
    return Spec(
        backward_delta_kernel,
        args={
            "out": rows_spec(problem, problem.dtype_out),
            "dout": rows_spec(problem, problem.dtype_out),
            "lse": lse_spec(),
            "dlse": lse_spec() if dlse else LseView(None, None, None, None),
            "statistics": statistics_spec(),
            "sinks": sink,
            "sink_parts": sink,
            "sums": Arg("*fp32", 16) if sums else None,
            "sums_blocks": Arg("i64") if sums else None,  # so that what is counted in numbers has 64 bits too
            "tokens": tokens_spec(problem),
            "num_heads": i32,
            "batch": i32,
            "row_blocks": i32,
        },
        constants={"BLOCK_M": rows_at_once(problem), "HEAD_DIM_V": problem.head_dim_v, "DV": _held_dim(problem), "PDL": dependents},
        options={"num_warps": _WARPS, "num_stages": 1},
    )


def sinks_spec() -> Spec:
    """The kernel that adds the sinks' gradient up."""
    args: dict[str, Any] = {"sink_parts": Arg("*fp32"), "dsinks": Arg("*fp32"), "num_parts": Arg("i32")}
    return Spec(backward_sinks_kernel, args, {"PARTS_AT_ONCE": PARTS_AT_ONCE}, {"num_warps": _WARPS, "num_stages": 1})


def _held_dim(problem: Problem) -> int:
    return max(16, 1 << (problem.head_dim_v - 1).bit_length())
