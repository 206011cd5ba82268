"""Decode: split-KV attention of a few queries over a long cache, with any query tile.

Rows are packed: (query position, query head of the group), so that a key is read once for all heads that share it.
A program holds BLOCK_M rows of one sequence and key head, and reads its split of the keys. How scores are computed
depends on the tile (``how`` in the kernel):

    rows     16 rows and more: q (rows x dim) times k; warps without rows of their own split the keys
    keys     8 or 16 rows, operands swapped: k (keys x dim) times q, so that queries take the MMA's small side
    vector   1 row, multiplied and summed on the vector units

Sources: FlashAttention-2 (Dao 2023), Flash-Decoding (Dao et al. 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashtile.kernels.call import DecodeRunner
from flashtile.kernels.combine import combine_spec, combines
from flashtile.kernels.launch import Launch, Spec, launcher, pointer_of
from flashtile.kernels.operands import Layout, keys_specs, pipeline_stages, usual_layout, with_keys
from flashtile.kernels.run import bind_split, split_args, split_constants, waits
from flashtile.kernels.tile.band import keys_of, visible_keys
from flashtile.kernels.tile.cache import load_tile, locate
from flashtile.kernels.tile.quantised import as_half, is_quantised, key_scale, rows_as_half, value_scale
from flashtile.kernels.tile.results import clear_unowned, store_lse, store_rows
from flashtile.kernels.tile.schedule import (
    behind_padding,
    line_length,
    next_unit,
    sequence_keys,
    sequence_rows,
    share,
    slot_of,
    split_keys,
    unit_at,
)
from flashtile.kernels.tile.softmax import LOG2E, by_key, by_row, join_sink, natural_lse, normaliser, online_step, softcapped
from flashtile.kernels.tile.views import row_offsets
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem

_FEW_ROWS = 16
_FREE_WARPS = 4  # whose threads may have all registers that an instruction can name, two programs an SM
_REGISTERS_OF_HALF_AN_SM = 32_768


@triton.jit
def decode_kernel(
    q, k, v, out, lse, partials, lengths, pages, scores, band, sinks, kv_scales, num_heads_kv, batch, row_blocks, min_keys_per_split,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HOW: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr, SPLIT: tl.constexpr, SEQUENCES: tl.constexpr, ONE_STEP: tl.constexpr, UNIT_COST: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, WAITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (units, splits), or where SEQUENCES > 0 the programs that share the line of all units' key tiles.

    A unit is a sequence, key head and row block. Of splits, the last come first: only long sequences have them.
    SEQUENCES is how many lengths a program looks at in one vector, ONE_STEP where those are all.
    """
    if WAITS:
        gdc_wait()
    if PDL:
        gdc_launch_dependents()
    if SEQUENCES > 0:
        _walk_line(
            q, k, v, out, lse, partials, lengths, pages, scores, band, sinks, kv_scales, num_heads_kv, batch,
            GROUP, BLOCK_M, BLOCK_N, HOW, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, SEQUENCES, ONE_STEP, UNIT_COST, STAGES, PRECISION,
        )  # fmt: skip
    else:
        _do_one_split(
            q, k, v, out, lse, partials, lengths, pages, scores, band, sinks, kv_scales, num_heads_kv, batch, row_blocks,
            min_keys_per_split, GROUP, BLOCK_M, BLOCK_N, HOW, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, SPLIT, STAGES, PRECISION,
        )  # fmt: skip


