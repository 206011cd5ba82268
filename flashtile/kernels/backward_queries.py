"""The backward's second pass: a program owns BLOCK_M query positions of one sequence and query head, and sums their dQ.

It walks their keys as the forward does: tiles of keys that only some rows see are a loop of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.kernels.forward import value_parts
from flashtile.kernels.launch import Arg, Spec
from flashtile.kernels.operands import (
    Layout,
    band_spec,
    dropout_spec,
    keys_specs,
    rows_spec,
    scores_spec,
    statistics_spec,
    tokens_spec,
    usual_layout,
)
from flashtile.kernels.tile.band import keys_of, visible_keys, whole_tiles
from flashtile.kernels.tile.cache import load_tile
from flashtile.kernels.tile.dropout import kept
from flashtile.kernels.tile.gradients import load_statistics, probabilities, score_gradients, slope_of
from flashtile.kernels.tile.order import row_block_of
from flashtile.kernels.tile.results import store_rows
from flashtile.kernels.tile.rows import clear_rows, load_rows
from flashtile.kernels.tile.schedule import owned_rows, sequence_rows, stored_keys
from flashtile.kernels.tile.softmax import LN2
from flashtile.kernels.tile.views import row_offsets
from flashtile.planner.plans import BackwardPlan
from flashtile.problem import Problem


@triton.jit
def backward_queries_kernel(
    q, dout, statistics, k, v, dq, tokens, scores, band, dropout, num_heads, batch, row_blocks, heads_at_once,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    D: tl.constexpr, D_REST: tl.constexpr, DV: tl.constexpr, DV_REST: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * query heads * row blocks), in the order of tile/order.py. A head dim is held in two parts, of D and D_REST dims."""
    b, h, row_block = row_block_of(tl.program_id(0), num_heads, batch, row_blocks, heads_at_once, band.right is not None)
    row_start, seqlen_q = sequence_rows(tokens, b)
    # the last sequence's programs share the rows of nobody
    if tokens.cu_seqlens_q is not None:
        if b == batch - 1:
            begin = owned_rows(tokens, batch) + row_block
            clear_rows(dq.ptr, dq.stride_m, dq.stride_h, begin, tokens.total_q, row_blocks, h, 1, HEAD_DIM)
    if row_block * BLOCK_M >= seqlen_q:
        return
    key_start, seqlen_k = stored_keys(tokens, b)
    offset = seqlen_k - seqlen_q
    # (BLOCK_M,)
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < seqlen_q
    b_rows = b * 0 if tokens.cu_seqlens_q is not None else b
    q_rows = row_offsets(q, b_rows, row_start + row, h)
    dout_rows = row_offsets(dout, b_rows, row_start + row, h)
    lse_log2, delta = load_statistics(statistics, b_rows, h, row_start, row, real)
    # [BLOCK_M, D], [BLOCK_M, DV] and the rest of both
    q_tile = load_rows(q.ptr, q_rows, real, D, min(HEAD_DIM, D))
    dout_tile = load_rows(dout.ptr, dout_rows, real, DV, min(HEAD_DIM_V, DV))
    dq_sum = tl.zeros([BLOCK_M, D], tl.float32)
    q_rest, dout_rest, dq_rest = q_tile, dout_tile, dq_sum
    if D_REST > 0:
        q_rest = load_rows(q.ptr + D, q_rows, real, D_REST, HEAD_DIM - D)
        dq_rest = tl.zeros([BLOCK_M, D_REST], tl.float32)
    if DV_REST > 0:
        dout_rest = load_rows(dout.ptr + DV, dout_rows, real, DV_REST, HEAD_DIM_V - DV)

    first_position = row_block * BLOCK_M + offset
    last_position = tl.minimum(row_block * BLOCK_M + BLOCK_M, seqlen_q) - 1 + offset
    first, last = keys_of(band, first_position, last_position, seqlen_k)
    whole_start, whole_end = whole_tiles(band, first_position, last_position, first, last, BLOCK_N)
    b_keys = b * 0 if tokens.cu_seqlens_k is not None else b
    for edges in tl.static_range(2):
        dq_sum, dq_rest = _walk(
            dq_sum, dq_rest, q_tile, q_rest, dout_tile, dout_rest, lse_log2, delta, k, v, scores, band, dropout, slope_of(scores, b, h),
            b_keys, h // GROUP, key_start, row + offset, first, last, whole_start, whole_end, b * num_heads + h, row_block * BLOCK_M,
            edges == 0, BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, D, D_REST, DV, DV_REST, STAGES, PRECISION,
        )  # fmt: skip

    scale = scores.scale_log2 * LN2
    dq_rows = row_offsets(dq, b_rows, row_start + row, h)
    store_rows(dq.ptr, dq_rows, real, dq_sum * scale, False, min(HEAD_DIM, D))
    if D_REST > 0:
        store_rows(dq.ptr + D, dq_rows, real, dq_rest * scale, False, HEAD_DIM - D)


