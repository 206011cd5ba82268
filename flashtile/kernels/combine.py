"""Combine: the splits' partial results of each row become one (Flash-Decoding's second kernel).

A program folds all parts of a row over BLOCK_D columns; parts that saw no key hold lse -inf and are never read. The parts
are either a fixed number of splits for every row, or what the programs left that share the line of key tiles
(tile/schedule.py): then most units have a single part, which is not combined.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from flashtile.kernels.launch import TRITON_DTYPES, Arg, Spec, launcher
from flashtile.kernels.operands import lengths_spec
from flashtile.kernels.tile.schedule import holder, line_length, owned_rows, sequence_rows, sequences_at_once, share, slot_of, unit_span
from flashtile.kernels.tile.softmax import LOG2E, finite, join_sink, natural_lse, normaliser
from flashtile.kernels.tile.views import BandView, LseView, PartialsView, RowsView, band_view, row_offsets
from flashtile.planner.plans import DecodePlan
from flashtile.problem import DTYPE_BYTES, Problem

_SPLITS_AT_ONCE = (16, 64, 256)  # few sizes, so that a cache that grows rarely asks for another kernel
_ONE_WARP_HOLDS = 64  # splits at 32 columns in the registers of one warp
_PROGRAMS_ON_LINE = 8192  # beyond which a program takes several rows of a unit: most have nothing to do, and only start and end


@triton.jit
def combine_kernel(
    partials, out, lse, lengths, band, sinks, num_heads, batch, num_programs, row_blocks, row_programs,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, ONE_BLOCK: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SEQUENCES: tl.constexpr, ONE_STEP: tl.constexpr,
    UNIT_COST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens x heads, blocks of dim), or where SEQUENCES > 0 (units of the line, row programs x blocks of dim).

    BLOCK_S parts are folded at a time; ONE_BLOCK where that is all of them.
    """
    if SEQUENCES > 0:
        _combine_on_line(
            partials, out, lse, lengths, band, sinks, num_heads, batch, num_programs, row_blocks, row_programs,
            HEAD_DIM_V, BLOCK_D, BLOCK_S, ONE_BLOCK, GROUP, BLOCK_M, BLOCK_N, SEQUENCES, ONE_STEP, UNIT_COST, PDL,
        )  # fmt: skip
    else:
        _combine_splits(partials, out, lse, lengths, sinks, num_heads, batch, HEAD_DIM_V, BLOCK_D, BLOCK_S, ONE_BLOCK, PDL)


