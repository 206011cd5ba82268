"""Combine: the splits' partial results of each row become one (Flash-Decoding's second kernel).

A program folds all splits of one row over BLOCK_D columns; splits that saw no key hold lse -inf and are never read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from flashtile.kernels.launch import TRITON_DTYPES, Arg, Spec, launcher
from flashtile.kernels.tile.schedule import owned_rows
from flashtile.kernels.tile.softmax import LOG2E, finite, join_sink, natural_lse, normaliser
from flashtile.kernels.tile.views import LengthsView, LseView, PartialsView, RowsView, row_offsets
from flashtile.planner.plans import DecodePlan
from flashtile.problem import DTYPE_BYTES, Problem

_SPLITS_AT_ONCE = (16, 64, 256)  # few sizes, so that a cache that grows rarely asks for another kernel
_ONE_WARP_HOLDS = 64  # splits at 32 columns in the registers of one warp


@triton.jit
def combine_kernel(
    partials, out, lse, lengths, sinks, num_heads, batch,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, ONE_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens x heads, blocks of dim). BLOCK_S splits are folded at a time; ONE_BLOCK where that is all of them."""
    row = tl.program_id(0)
    token = row // num_heads
    head = row % num_heads
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    column = d < HEAD_DIM_V
    s = tl.arange(0, BLOCK_S)
    if lengths.cu_seqlens_q is not None:
        b = token * 0
        m_index = token
    else:
        b = token // lengths.seqlen_q
        m_index = token % lengths.seqlen_q
    owned = token < owned_rows(lengths, batch)
    num_splits = tl.where(owned, partials.num_splits, 0)
    first = row.to(tl.int64) * partials.num_splits
    if PDL:
        gdc_wait()
    # ()
    m = float("-inf")
    l = 0.0
    # (BLOCK_D,)
    acc = tl.zeros([BLOCK_D], tl.float32)
    if ONE_BLOCK:
        m, l, acc = _fold(partials, first, s, num_splits, d, column, m, l, acc, HEAD_DIM_V)
    else:
        for start in range(0, num_splits, BLOCK_S):
            m, l, acc = _fold(partials, first, start + s, num_splits, d, column, m, l, acc, HEAD_DIM_V)
    if sinks is not None:
        m, l, alpha = join_sink(m, l, tl.where(owned, tl.load(sinks + head), float("-inf")))
        acc = acc * alpha
    offset = row_offsets(out, b, m_index, head)
    tl.store(out.ptr + offset + d, (acc * normaliser(l)).to(out.ptr.dtype.element_ty), mask=column)
    if lse.ptr is not None:
        at = b.to(tl.int64) * lse.stride_b + head.to(tl.int64) * lse.stride_h + m_index.to(tl.int64) * lse.stride_m
        tl.store(lse.ptr + at, natural_lse(m, l), mask=tl.program_id(1) == 0)


@triton.jit
def _fold(partials, first, split, num_splits, d, column, m, l, acc, HEAD_DIM_V: tl.constexpr):
    """Merges a block of splits into (m, l, acc): the same algebra as one step of online softmax, a split as a key."""
    # (BLOCK_S,)
    weight = tl.load(partials.ptr + partials.lse_start + first + split, mask=split < num_splits, other=float("-inf")) * LOG2E
    # (BLOCK_S, BLOCK_D)
    values = tl.load(
        partials.ptr + (first + split)[:, None] * HEAD_DIM_V + d[None, :],
        mask=(weight > float("-inf"))[:, None] & column[None, :],
        other=0.0,
    )
    m_new = tl.maximum(m, tl.max(weight, 0))
    shift = finite(m_new)
    p = tl.exp2(weight - shift)
    alpha = tl.exp2(m - shift)
    return m_new, l * alpha + tl.sum(p, 0), acc * alpha + tl.sum(values * p[:, None], 0)


def combine_spec(problem: Problem, plan: DecodePlan) -> Spec:
    """Combine's specialisation: of the number of splits only the block that holds them counts."""
    i32, i64 = Arg("i32"), Arg("i64")
    stride = Arg("i64", max(1, problem.alignment // DTYPE_BYTES[problem.dtype_out]))
    most = _ONE_WARP_HOLDS if plan.combine_warps == 1 else _SPLITS_AT_ONCE[-1]
    block_s = next((size for size in _SPLITS_AT_ONCE if size >= plan.num_splits or size == most), most)
    return Spec(
        combine_kernel,
        args={
            "partials": PartialsView(Arg("*fp32", 16), i64, i32),
            "out": RowsView(Arg("*" + TRITON_DTYPES[problem.dtype_out], problem.alignment), stride, stride, stride),
            "lse": LseView(Arg("*fp32"), i64, i64, i64) if problem.lse else LseView(None, None, None, None),
            "lengths": LengthsView(Arg("*i32"), Arg("*i32") if problem.ragged_q else None, i32, i32, i32),
            "sinks": Arg("*fp32") if problem.sinks else None,
            "num_heads": i32,
            "batch": i32,
        },
        constants={
            "HEAD_DIM_V": problem.head_dim_v,
            "BLOCK_D": plan.combine_block_d,
            "BLOCK_S": block_s,
            "ONE_BLOCK": plan.num_splits <= block_s,
            "PDL": plan.dependent_launch,
        },
        options={"num_warps": plan.combine_warps, "num_stages": 1, **({"launch_pdl": True} if plan.dependent_launch else {})},
    )


def bind_combine(problem: Problem, plan: DecodePlan, device: torch.device) -> Callable[..., None]:
    """``combine(stream, rows, partials, out, lse, lengths, sinks)``: views as the split kernel was given them."""
    launch = launcher(combine_spec(problem, plan), device)
    columns = -(-problem.head_dim_v // plan.combine_block_d)
    last = (problem.num_heads_q, problem.batch, *launch.constants)

    def combine(stream: int, rows: int, *views: object) -> None:
        launch.run(rows, columns, stream, *views, *last)

    return combine