@triton.jit
def _do_one_split(
    q, k, v, out, lse, partials, lengths, pages, scores, band, sinks, kv_scales, num_heads_kv, batch, row_blocks, min_keys_per_split,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HOW: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program of the grid (units, splits): its split of its unit's keys."""
    unit = tl.program_id(0)
    row_block = unit % row_blocks
    h_kv = (unit // row_blocks) % num_heads_kv
    b = unit // row_blocks // num_heads_kv
    num_splits = tl.num_programs(1)
    split = num_splits - 1 - tl.program_id(1)

    row_start, seqlen_q = sequence_rows(lengths, b)
    if not SPLIT:
        # the last sequence's programs share the rows of nobody
        if b == batch - 1:
            clear_unowned(out, lse, lengths, batch, row_block, row_blocks, h_kv * GROUP, GROUP, HEAD_DIM_V)
    if row_block * BLOCK_M >= seqlen_q * GROUP:
        return
    seqlen_k = sequence_keys(lengths, b)

    position, head, real = _rows_of(row_block, h_kv, seqlen_q, GROUP, BLOCK_M)
    b_rows = b * 0 if lengths.cu_seqlens_q is not None else b
    first, last = _keys_of_rows(lengths, band, b, row_block, seqlen_q, seqlen_k, GROUP, BLOCK_M)
    start, end = split_keys(first, last, split, num_splits, min_keys_per_split, BLOCK_N)
    if SPLIT:
        token = row_start + b_rows * seqlen_q + position
        partial = (token.to(tl.int64) * (num_heads_kv * GROUP) + head) * num_splits + split
        if start >= end:
            # most programs of a batch of unlike lengths; combine sees lse -inf and does not read their rows
            tl.store(partials.ptr + partials.lse_start + partial, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=real)
            return
    m, l, acc = _attend(
        q, k, v, pages, scores, band, kv_scales, b, h_kv, row_block, b_rows, row_start, seqlen_q, seqlen_k, first, start, end,
        GROUP, BLOCK_M, BLOCK_N, HOW, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, STAGES, PRECISION,
    )  # fmt: skip
    if SPLIT:
        _store_partial(partials, partial, real, m, l, acc, HOW, HEAD_DIM_V)
    else:
        _store_result(out, lse, sinks, b_rows, row_start + position, head, real, m, l, acc, HOW, HEAD_DIM_V)


@triton.jit
def _walk_line(
    q, k, v, out, lse, partials, lengths, pages, scores, band, sinks, kv_scales, num_heads_kv, batch,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HOW: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr, SEQUENCES: tl.constexpr, ONE_STEP: tl.constexpr, UNIT_COST: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program of those that share the line: the units of its stretch, of which the first and the last may be parts."""
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    clear_unowned(out, lse, lengths, batch, program, num_programs, 0, num_heads_kv * GROUP, HEAD_DIM_V)
    # (SEQUENCES,)
    n = tl.arange(0, SEQUENCES)
    total = line_length(lengths, band, batch, num_heads_kv, n, GROUP, BLOCK_M, BLOCK_N, UNIT_COST, ONE_STEP)
    line_start, line_end = share(total, program, num_programs)
    b, h_kv, row_block, unit_start, row_blocks, first_tile, tiles = unit_at(
        lengths, band, batch, num_heads_kv, n, line_start, GROUP, BLOCK_M, BLOCK_N, UNIT_COST, ONE_STEP
    )
    at = tl.maximum(line_start, unit_start)
    while at < line_end:
        until = tl.minimum(line_end, unit_start + tiles)
        row_start, seqlen_q = sequence_rows(lengths, b)
        seqlen_k = sequence_keys(lengths, b)
        b_rows = b * 0 if lengths.cu_seqlens_q is not None else b
        # a sequence's units have tiles for all of its rows; this row block may see fewer
        first, last = _keys_of_rows(lengths, band, b, row_block, seqlen_q, seqlen_k, GROUP, BLOCK_M)
        start = tl.maximum(first_tile + at - unit_start, first // BLOCK_N) * BLOCK_N
        end = tl.minimum((first_tile + until - unit_start) * BLOCK_N, last)
        m, l, acc = _attend(
            q, k, v, pages, scores, band, kv_scales, b, h_kv, row_block, b_rows, row_start, seqlen_q, seqlen_k, first, start, end,
            GROUP, BLOCK_M, BLOCK_N, HOW, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, STAGES, PRECISION,
        )  # fmt: skip
        position, head, real = _rows_of(row_block, h_kv, seqlen_q, GROUP, BLOCK_M)
        if until - at == tiles:
            _store_result(out, lse, sinks, b_rows, row_start + position, head, real, m, l, acc, HOW, HEAD_DIM_V)
        else:
            slot = slot_of(program, line_start, unit_start)
            partial = slot.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            _store_partial(partials, partial, real, m, l, acc, HOW, HEAD_DIM_V)
        at = until
        b, h_kv, row_block, unit_start, row_blocks, first_tile, tiles = next_unit(
            lengths, band, batch, num_heads_kv, b, h_kv, row_block, unit_start, row_blocks, first_tile, tiles,
            GROUP, BLOCK_M, BLOCK_N, UNIT_COST,
        )  # fmt: skip
        at = tl.maximum(at, unit_start)


@triton.jit
def _rows_of(row_block, h_kv, seqlen_q, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """(BLOCK_M,) query position and head of each row, and whether there is such a row."""
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    return rows // GROUP, h_kv * GROUP + rows % GROUP, rows < seqlen_q * GROUP


@triton.jit
def _positions_of(row_block, seqlen_q, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """First and last query position of a row block."""
    return row_block * BLOCK_M // GROUP, tl.minimum((row_block * BLOCK_M + BLOCK_M - 1) // GROUP, seqlen_q - 1)


@triton.jit
def _keys_of_rows(lengths, band, b, row_block, seqlen_q, seqlen_k, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """[first, last) keys that any row of the block may see."""
    first_position, last_position = _positions_of(row_block, seqlen_q, GROUP, BLOCK_M)
    offset = seqlen_k - seqlen_q
    first, last = keys_of(band, first_position + offset, last_position + offset, seqlen_k)
    return behind_padding(lengths, b, first, last)


@triton.jit
def _attend(
    q, k, v, pages, scores, band, kv_scales, b, h_kv, row_block, b_rows, row_start, seqlen_q, seqlen_k, first, start, end,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HOW: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A row block over the keys [start, end): maximum and sum (BLOCK_M,) in base 2, and the sum of values.

    The latter is [BLOCK_M, DV], or [DV, BLOCK_M] where keys come first. ``first`` is the first key that any row sees.
    """
    KEYS_FIRST: tl.constexpr = HOW != "rows"
    SHAPED: tl.constexpr = scores.softcap is not None or scores.slopes is not None
    QUANTISED: tl.constexpr = is_quantised(k.ptr.dtype.element_ty)
    MOVED: tl.constexpr = QUANTISED and HOW != "vector" and q.ptr.dtype.element_ty == tl.bfloat16
    D: tl.constexpr = max(16, triton.next_power_of_2(HEAD_DIM))
    DV: tl.constexpr = max(16, triton.next_power_of_2(HEAD_DIM_V))
    # (BLOCK_M,)
    position, head, real = _rows_of(row_block, h_kv, seqlen_q, GROUP, BLOCK_M)
    offset = seqlen_k - seqlen_q
    first_position, last_position = _positions_of(row_block, seqlen_q, GROUP, BLOCK_M)
    # (D,), (DV,), (BLOCK_N,)
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    n = tl.arange(0, BLOCK_N)
    # [BLOCK_M, D]
    q_ptrs = q.ptr + row_offsets(q, b_rows, row_start + position, head)[:, None] + d[None, :]
    q_tile = tl.load(q_ptrs, mask=real[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    if MOVED:
        q_tile, row_factor = rows_as_half(q_tile)
    elif HOW == "vector":
        q_tile = q_tile.to(tl.float32)
    # a negative scale becomes a negated q, which is exact: online_step wants a factor that keeps the order of scores
    scale_log2 = scores.scale_log2 * key_scale(kv_scales, b, h_kv)
    q_tile = tl.where(scale_log2 < 0.0, -q_tile, q_tile)
    factor = tl.maximum(tl.abs(scale_log2), 1e-37)
    if HOW == "keys":
        q_tile = tl.trans(q_tile)
    if scores.slopes is not None:
        slope = tl.load(scores.slopes + b.to(tl.int64) * scores.slopes_stride_b + head, mask=real, other=0.0) * LOG2E

    # (BLOCK_M,)
    lowest, highest = visible_keys(band, position + offset, first, end)
    # what every row sees needs no mask
    lowest_of_all, _ = visible_keys(band, last_position + offset, first, end)
    _, highest_of_all = visible_keys(band, first_position + offset, first, end)
    # (BLOCK_M,)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([DV, BLOCK_M] if KEYS_FIRST else [BLOCK_M, DV], tl.float32)
    for tile in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        block, slot, inside = locate(pages, b, tile, n, first, end, BLOCK_N, PAGE_SIZE)
        # [BLOCK_N, D]
        k_tile = load_tile(k.ptr, k, h_kv, block, slot, inside, n, d, HEAD_DIM, BLOCK_N, PAGE_SIZE)
        if QUANTISED:
            k_tile = as_half(k_tile)
        # [BLOCK_N, BLOCK_M] where KEYS_FIRST, else [BLOCK_M, BLOCK_N]
        if HOW == "vector":
            s = tl.sum(k_tile.to(tl.float32) * q_tile, 1, keep_dims=True)
        elif HOW == "keys":
            s = tl.dot(k_tile, q_tile, input_precision=PRECISION)
        else:
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        key = by_key(tile + n, KEYS_FIRST)
        if MOVED:
            s = s * by_row(row_factor, KEYS_FIRST)
        if SHAPED:
            s = s * factor
            if scores.softcap is not None:
                s = softcapped(s, scores.softcap * LOG2E)
            if scores.slopes is not None:
                s = s - by_row(slope, KEYS_FIRST) * tl.abs(key - by_row(position + offset, KEYS_FIRST)).to(tl.float32)
        if PAGE_SIZE > 0:
            s = tl.where(by_key(inside, KEYS_FIRST), s, float("-inf"))
        if (tile < lowest_of_all) | (tile + BLOCK_N - 1 > highest_of_all):
            s = tl.where((key >= by_row(lowest, KEYS_FIRST)) & (key <= by_row(highest, KEYS_FIRST)), s, float("-inf"))
        m, l, p, alpha = online_step(m, l, s, 1.0 if SHAPED else factor, 0 if KEYS_FIRST else 1)
        # [BLOCK_N, DV]
        v_tile = load_tile(v.ptr, k if v.stride_n is None else v, h_kv, block, slot, inside, n, dv, HEAD_DIM_V, BLOCK_N, PAGE_SIZE)
        if QUANTISED:
            v_tile = as_half(v_tile)
        acc = acc * by_row(alpha, KEYS_FIRST)
        if HOW == "vector":
            acc += tl.sum(v_tile.to(tl.float32) * p, 0)[:, None]
        elif HOW == "keys":
            acc = tl.dot(tl.trans(v_tile), p.to(v_tile.dtype), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
    if kv_scales.v is not None:
        acc = acc * value_scale(kv_scales, b, h_kv)
    return m, l, acc


@triton.jit
def _store_partial(partials, partial, real, m, l, acc, HOW: tl.constexpr, HEAD_DIM_V: tl.constexpr):
    """Rows ``partial`` (BLOCK_M,) int64 of the scratch: normalised values, and their lse."""
    KEYS_FIRST: tl.constexpr = HOW != "rows"
    tl.store(partials.ptr + partials.lse_start + partial, natural_lse(m, l), mask=real)
    store_rows(partials.ptr, partial * HEAD_DIM_V, real, acc * by_row(normaliser(l), KEYS_FIRST), KEYS_FIRST, HEAD_DIM_V)


@triton.jit
def _store_result(out, lse, sinks, b_rows, token, head, real, m, l, acc, HOW: tl.constexpr, HEAD_DIM_V: tl.constexpr):
    """out and lse of rows whose keys have all been seen; the sink joins first."""
    KEYS_FIRST: tl.constexpr = HOW != "rows"
    if sinks is not None:
        m, l, alpha = join_sink(m, l, tl.load(sinks + head, mask=real, other=0.0))
        acc = acc * by_row(alpha, KEYS_FIRST)
    store_lse(lse, b_rows, token, head, real, m, l)
    store_rows(out.ptr, row_offsets(out, b_rows, token, head), real, acc * by_row(normaliser(l), KEYS_FIRST), KEYS_FIRST, HEAD_DIM_V)


def how(plan: DecodePlan) -> str:
    """How scores are computed: "vector", "keys" (operands swapped) or "rows"."""
    return "vector" if plan.block_m == 1 else "keys" if plan.swapped else "rows"


def decode_spec(problem: Problem, plan: DecodePlan, layout: Layout | None = None) -> Spec:
    """The split kernel's specialisation for a layout of K and V, by default the usual one."""
    return Spec(
        decode_kernel,
        args={**split_args(problem, plan), **keys_specs(problem, usual_layout(problem) if layout is None else layout)},
        constants={
            **split_constants(problem, plan),
            "HOW": how(plan),
            "STAGES": pipeline_stages(problem, plan.block_n, plan.num_stages),
            "PRECISION": "tf32" if problem.allow_tf32 else "ieee",
        },
        options={
            "num_warps": plan.num_warps,
            "num_stages": plan.num_stages,
            **_register_limit(plan),
            **({"launch_pdl": True} if waits(problem, plan) else {}),
        },
    )


def _register_limit(plan: DecodePlan) -> dict[str, int]:
    """Where few rows are held by many warps, a line's programs can do with half an SM's registers each, if they are told to."""
    told = plan.num_programs > 0 and plan.block_m <= _FEW_ROWS and plan.num_warps > _FREE_WARPS
    return {"maxnreg": _REGISTERS_OF_HALF_AN_SM // (32 * plan.num_warps)} if told else {}


def specs(problem: Problem, plan: DecodePlan) -> tuple[Spec, ...]:
    """What ``bind`` will launch, for caches as they are commonly allocated."""
    split = decode_spec(problem, plan)
    return (split, combine_spec(problem, plan)) if combines(plan) else (split,)


def prepare(problem: Problem, plan: DecodePlan, device: torch.device) -> None:
    """Compiles what ``bind`` will launch."""
    for spec in specs(problem, plan):
        launcher(spec, device)


def bind(problem: Problem, plan: DecodePlan, device: torch.device) -> DecodeRunner:
    """What runs calls of ``problem`` as ``plan`` says: the split kernel and, where keys are split, combine."""
    pointer = pointer_of(decode_kernel)

    def launch_of(layout: Layout) -> Launch:
        return launcher(decode_spec(problem, plan, layout), device)

    return bind_split(problem, plan, device, pointer, with_keys(problem, plan.block_n, pointer, launch_of))
