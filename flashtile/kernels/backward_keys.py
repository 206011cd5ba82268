"""The backward's first pass: a program owns BLOCK_N keys of one sequence and key head, and sums their dK and dV.

It walks the queries that see its keys, of all query heads that share the key head, in one loop, so that nothing is added up
between programs. Queries see keys in a band, and keys see queries in the transposed one: ``band`` here is the latter, and the
mask is tile/band.py's. As in the forward, tiles of queries that only some of the keys see are a loop of their own.
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
    rows_spec,
    scores_spec,
    statistics_spec,
    tokens_spec,
    usual_layout,
    walked_specs,
)
from flashtile.kernels.tile.band import keys_of, visible_keys, whole_tiles
from flashtile.kernels.tile.cache import load_tile
from flashtile.kernels.tile.dropout import kept_transposed
from flashtile.kernels.tile.gradients import load_statistics, probabilities, score_gradients, slope_of
from flashtile.kernels.tile.order import row_block_of
from flashtile.kernels.tile.results import store_rows
from flashtile.kernels.tile.rows import clear_rows, load_rows
from flashtile.kernels.tile.schedule import key_room, owned_keys, sequence_rows, stored_keys
from flashtile.kernels.tile.softmax import LN2
from flashtile.kernels.tile.views import row_offsets
from flashtile.planner.plans import BackwardPlan
from flashtile.problem import Problem


@triton.jit
def backward_keys_kernel(
    q, dout, statistics, k, v, dk, dv, tokens, scores, band, dropout, num_heads, batch, key_blocks, heads_at_once,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    D: tl.constexpr, D_REST: tl.constexpr, DV: tl.constexpr, DV_REST: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * key heads * key blocks), in the order of tile/order.py; under a causal mask the first keys have the most queries.

    q and dout are views of keys, for they are walked like keys; dout's strides are None where they are q's. A head dim is held
    in two parts, of D and D_REST dims (0: none).
    """
    b, h, key_block = row_block_of(tl.program_id(0), num_heads, batch, key_blocks, heads_at_once, band.left is None)
    key_start, room = key_room(tokens, b)
    # the last sequence's programs share the keys of nobody
    if tokens.cu_seqlens_k is not None:
        if b == batch - 1:
            owned = owned_keys(tokens, batch)
            clear_rows(dk.ptr, dk.stride_m, dk.stride_h, owned + key_block, tokens.total_k, key_blocks, h, 1, HEAD_DIM)
            clear_rows(dv.ptr, dv.stride_m, dv.stride_h, owned + key_block, tokens.total_k, key_blocks, h, 1, HEAD_DIM_V)
    if key_block * BLOCK_N >= room:
        return
    _, seqlen_k = stored_keys(tokens, b)
    row_start, seqlen_q = sequence_rows(tokens, b)
    # (BLOCK_N,)
    key = key_block * BLOCK_N + tl.arange(0, BLOCK_N)
    real = key < seqlen_k
    b_keys = b * 0 if tokens.cu_seqlens_k is not None else b
    k_rows = row_offsets(k, b_keys, key_start + key, h)
    v_rows = row_offsets(v, b_keys, key_start + key, h)
    # [BLOCK_N, D], [BLOCK_N, DV] and the rest of both
    k_tile = load_rows(k.ptr, k_rows, real, D, min(HEAD_DIM, D))
    v_tile = load_rows(v.ptr, v_rows, real, DV, min(HEAD_DIM_V, DV))
    dk_sum = tl.zeros([BLOCK_N, D], tl.float32)
    dv_sum = tl.zeros([BLOCK_N, DV], tl.float32)
    k_rest, v_rest, dk_rest, dv_rest = k_tile, v_tile, dk_sum, dv_sum
    if D_REST > 0:
        k_rest = load_rows(k.ptr + D, k_rows, real, D_REST, HEAD_DIM - D)
        dk_rest = tl.zeros([BLOCK_N, D_REST], tl.float32)
    if DV_REST > 0:
        v_rest = load_rows(v.ptr + DV, v_rows, real, DV_REST, HEAD_DIM_V - DV)
        dv_rest = tl.zeros([BLOCK_N, DV_REST], tl.float32)

    # keys among queries: where they stand in the other's numbering
    position = key - (seqlen_k - seqlen_q)
    first_position = key_block * BLOCK_N - (seqlen_k - seqlen_q)
    last_position = tl.minimum(key_block * BLOCK_N + BLOCK_N, seqlen_k) - 1 - (seqlen_k - seqlen_q)
    # keys that do not count are seen by nobody
    queries = tl.where(key_block * BLOCK_N < seqlen_k, seqlen_q, 0)
    first, last = keys_of(band, first_position, last_position, queries)
    whole_start, whole_end = whole_tiles(band, first_position, last_position, first, last, BLOCK_M)
    for edges in tl.static_range(2):
        dk_sum, dk_rest, dv_sum, dv_rest = _walk(
            dk_sum, dk_rest, dv_sum, dv_rest, k_tile, k_rest, v_tile, v_rest, q, dout, statistics, tokens, scores, band, dropout,
            b, h, num_heads * GROUP, row_start, position, first, last, whole_start, whole_end, key_block * BLOCK_N, edges == 0,
            GROUP, BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, D, D_REST, DV, DV_REST, STAGES, PRECISION,
        )  # fmt: skip

    scale = scores.scale_log2 * LN2
    if dropout.seed is not None:
        dv_sum = dv_sum * dropout.scale
        dv_rest = dv_rest * dropout.scale
    exists = key < room
    dk_rows = row_offsets(dk, b_keys, key_start + key, h)
    dv_rows = row_offsets(dv, b_keys, key_start + key, h)
    store_rows(dk.ptr, dk_rows, exists, tl.where(real[:, None], dk_sum * scale, 0.0), False, min(HEAD_DIM, D))
    store_rows(dv.ptr, dv_rows, exists, tl.where(real[:, None], dv_sum, 0.0), False, min(HEAD_DIM_V, DV))
    if D_REST > 0:
        store_rows(dk.ptr + D, dk_rows, exists, tl.where(real[:, None], dk_rest * scale, 0.0), False, HEAD_DIM - D)
    if DV_REST > 0:
        store_rows(dv.ptr + DV, dv_rows, exists, tl.where(real[:, None], dv_rest, 0.0), False, HEAD_DIM_V - DV)