@triton.jit
def _combine_splits(
    partials, out, lse, lengths, sinks, num_heads, batch,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, ONE_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row of out, whose parts lie side by side."""
    row = tl.program_id(0)
    token = row // num_heads
    head = row % num_heads
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
    _combine_row(
        partials, out, lse, sinks, b, m_index, head, owned, first, first, 1, num_splits, tl.program_id(1),
        HEAD_DIM_V, BLOCK_D, BLOCK_S, ONE_BLOCK,
    )  # fmt: skip


@triton.jit
def _combine_on_line(
    partials, out, lse, lengths, band, sinks, num_heads, batch, num_programs, row_blocks, row_programs,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, ONE_BLOCK: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SEQUENCES: tl.constexpr, ONE_STEP: tl.constexpr,
    UNIT_COST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Every row_programs-th row of a unit, if several programs of the line share it."""
    unit = tl.program_id(0)
    num_heads_kv = num_heads // GROUP
    row_block = unit % row_blocks
    h_kv = (unit // row_blocks) % num_heads_kv
    b = unit // row_blocks // num_heads_kv
    column_block = tl.program_id(1) // row_programs
    # (SEQUENCES,)
    n = tl.arange(0, SEQUENCES)
    total = line_length(lengths, band, batch, num_heads_kv, n, GROUP, BLOCK_M, BLOCK_N, UNIT_COST, ONE_STEP)
    start, end = unit_span(lengths, band, batch, num_heads_kv, n, b, h_kv, row_block, GROUP, BLOCK_M, BLOCK_N, UNIT_COST, ONE_STEP)
    begun_by = holder(total, start, num_programs)
    num_parts = holder(total, end - 1, num_programs) - begun_by + 1
    row_start, seqlen_q = sequence_rows(lengths, b)
    first_row = row_block * BLOCK_M
    num_rows = tl.where((start < end) & (num_parts > 1), tl.minimum(seqlen_q * GROUP - first_row, BLOCK_M), 0)
    b_rows = b * 0 if lengths.cu_seqlens_q is not None else b
    line_start, _ = share(total, begun_by, num_programs)
    first_slot = slot_of(begun_by, line_start, start)
    if PDL:
        # most programs have nothing to do and leave before the split kernel ends; one stays, for this kernel must not end first
        if (num_rows == 0) & (tl.program_id(0) + tl.program_id(1) > 0):
            return
        gdc_wait()
    for row in range(tl.program_id(1) % row_programs, num_rows, row_programs):
        m_index = row_start + (first_row + row) // GROUP
        head = h_kv * GROUP + (first_row + row) % GROUP
        first = first_slot.to(tl.int64) * BLOCK_M + row
        others = 2 * begun_by.to(tl.int64) * BLOCK_M + row
        _combine_row(
            partials, out, lse, sinks, b_rows, m_index, head, True, first, others, 2 * BLOCK_M, num_parts, column_block,
            HEAD_DIM_V, BLOCK_D, BLOCK_S, ONE_BLOCK,
        )  # fmt: skip


@triton.jit
def _combine_row(
    partials, out, lse, sinks, b, m_index, head, owned, first, others, STEP: tl.constexpr, num_parts, column_block,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK_D columns of one row of out, and its lse: part 0 is partial row ``first``, part i > 0 is ``others`` + i * STEP (int64).

    Not ``owned``: the row belongs to no sequence, so that the sink does not join.
    """
    d = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
    column = d < HEAD_DIM_V
    s = tl.arange(0, BLOCK_S)
    # ()
    m = float("-inf")
    l = 0.0
    # (BLOCK_D,)
    acc = tl.zeros([BLOCK_D], tl.float32)
    if ONE_BLOCK:
        rows = tl.where(s == 0, first, others + s * STEP)
        m, l, acc = _fold(partials, rows, s < num_parts, d, column, m, l, acc, HEAD_DIM_V)
    else:
        for start in range(0, num_parts, BLOCK_S):
            part = start + s
            rows = tl.where(part == 0, first, others + part.to(tl.int64) * STEP)
            m, l, acc = _fold(partials, rows, part < num_parts, d, column, m, l, acc, HEAD_DIM_V)
    if sinks is not None:
        m, l, alpha = join_sink(m, l, tl.where(owned, tl.load(sinks + head), float("-inf")))
        acc = acc * alpha
    offset = row_offsets(out, b, m_index, head)
    tl.store(out.ptr + offset + d, (acc * normaliser(l)).to(out.ptr.dtype.element_ty), mask=column)
    if lse.ptr is not None:
        at = b.to(tl.int64) * lse.stride_b + head.to(tl.int64) * lse.stride_h + m_index.to(tl.int64) * lse.stride_m
        tl.store(lse.ptr + at, natural_lse(m, l), mask=column_block == 0)


@triton.jit
def _fold(partials, rows, known, d, column, m, l, acc, HEAD_DIM_V: tl.constexpr):
    """Merges the ``known`` ones of some partial rows into (m, l, acc): one step of online softmax, a part as a key."""
    # (BLOCK_S,)
    weight = tl.load(partials.ptr + partials.lse_start + rows, mask=known, other=float("-inf")) * LOG2E
    # (BLOCK_S, BLOCK_D), asked for before the weights are there; of a part without keys they are whatever memory held
    values = tl.load(
        partials.ptr + rows[:, None] * HEAD_DIM_V + d[None, :],
        mask=known[:, None] & column[None, :],
        other=0.0,
    )
    values = tl.where((weight > float("-inf"))[:, None], values, 0.0)
    m_new = tl.maximum(m, tl.max(weight, 0))
    shift = finite(m_new)
    p = tl.exp2(weight - shift)
    alpha = tl.exp2(m - shift)
    return m_new, l * alpha + tl.sum(p, 0), acc * alpha + tl.sum(values * p[:, None], 0)


def combines(plan: DecodePlan) -> bool:
    """Whether the plan splits any unit's keys, so that the split kernel leaves partial results."""
    return plan.num_programs > 1 if plan.num_programs else plan.num_splits > 1


def partials_spec(plan: DecodePlan) -> PartialsView:
    """How partial results are passed to both kernels."""
    if plan.num_programs:
        return PartialsView(Arg("*fp32", 16), Arg("i64"), None)
    if plan.num_splits > 1:
        return PartialsView(Arg("*fp32", 16), Arg("i64"), Arg("i32"))
    return PartialsView(None, None, None)


def combine_spec(problem: Problem, plan: DecodePlan) -> Spec:
    """Combine's specialisation: of the number of splits only the block that holds them counts."""
    i32, i64 = Arg("i32"), Arg("i64")
    stride = Arg("i64", max(1, problem.alignment // DTYPE_BYTES[problem.dtype_out]))
    most = _ONE_WARP_HOLDS if plan.combine_warps == 1 else _SPLITS_AT_ONCE[-1]
    block_s = next((size for size in _SPLITS_AT_ONCE if size >= plan.num_splits or size == most), most)
    on_line = plan.num_programs > 0
    sequences = sequences_at_once(problem.batch) if on_line else 0
    band = band_view(problem.band) if on_line else BandView(None, None)
    return Spec(
        combine_kernel,
        args={
            "partials": partials_spec(plan),
            "out": RowsView(Arg("*" + TRITON_DTYPES[problem.dtype_out], problem.alignment), stride, stride, stride),
            "lse": LseView(Arg("*fp32"), i64, i64, i64) if problem.lse else LseView(None, None, None, None),
            "lengths": lengths_spec(problem),
            "band": BandView(*(None if side is None else i32 for side in band)),
            "sinks": Arg("*fp32") if problem.sinks else None,
            "num_heads": i32,
            "batch": i32,
            "num_programs": i32,
            "row_blocks": i32,
            "row_programs": i32,
        },
        constants={
            "HEAD_DIM_V": problem.head_dim_v,
            "BLOCK_D": plan.combine_block_d,
            "BLOCK_S": block_s,
            # how many programs of a line share a unit is known on the device alone
            "ONE_BLOCK": max(plan.num_splits, plan.num_programs) <= block_s,
            "GROUP": problem.group if on_line else 0,
            "BLOCK_M": plan.block_m if on_line else 0,
            "BLOCK_N": plan.block_n if on_line else 0,
            "SEQUENCES": sequences,
            "ONE_STEP": problem.batch <= sequences,
            "UNIT_COST": unit_cost(plan),
            "PDL": plan.dependent_launch,
        },
        options={"num_warps": plan.combine_warps, "num_stages": 1, **({"launch_pdl": True} if plan.dependent_launch else {})},
    )


def bind_combine(problem: Problem, plan: DecodePlan, device: torch.device) -> Callable[..., None]:
    """``combine(stream, rows, partials, out, lse, lengths, sinks)``: views as the split kernel was given them.

    Where programs share a line, ``rows`` does not count, and there must be two of them at least.
    """
    launch = launcher(combine_spec(problem, plan), device)
    columns = -(-problem.head_dim_v // plan.combine_block_d)
    row_blocks = max(1, -(-problem.rows // plan.block_m))
    units = problem.batch * problem.num_heads_kv * row_blocks
    row_programs = min(plan.block_m, max(1, problem.rows), max(1, _PROGRAMS_ON_LINE // (columns * max(1, units))))
    band = band_view(problem.band) if plan.num_programs else BandView(None, None)
    last = (problem.num_heads_q, problem.batch, plan.num_programs, row_blocks, row_programs, *launch.constants)

    def combine_splits(stream: int, rows: int, *views: object) -> None:
        *given, sinks = views
        launch.run(rows, columns, stream, *given, band, sinks, *last)

    def combine_on_line(stream: int, rows: int, *views: object) -> None:
        *given, sinks = views
        launch.run(units, columns * row_programs, stream, *given, band, sinks, *last)

    return combine_on_line if plan.num_programs else combine_splits


def unit_cost(plan: DecodePlan) -> int:
    """Positions on the line that a unit takes beside its tiles: about what beginning and ending one takes a program.

    None where a unit is split even if all lengths are alike: each of its programs begins and ends a part of it.
    """
    return 1 if plan.num_programs and plan.num_splits == 1 else 0
