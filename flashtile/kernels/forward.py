"""Forward: attention of many queries (prefill, and the forward half of training), portable over GPUs.

A program holds BLOCK_M query positions of one sequence and query head, and walks the keys that any of them sees. Tiles of
keys that only some rows see, at the edges of the band and at the end of the keys, are a loop of their own, so that the main loop
has no mask. A head dim is held in powers of two: in two parts where that saves something (96 is 64 + 32), else in one. Where
they hold more dims than there are, the loads are masked.

Source: FlashAttention-2 (Dao 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from flashtile.errors import UnsupportedError
from flashtile.kernels.call import ForwardCall, ForwardRunner
from flashtile.kernels.launch import Arg, Launch, Spec, launcher, on_device, pointer_of
from flashtile.kernels.operands import (
    Layout,
    dropout_spec,
    dropout_view,
    keys_specs,
    lse_view,
    pipeline_stages,
    rows_spec,
    rows_view,
    scores_view,
    shared_specs,
    tokens_spec,
    usual_layout,
    with_keys,
)
from flashtile.kernels.sections import heads_at_once
from flashtile.kernels.tile.band import keys_of, visible_keys, whole_tiles
from flashtile.kernels.tile.cache import load_tile, locate
from flashtile.kernels.tile.dropout import kept
from flashtile.kernels.tile.order import row_block_of
from flashtile.kernels.tile.results import clear_unowned, store_lse, store_rows
from flashtile.kernels.tile.rows import load_rows
from flashtile.kernels.tile.schedule import sequence_rows, stored_keys
from flashtile.kernels.tile.softmax import LOG2E, join_sink, normaliser, online_step, softcapped
from flashtile.kernels.tile.views import band_view, row_offsets
from flashtile.planner.forward_footprint import SMALLEST_PART, parts_of
from flashtile.planner.plans import ForwardPlan
from flashtile.problem import Problem

_MAX_GRID_X = 2**31 - 1


@triton.jit
def forward_kernel(
    q, k, v, out, lse, tokens, pages, scores, band, sinks, dropout, num_heads, batch, row_blocks, heads_at_once,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    D: tl.constexpr, D_REST: tl.constexpr, DV: tl.constexpr, DV_REST: tl.constexpr,
    PAGE_SIZE: tl.constexpr, NEGATIVE_SCALE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * query heads * row blocks), in the order of tile/order.py.

    A head dim is held in two parts, of D and D_REST dims (0: none), both powers of two; so are the values'.
    """
    b, h, row_block = row_block_of(tl.program_id(0), num_heads, batch, row_blocks, heads_at_once, band.right is not None)
    row_start, seqlen_q = sequence_rows(tokens, b)
    # the last sequence's programs share the rows of nobody
    if b == batch - 1:
        clear_unowned(out, lse, tokens, batch, row_block, row_blocks, h, 1, HEAD_DIM_V)
    if row_block * BLOCK_M >= seqlen_q:
        return
    key_start, seqlen_k = stored_keys(tokens, b)
    offset = seqlen_k - seqlen_q
    # (BLOCK_M,)
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < seqlen_q
    b_rows = b * 0 if tokens.cu_seqlens_q is not None else b
    q_rows = row_offsets(q, b_rows, row_start + row, h)
    q_tile = load_rows(q.ptr, q_rows, real, D, min(HEAD_DIM, D))
    q_rest = q_tile
    if D_REST > 0:
        q_rest = load_rows(q.ptr + D, q_rows, real, D_REST, HEAD_DIM - D)
    slope = 0.0
    if scores.slopes is not None:
        slope = tl.load(scores.slopes + b.to(tl.int64) * scores.slopes_stride_b + h) * LOG2E

    first_position = row_block * BLOCK_M + offset
    last_position = tl.minimum(row_block * BLOCK_M + BLOCK_M, seqlen_q) - 1 + offset
    first, last = keys_of(band, first_position, last_position, seqlen_k)
    whole_start, whole_end = whole_tiles(band, first_position, last_position, first, last, BLOCK_N)
    # (BLOCK_M,)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    acc_rest = acc
    if DV_REST > 0:
        acc_rest = tl.zeros([BLOCK_M, DV_REST], tl.float32)
    b_keys = b * 0 if tokens.cu_seqlens_k is not None else b
    for edges in tl.static_range(2):
        m, l, acc, acc_rest = _walk(
            m, l, acc, acc_rest, q_tile, q_rest, k, v, pages, scores, band, dropout, slope, b_keys, h // GROUP, key_start, row + offset,
            first, last, whole_start, whole_end, b * num_heads + h, row_block * BLOCK_M, edges == 0,
            BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, D, D_REST, DV, DV_REST, PAGE_SIZE, NEGATIVE_SCALE, STAGES, PRECISION,
        )  # fmt: skip

    if sinks is not None:
        m, l, alpha = join_sink(m, l, tl.load(sinks + h))
        acc = acc * alpha[:, None]
        acc_rest = acc_rest * alpha[:, None]
    store_lse(lse, b_rows, row_start + row, h, real, m, l)
    inverse = normaliser(l)[:, None]
    if dropout.seed is not None:
        inverse = inverse * dropout.scale
    out_rows = row_offsets(out, b_rows, row_start + row, h)
    store_rows(out.ptr, out_rows, real, acc * inverse, False, min(HEAD_DIM_V, DV))
    if DV_REST > 0:
        store_rows(out.ptr + DV, out_rows, real, acc_rest * inverse, False, HEAD_DIM_V - DV)