@triton.jit
def _walk(
    dq_sum, dq_rest, q_tile, q_rest, dout_tile, dout_rest, lse_log2, delta, k, v, scores, band, dropout, slope,
    b, h_kv, key_start, position, first, last, whole_start, whole_end, stream, first_row, EDGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    D: tl.constexpr, D_REST: tl.constexpr, DV: tl.constexpr, DV_REST: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows at key positions ``position`` (BLOCK_M,) over the tiles that they all see whole, or where EDGES over the rest of [first, last).

    ``key_start`` is the sequence's first key within a packed k; ``stream`` and ``first_row`` are what dropout goes by. Returns both
    parts of dQ, short of the scale, carried on.
    """
    k_ptr = k.ptr + key_start.to(tl.int64) * k.stride_n
    v_view = k if v.stride_n is None else v
    v_ptr = v.ptr + key_start.to(tl.int64) * v_view.stride_n
    # (BLOCK_N,), (D,), (DV,)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    # (BLOCK_M,)
    lowest, highest = visible_keys(band, position, first, last)
    left_edge = whole_start - first // BLOCK_N
    if EDGES:
        begin = whole_start * 0
        end = left_edge + tl.maximum(tl.cdiv(last, BLOCK_N) - whole_end, 0)
    else:
        begin = whole_start
        end = whole_end
    for i in tl.range(begin, end, num_stages=STAGES):
        if EDGES:
            tile = tl.where(i < left_edge, first // BLOCK_N + i, whole_end + i - left_edge) * BLOCK_N
        else:
            tile = i * BLOCK_N
        slot = tl.full([], 0, tl.int64) + tile
        key = tile + n
        inside = (key >= first) & (key < last) if EDGES else None
        # [BLOCK_N, D]
        k_tile = load_tile(k_ptr, k, h_kv, b.to(tl.int64), slot, inside, n, d, min(HEAD_DIM, D), BLOCK_N, 0)
        # [BLOCK_M, BLOCK_N]
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        k_rest = k_tile
        if D_REST > 0:
            k_rest = load_tile(k_ptr + D, k, h_kv, b.to(tl.int64), slot, inside, n, tl.arange(0, D_REST), HEAD_DIM - D, BLOCK_N, 0)
            s = tl.dot(q_rest, tl.trans(k_rest), s, input_precision=PRECISION)
        # [BLOCK_N, DV]
        v_tile = load_tile(v_ptr, v_view, h_kv, b.to(tl.int64), slot, inside, n, dv, min(HEAD_DIM_V, DV), BLOCK_N, 0)
        # [BLOCK_M, BLOCK_N]
        dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision=PRECISION)
        if dropout.seed is None:
            dp = dp - delta[:, None]
        if DV_REST > 0:
            v_rest = load_tile(
                v_ptr + DV, v_view, h_kv, b.to(tl.int64), slot, inside, n, tl.arange(0, DV_REST), HEAD_DIM_V - DV, BLOCK_N, 0
            )
            dp = tl.dot(dout_rest, tl.trans(v_rest), dp, input_precision=PRECISION)
        if dropout.seed is not None:
            dp = tl.where(kept(dropout, stream, first_row, tile, BLOCK_M, BLOCK_N), dp * dropout.scale, 0.0) - delta[:, None]
        visible = (key[None, :] >= lowest[:, None]) & (key[None, :] <= highest[:, None]) if EDGES else None
        p, capped = probabilities(s, scores, slope, key[None, :] - position[:, None], visible, lse_log2[:, None])
        ds = score_gradients(p, dp, capped, scores).to(k_tile.dtype)
        dq_sum = tl.dot(ds, k_tile, dq_sum, input_precision=PRECISION)
        if D_REST > 0:
            dq_rest = tl.dot(ds, k_rest, dq_rest, input_precision=PRECISION)
    return dq_sum, dq_rest


def queries_spec(problem: Problem, plan: BackwardPlan, layout: Layout | None = None) -> Spec:
    """The kernel's specialisation for a layout of K and V, by default the usual one."""
    (dim, rest), (dim_v, rest_v) = value_parts(problem.head_dim, plan.dq_block_m), value_parts(problem.head_dim_v, plan.dq_block_m)
    i32 = Arg("i32")
    return Spec(
        backward_queries_kernel,
        args={
            "q": rows_spec(problem, problem.dtype_q),
            "dout": rows_spec(problem, problem.dtype_out),
            "statistics": statistics_spec(),
            **keys_specs(problem, usual_layout(problem) if layout is None else layout),
            "dq": rows_spec(problem, problem.dtype_q),
            "tokens": tokens_spec(problem),
            "scores": scores_spec(problem),
            "band": band_spec(problem.band),
            "dropout": dropout_spec(problem),
            "num_heads": i32,
            "batch": i32,
            "row_blocks": i32,
            "heads_at_once": i32,
        },
        constants={
            "GROUP": problem.group,
            "BLOCK_M": plan.dq_block_m,
            "BLOCK_N": plan.dq_block_n,
            "HEAD_DIM": problem.head_dim,
            "HEAD_DIM_V": problem.head_dim_v,
            "D": dim,
            "D_REST": rest,
            "DV": dim_v,
            "DV_REST": rest_v,
            "STAGES": plan.dq_num_stages,
            "PRECISION": "tf32" if problem.allow_tf32 else "ieee",
        },
        options={"num_warps": plan.dq_num_warps, "num_stages": plan.dq_num_stages},
    )