@triton.jit
def _walk(
    dk_sum, dk_rest, dv_sum, dv_rest, k_tile, k_rest, v_tile, v_rest, q, dout, statistics, tokens, scores, band, dropout,
    b, h, num_heads_q, row_start, position, first, last, whole_start, whole_end, first_key, EDGES: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    D: tl.constexpr, D_REST: tl.constexpr, DV: tl.constexpr, DV_REST: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys at query positions ``position`` (BLOCK_N,) over the tiles of queries that see them all, or where EDGES over the rest.

    ``first_key`` is what dropout goes by. Returns both parts of dK, short of the scale, and of dV, short of dropout's, carried on.
    """
    b_rows = b * 0 if tokens.cu_seqlens_q is not None else b
    q_ptr = q.ptr + row_start.to(tl.int64) * q.stride_n
    dout_view = q if dout.stride_n is None else dout
    dout_ptr = dout.ptr + row_start.to(tl.int64) * dout_view.stride_n
    # (BLOCK_M,), (D,), (DV,)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    # (BLOCK_N,)
    lowest, highest = visible_keys(band, position, first, last)
    left_edge = whole_start - first // BLOCK_M
    if EDGES:
        tiles = left_edge + tl.maximum(tl.cdiv(last, BLOCK_M) - whole_end, 0)
    else:
        tiles = whole_end - whole_start
    for i in tl.range(0, GROUP * tiles, num_stages=STAGES):
        head = h
        j = i
        if GROUP > 1:
            head = h * GROUP + i // tl.maximum(tiles, 1)
            j = i % tl.maximum(tiles, 1)
        if EDGES:
            tile = tl.where(j < left_edge, first // BLOCK_M + j, whole_end + j - left_edge) * BLOCK_M
        else:
            tile = (whole_start + j) * BLOCK_M
        slot = tl.full([], 0, tl.int64) + tile
        row = tile + m
        inside = (row >= first) & (row < last) if EDGES else None
        # [BLOCK_M, D]
        q_tile = load_tile(q_ptr, q, head, b_rows.to(tl.int64), slot, inside, m, d, min(HEAD_DIM, D), BLOCK_M, 0)
        # [BLOCK_N, BLOCK_M]
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        q_rest = q_tile
        if D_REST > 0:
            q_rest = load_tile(q_ptr + D, q, head, b_rows.to(tl.int64), slot, inside, m, tl.arange(0, D_REST), HEAD_DIM - D, BLOCK_M, 0)
            s = tl.dot(k_rest, tl.trans(q_rest), s, input_precision=PRECISION)
        lse_log2, delta = load_statistics(statistics, b_rows, head, row_start + tile, m, inside)
        visible = None
        if EDGES and (band.left is not None or band.right is not None):
            visible = (row[None, :] >= lowest[:, None]) & (row[None, :] <= highest[:, None])
        distance = position[:, None] - row[None, :]
        p, capped = probabilities(s, scores, slope_of(scores, b, head), distance, visible, lse_log2[None, :])
        # [BLOCK_M, DV]
        dout_tile = load_tile(dout_ptr, dout_view, head, b_rows.to(tl.int64), slot, inside, m, dv, min(HEAD_DIM_V, DV), BLOCK_M, 0)
        p_operand = p.to(dout_tile.dtype)
        keep = None
        if dropout.seed is not None:
            keep = kept_transposed(dropout, b * num_heads_q + head, tile, first_key, BLOCK_M, BLOCK_N)
            p_operand = tl.where(keep, p, 0.0).to(dout_tile.dtype)
        dv_sum = tl.dot(p_operand, dout_tile, dv_sum, input_precision=PRECISION)
        # [BLOCK_N, BLOCK_M], less delta from the start: a register for each row's delta would be one too many
        dp = tl.zeros_like(s)
        if keep is None:
            dp = dp - delta[None, :]
        dp = tl.dot(v_tile, tl.trans(dout_tile), dp, input_precision=PRECISION)
        if DV_REST > 0:
            dout_rest = load_tile(
                dout_ptr + DV, dout_view, head, b_rows.to(tl.int64), slot, inside, m, tl.arange(0, DV_REST), HEAD_DIM_V - DV, BLOCK_M, 0
            )
            dv_rest = tl.dot(p_operand, dout_rest, dv_rest, input_precision=PRECISION)
            dp = tl.dot(v_rest, tl.trans(dout_rest), dp, input_precision=PRECISION)
        if keep is not None:
            dp = tl.where(keep, dp * dropout.scale, 0.0) - delta[None, :]
        ds = score_gradients(p, dp, capped, scores).to(q_tile.dtype)
        dk_sum = tl.dot(ds, q_tile, dk_sum, input_precision=PRECISION)
        if D_REST > 0:
            dk_rest = tl.dot(ds, q_rest, dk_rest, input_precision=PRECISION)
    return dk_sum, dk_rest, dv_sum, dv_rest


def keys_spec(problem: Problem, plan: BackwardPlan, layout: Layout | None = None) -> Spec:
    """The kernel's specialisation for a layout of q and dout, by default the usual one."""
    (dim, rest), (dim_v, rest_v) = value_parts(problem.head_dim, plan.block_n), value_parts(problem.head_dim_v, plan.block_n)
    i32 = Arg("i32")
    keys, values = rows_spec(problem, problem.dtype_k), rows_spec(problem, problem.dtype_v)
    walked = walked_specs(problem, usual_layout(problem) if layout is None else layout, q=problem.dtype_q, dout=problem.dtype_out)
    return Spec(
        backward_keys_kernel,
        args={
            **walked,
            "statistics": statistics_spec(),
            "k": keys,
            "v": values,
            "dk": keys,
            "dv": values,
            "tokens": tokens_spec(problem),
            "scores": scores_spec(problem),
            "band": band_spec(problem.band.transposed()),
            "dropout": dropout_spec(problem),
            "num_heads": i32,
            "batch": i32,
            "key_blocks": i32,
            "heads_at_once": i32,
        },
        constants={
            "GROUP": problem.group,
            "BLOCK_M": plan.block_m,
            "BLOCK_N": plan.block_n,
            "HEAD_DIM": problem.head_dim,
            "HEAD_DIM_V": problem.head_dim_v,
            "D": dim,
            "D_REST": rest,
            "DV": dim_v,
            "DV_REST": rest_v,
            "STAGES": plan.num_stages,
            "PRECISION": "tf32" if problem.allow_tf32 else "ieee",
        },
        options={"num_warps": plan.num_warps, "num_stages": plan.num_stages},
    )