@triton.jit
def _walk(
    m, l, acc, acc_rest, q_tile, q_rest, k, v, pages, scores, band, dropout, slope, b, h_kv, key_start, position,
    first, last, whole_start, whole_end, stream, first_row, EDGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    D: tl.constexpr, D_REST: tl.constexpr, DV: tl.constexpr, DV_REST: tl.constexpr,
    PAGE_SIZE: tl.constexpr, NEGATIVE_SCALE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows at key positions ``position`` (BLOCK_M,) over the tiles that they all see whole, or where EDGES over the rest of [first, last).

    ``key_start`` is the sequence's first key within a packed k; ``stream`` and ``first_row`` are what dropout goes by. Returns the
    maximum and sum (BLOCK_M,) in base 2 and both parts of the sum of values, carried on.
    """
    # online_step wants a factor that keeps the order of scores; other scores are multiplied before
    SHAPED: tl.constexpr = scores.softcap is not None or scores.slopes is not None or NEGATIVE_SCALE
    factor = scores.scale_log2 if NEGATIVE_SCALE else tl.maximum(scores.scale_log2, 1e-30)
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
        block, slot, inside = locate(pages, b, tile, n, first if EDGES else None, last, BLOCK_N, PAGE_SIZE)
        # a whole tile of keys that are not on pages is there
        exists = inside if EDGES or PAGE_SIZE > 0 else None
        # [BLOCK_N, D]
        k_tile = load_tile(k_ptr, k, h_kv, block, slot, exists, n, d, min(HEAD_DIM, D), BLOCK_N, PAGE_SIZE)
        # [BLOCK_M, BLOCK_N]
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        if D_REST > 0:
            k_rest = load_tile(k_ptr + D, k, h_kv, block, slot, exists, n, tl.arange(0, D_REST), HEAD_DIM - D, BLOCK_N, PAGE_SIZE)
            s = tl.dot(q_rest, tl.trans(k_rest), s, input_precision=PRECISION)
        key = (tile + n)[None, :]
        if SHAPED:
            s = s * factor
            if scores.softcap is not None:
                s = softcapped(s, scores.softcap * LOG2E)
            if scores.slopes is not None:
                s = s - slope * tl.abs(key - position[:, None]).to(tl.float32)
        if PAGE_SIZE > 0:
            s = tl.where(inside[None, :], s, float("-inf"))
        if EDGES:
            s = tl.where((key >= lowest[:, None]) & (key <= highest[:, None]), s, float("-inf"))
        m, l, p, alpha = online_step(m, l, s, 1.0 if SHAPED else factor, 1)
        if dropout.seed is not None:
            p = tl.where(kept(dropout, stream, first_row, tile, BLOCK_M, BLOCK_N), p, 0.0)
        # [BLOCK_N, DV]
        v_tile = load_tile(v_ptr, v_view, h_kv, block, slot, exists, n, dv, min(HEAD_DIM_V, DV), BLOCK_N, PAGE_SIZE)
        p = p.to(v_tile.dtype)
        acc = tl.dot(p, v_tile, acc * alpha[:, None], input_precision=PRECISION)
        if DV_REST > 0:
            v_rest = load_tile(v_ptr + DV, v_view, h_kv, block, slot, exists, n, tl.arange(0, DV_REST), HEAD_DIM_V - DV, BLOCK_N, PAGE_SIZE)
            acc_rest = tl.dot(p, v_rest, acc_rest * alpha[:, None], input_precision=PRECISION)
    return m, l, acc, acc_rest


def value_parts(head_dim_v: int, block_m: int) -> tuple[int, int]:
    """``parts_of`` the values' head dim; a lone part that is wider than the tile has rows is halved.

    Of a result wider than high Triton has warps share rows, and they have to agree on each row's maximum.
    """
    whole, rest = parts_of(head_dim_v)
    return (whole // 2, whole // 2) if rest == 0 and whole > max(block_m, SMALLEST_PART) else (whole, rest)


def forward_spec(problem: Problem, plan: ForwardPlan, layout: Layout | None = None, *, negative_scale: bool = False) -> Spec:
    """The kernel's specialisation for a layout of K and V, by default the usual one."""
    (dim, rest), (dim_v, rest_v) = parts_of(problem.head_dim), value_parts(problem.head_dim_v, plan.block_m)
    i32 = Arg("i32")
    return Spec(
        forward_kernel,
        args={
            "q": rows_spec(problem, problem.dtype_q),
            "out": rows_spec(problem, problem.dtype_out),
            **keys_specs(problem, usual_layout(problem) if layout is None else layout),
            **shared_specs(problem),
            "dropout": dropout_spec(problem),
            "tokens": tokens_spec(problem),
            "num_heads": i32,
            "batch": i32,
            "row_blocks": i32,
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
            "PAGE_SIZE": problem.page_size,
            "NEGATIVE_SCALE": negative_scale,
            "STAGES": pipeline_stages(problem, plan.block_n, plan.num_stages),
            "PRECISION": "tf32" if problem.allow_tf32 else "ieee",
        },
        options={"num_warps": plan.num_warps, "num_stages": plan.num_stages},
    )


def specs(problem: Problem, plan: ForwardPlan) -> tuple[Spec, ...]:
    """What ``bind`` will launch, for keys as they are commonly allocated."""
    return (forward_spec(problem, plan),)


def prepare(problem: Problem, plan: ForwardPlan, device: torch.device) -> None:
    """Compiles what ``bind`` will launch."""
    for spec in specs(problem, plan):
        launcher(spec, device)


def bind(problem: Problem, plan: ForwardPlan, device: torch.device) -> ForwardRunner:
    """What runs calls of ``problem`` as ``plan`` says."""
    pointer = pointer_of(forward_kernel)
    heads, page_size, block_m = problem.num_heads_q, problem.page_size, plan.block_m
    at_once, band = heads_at_once(problem, device, plan.block_m), band_view(problem.band)

    def keys_by(negative_scale: bool) -> Callable[[torch.Tensor, torch.Tensor], tuple[Launch, Any, Any]]:
        def launch_of(layout: Layout) -> Launch:
            return launcher(forward_spec(problem, plan, layout, negative_scale=negative_scale), device)

        return with_keys(problem, plan.block_n, pointer, launch_of)

    keys = {False: keys_by(False)}

    def run(stream: int, call: ForwardCall) -> None:
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, page_table, max_seqlen_q, sinks, slopes, out, lse, scale, softcap, dropped = call
        if (negative := scale < 0.0) not in keys:
            keys[negative] = keys_by(negative)
        launch, k_view, v_view = keys[negative](k, v)
        batch, total_q = q.shape[0], q.shape[0] * q.shape[1]
        if cu_seqlens_q is not None:
            batch, total_q = cu_seqlens_q.shape[0] - 1, q.shape[0]
        row_blocks = max(1, -(-max_seqlen_q // block_m))
        programs = batch * heads * row_blocks
        if programs > _MAX_GRID_X:
            limit = f"a grid of {batch} x {heads} x {row_blocks} programs: at most {_MAX_GRID_X}"
            raise UnsupportedError("The call does not fit a launch.", {plan.kernel: [limit]})
        pages: tuple[Any, ...] = (None, None, None)
        seqlen_k = k.shape[1]
        if page_table is not None:
            pages, seqlen_k = (pointer(page_table), page_table.stride(0), k.shape[0]), page_table.shape[1] * page_size
        lengths = (None if tensor is None else pointer(tensor) for tensor in (cu_seqlens_q, cu_seqlens_k, seqused_k))
        tokens = (*lengths, max_seqlen_q, seqlen_k, total_q, k.shape[0])
        launch.run(
            programs, 1, stream, rows_view(q, pointer), k_view, v_view, rows_view(out, pointer), lse_view(lse, pointer), tokens, pages,
            scores_view(scale, softcap, slopes, pointer), band, None if sinks is None else pointer(sinks),
            dropout_view(dropped, pointer), heads, batch, row_blocks, min(at_once, batch * heads), *launch.constants,
        )  # fmt: skip

    return on_device(run, device)
