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
from triton.language.extra.cuda import gdc_launch_dependents

from flashtile.errors import UnsupportedError
from flashtile.kernels.call import DecodeCall, DecodeRunner
from flashtile.kernels.combine import bind_combine, combines, partials_spec
from flashtile.kernels.launch import TRITON_DTYPES, Arg, Launch, Spec, launcher, on_device, pointer_of, workspace
from flashtile.kernels.tile.band import keys_of, visible_keys
from flashtile.kernels.tile.cache import load_tile, locate
from flashtile.kernels.tile.schedule import (
    line_length,
    next_unit,
    owned_rows,
    sequence_keys,
    sequence_rows,
    sequences_at_once,
    share,
    slot_of,
    split_keys,
    unit_at,
)
from flashtile.kernels.tile.softmax import LOG2E, by_key, by_row, join_sink, natural_lse, normaliser, online_step, softcapped
from flashtile.kernels.tile.views import (
    BandView,
    KeysView,
    LengthsView,
    LseView,
    PagesView,
    RowsView,
    ScoresView,
    band_view,
    row_offsets,
)
from flashtile.planner.plans import DecodePlan
from flashtile.problem import DTYPE_BYTES, Problem

_LOG2E: float = LOG2E.value
_FAR = 2**31  # elements that an int32 offset cannot span
_FEW_ROWS = 16
_FREE_WARPS = 4  # whose threads may have all registers that an instruction can name, two programs an SM
_REGISTERS_OF_HALF_AN_SM = 32_768
_MAX_SPLITS = 65_535  # a grid's y axis


@triton.jit
def decode_kernel(
    q, k, v, out, lse, partials, lengths, pages, scores, band, sinks, num_heads_kv, batch, row_blocks, min_keys_per_split,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HOW: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr, SPLIT: tl.constexpr, SEQUENCES: tl.constexpr, ONE_STEP: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (units, splits), or where SEQUENCES > 0 the programs that share the line of all units' key tiles.

    A unit is a sequence, key head and row block. Of splits, the last come first: only long sequences have them.
    SEQUENCES is how many lengths a program looks at in one vector, ONE_STEP where those are all.
    """
    if PDL:
        gdc_launch_dependents()
    if SEQUENCES > 0:
        _walk_line(
            q, k, v, out, lse, partials, lengths, pages, scores, band, sinks, num_heads_kv, batch,
            GROUP, BLOCK_M, BLOCK_N, HOW, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, SEQUENCES, ONE_STEP, STAGES, PRECISION,
        )  # fmt: skip
    else:
        _do_one_split(
            q, k, v, out, lse, partials, lengths, pages, scores, band, sinks, num_heads_kv, batch, row_blocks, min_keys_per_split,
            GROUP, BLOCK_M, BLOCK_N, HOW, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, SPLIT, STAGES, PRECISION,
        )  # fmt: skip


@triton.jit
def _do_one_split(
    q, k, v, out, lse, partials, lengths, pages, scores, band, sinks, num_heads_kv, batch, row_blocks, min_keys_per_split,
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
            _clear_unowned(out, lse, lengths, batch, row_block, row_blocks, h_kv * GROUP, GROUP, HEAD_DIM_V)
    if row_block * BLOCK_M >= seqlen_q * GROUP:
        return
    seqlen_k = sequence_keys(lengths, b)

    position, head, real = _rows_of(row_block, h_kv, seqlen_q, GROUP, BLOCK_M)
    b_rows = b * 0 if lengths.cu_seqlens_q is not None else b
    first, last = _keys_of_rows(band, row_block, seqlen_q, seqlen_k, GROUP, BLOCK_M)
    start, end = split_keys(first, last, split, num_splits, min_keys_per_split, BLOCK_N)
    if SPLIT:
        token = row_start + b_rows * seqlen_q + position
        partial = (token.to(tl.int64) * (num_heads_kv * GROUP) + head) * num_splits + split
        if start >= end:
            # most programs of a batch of unlike lengths; combine sees lse -inf and does not read their rows
            tl.store(partials.ptr + partials.lse_start + partial, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=real)
            return
    m, l, acc = _attend(
        q, k, v, pages, scores, band, b, h_kv, row_block, b_rows, row_start, seqlen_q, seqlen_k, first, start, end,
        GROUP, BLOCK_M, BLOCK_N, HOW, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, STAGES, PRECISION,
    )  # fmt: skip
    if SPLIT:
        _store_partial(partials, partial, real, m, l, acc, HOW, HEAD_DIM_V)
    else:
        _store_result(out, lse, sinks, b_rows, row_start + position, head, real, m, l, acc, HOW, HEAD_DIM_V)


@triton.jit
def _walk_line(
    q, k, v, out, lse, partials, lengths, pages, scores, band, sinks, num_heads_kv, batch,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HOW: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr, SEQUENCES: tl.constexpr, ONE_STEP: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program of those that share the line: the units of its stretch, of which the first and the last may be parts."""
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    _clear_unowned(out, lse, lengths, batch, program, num_programs, 0, num_heads_kv * GROUP, HEAD_DIM_V)
    # (SEQUENCES,)
    n = tl.arange(0, SEQUENCES)
    total = line_length(lengths, band, batch, num_heads_kv, n, GROUP, BLOCK_M, BLOCK_N, ONE_STEP)
    line_start, line_end = share(total, program, num_programs)
    b, h_kv, row_block, unit_start, row_blocks, first_tile, tiles = unit_at(
        lengths, band, batch, num_heads_kv, n, line_start, GROUP, BLOCK_M, BLOCK_N, ONE_STEP
    )
    at = line_start
    while at < line_end:
        until = tl.minimum(line_end, unit_start + tiles)
        row_start, seqlen_q = sequence_rows(lengths, b)
        seqlen_k = sequence_keys(lengths, b)
        b_rows = b * 0 if lengths.cu_seqlens_q is not None else b
        # a sequence's units have tiles for all of its rows; this row block may see fewer
        first, last = _keys_of_rows(band, row_block, seqlen_q, seqlen_k, GROUP, BLOCK_M)
        start = tl.maximum(first_tile + at - unit_start, first // BLOCK_N) * BLOCK_N
        end = tl.minimum((first_tile + until - unit_start) * BLOCK_N, last)
        m, l, acc = _attend(
            q, k, v, pages, scores, band, b, h_kv, row_block, b_rows, row_start, seqlen_q, seqlen_k, first, start, end,
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
            lengths, band, batch, num_heads_kv, b, h_kv, row_block, unit_start, row_blocks, first_tile, tiles, GROUP, BLOCK_M, BLOCK_N
        )


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
def _keys_of_rows(band, row_block, seqlen_q, seqlen_k, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """[first, last) keys that any row of the block may see."""
    first_position, last_position = _positions_of(row_block, seqlen_q, GROUP, BLOCK_M)
    offset = seqlen_k - seqlen_q
    return keys_of(band, first_position + offset, last_position + offset, seqlen_k)


@triton.jit
def _attend(
    q, k, v, pages, scores, band, b, h_kv, row_block, b_rows, row_start, seqlen_q, seqlen_k, first, start, end,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HOW: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A row block over the keys [start, end): maximum and sum (BLOCK_M,) in base 2, and the sum of values.

    The latter is [BLOCK_M, DV], or [DV, BLOCK_M] where keys come first. ``first`` is the first key that any row sees.
    """
    KEYS_FIRST: tl.constexpr = HOW != "rows"
    SHAPED: tl.constexpr = scores.softcap is not None or scores.slopes is not None
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
    # a negative scale becomes a negated q, which is exact: online_step wants a factor that keeps the order of scores
    q_tile = tl.where(scores.scale_log2 < 0.0, -q_tile, q_tile)
    factor = tl.maximum(tl.abs(scores.scale_log2), 1e-30)
    if HOW == "vector":
        q_tile = q_tile.to(tl.float32)
    elif HOW == "keys":
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
        # [BLOCK_N, BLOCK_M] where KEYS_FIRST, else [BLOCK_M, BLOCK_N]
        if HOW == "vector":
            s = tl.sum(k_tile.to(tl.float32) * q_tile, 1, keep_dims=True)
        elif HOW == "keys":
            s = tl.dot(k_tile, q_tile, input_precision=PRECISION)
        else:
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        key = by_key(tile + n, KEYS_FIRST)
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
        acc = acc * by_row(alpha, KEYS_FIRST)
        if HOW == "vector":
            acc += tl.sum(v_tile.to(tl.float32) * p, 0)[:, None]
        elif HOW == "keys":
            acc = tl.dot(tl.trans(v_tile), p.to(v_tile.dtype), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
    return m, l, acc


@triton.jit
def _store_partial(partials, partial, real, m, l, acc, HOW: tl.constexpr, HEAD_DIM_V: tl.constexpr):
    """Rows ``partial`` (BLOCK_M,) int64 of the scratch: normalised values, and their lse."""
    KEYS_FIRST: tl.constexpr = HOW != "rows"
    tl.store(partials.ptr + partials.lse_start + partial, natural_lse(m, l), mask=real)
    _store_rows(partials.ptr, partial * HEAD_DIM_V, real, acc * by_row(normaliser(l), KEYS_FIRST), KEYS_FIRST, HEAD_DIM_V)


@triton.jit
def _store_result(out, lse, sinks, b_rows, token, head, real, m, l, acc, HOW: tl.constexpr, HEAD_DIM_V: tl.constexpr):
    """out and lse of rows whose keys have all been seen; the sink joins first."""
    KEYS_FIRST: tl.constexpr = HOW != "rows"
    if sinks is not None:
        m, l, alpha = join_sink(m, l, tl.load(sinks + head, mask=real, other=0.0))
        acc = acc * by_row(alpha, KEYS_FIRST)
    if lse.ptr is not None:
        at = b_rows.to(tl.int64) * lse.stride_b + head.to(tl.int64) * lse.stride_h + token.to(tl.int64) * lse.stride_m
        tl.store(lse.ptr + at, natural_lse(m, l), mask=real)
    _store_rows(out.ptr, row_offsets(out, b_rows, token, head), real, acc * by_row(normaliser(l), KEYS_FIRST), KEYS_FIRST, HEAD_DIM_V)


@triton.jit
def _store_rows(ptr, offsets, real, values, KEYS_FIRST: tl.constexpr, HEAD_DIM_V: tl.constexpr):
    """Values of a row block, each row from its offset on."""
    dv = tl.arange(0, values.shape[0] if KEYS_FIRST else values.shape[1])
    ptrs = ptr + by_row(offsets, KEYS_FIRST) + by_key(dv, KEYS_FIRST)
    tl.store(ptrs, values.to(ptr.dtype.element_ty), mask=by_row(real, KEYS_FIRST) & by_key(dv < HEAD_DIM_V, KEYS_FIRST))


@triton.jit
def _clear_unowned(out, lse, lengths, batch, first, step, first_head, num_heads, HEAD_DIM_V: tl.constexpr):
    """Packed queries past the last sequence's end see no key: out 0, lse -inf. Every step-th of them, of some heads."""
    if lengths.cu_seqlens_q is not None:
        dv = tl.arange(0, triton.next_power_of_2(HEAD_DIM_V))
        for token in range(owned_rows(lengths, batch) + first, lengths.total_q, step):
            for head in range(first_head, first_head + num_heads):
                at = token * out.stride_m + head * out.stride_h
                tl.store(out.ptr + at + dv, tl.zeros_like(dv).to(out.ptr.dtype.element_ty), mask=dv < HEAD_DIM_V)
                if lse.ptr is not None:
                    tl.store(lse.ptr + head * lse.stride_h + token * lse.stride_m, float("-inf"))


def how(plan: DecodePlan) -> str:
    """How scores are computed: "vector", "keys" (operands swapped) or "rows"."""
    return "vector" if plan.block_m == 1 else "keys" if plan.swapped else "rows"


def row_blocks(problem: Problem, plan: DecodePlan) -> int:
    """Programs that share a sequence and key head, for the longest query."""
    return max(1, -(-problem.rows // plan.block_m))


def decode_spec(problem: Problem, plan: DecodePlan, *, far_keys: bool = False, same_strides: bool | None = None) -> Spec:
    """The split kernel's specialisation.

    ``far_keys``: the cache's strides, or the span of a tile of keys, leave 32 bits. ``same_strides``: V is laid out like
    K (by default where their head dims agree), so that one offset serves both.
    """
    same_strides = problem.head_dim == problem.head_dim_v if same_strides is None else same_strides

    def pointer(dtype: str) -> Arg:
        return Arg("*" + TRITON_DTYPES[dtype], problem.alignment)

    def stride(dtype: str, type: str = "i64") -> Arg:
        return Arg(type, max(1, problem.alignment // DTYPE_BYTES[dtype]))

    def rows(dtype: str) -> RowsView:
        return RowsView(pointer(dtype), stride(dtype), stride(dtype), stride(dtype))

    def keys(dtype: str, own_strides: bool = True) -> KeysView:
        if not own_strides:
            return KeysView(pointer(dtype), None, None, None)
        reach = "i64" if far_keys else "i32"
        return KeysView(pointer(dtype), stride(dtype, reach), stride(dtype, reach), stride(dtype))

    i32, i64 = Arg("i32"), Arg("i64")
    on_line = plan.num_programs > 0
    split = combines(plan) and not on_line
    sequences = sequences_at_once(problem.batch) if on_line else 0
    return Spec(
        decode_kernel,
        args={
            "q": rows(problem.dtype_q),
            "k": keys(problem.dtype_k),
            "v": keys(problem.dtype_v, not same_strides),
            "out": rows(problem.dtype_out),
            "lse": LseView(Arg("*fp32"), i64, i64, i64) if problem.lse and not split else LseView(None, None, None, None),
            "partials": partials_spec(plan),
            "lengths": LengthsView(Arg("*i32"), Arg("*i32") if problem.ragged_q else None, i32, i32, i32),
            "pages": PagesView(Arg("*i32"), i64, i32) if problem.page_size else PagesView(None, None, None),
            "scores": ScoresView(
                Arg("fp32"),
                Arg("fp32") if problem.softcap else None,
                Arg("*fp32") if problem.alibi else None,
                i64 if problem.alibi else None,
            ),
            "band": BandView(*(None if side is None else i32 for side in band_view(problem.band))),
            "sinks": Arg("*fp32") if problem.sinks and not split else None,
            "num_heads_kv": i32,
            "batch": i32,
            "row_blocks": i32,
            "min_keys_per_split": i32,
        },
        constants={
            "GROUP": problem.group,
            "BLOCK_M": plan.block_m,
            "BLOCK_N": plan.block_n,
            "HOW": how(plan),
            "HEAD_DIM": problem.head_dim,
            "HEAD_DIM_V": problem.head_dim_v,
            "PAGE_SIZE": problem.page_size,
            "SPLIT": split,
            "SEQUENCES": sequences,
            "ONE_STEP": problem.batch <= sequences,
            "STAGES": _pipeline_stages(problem, plan),
            "PRECISION": "tf32" if problem.allow_tf32 else "ieee",
            "PDL": combines(plan) and plan.dependent_launch,
        },
        options={"num_warps": plan.num_warps, "num_stages": plan.num_stages, **_register_limit(plan)},
    )


def _register_limit(plan: DecodePlan) -> dict[str, int]:
    """Where few rows are held by many warps, a line's programs can do with half an SM's registers each, if they are told to."""
    told = plan.num_programs > 0 and plan.block_m <= _FEW_ROWS and plan.num_warps > _FREE_WARPS
    return {"maxnreg": _REGISTERS_OF_HALF_AN_SM // (32 * plan.num_warps)} if told else {}


def prepare(problem: Problem, plan: DecodePlan, device: torch.device) -> None:
    """Compiles what ``bind`` will launch."""
    _split_launch(problem, plan, device, *_usual_layout(problem))
    if combines(plan):
        bind_combine(problem, plan, device)


def _pipeline_stages(problem: Problem, plan: DecodePlan) -> int:
    """What Triton must be told for a ring of ``num_stages`` tiles.

    Keys behind a gathered page id are loads behind loads: the compiler shares the stages out between both.
    """
    gathered = problem.page_size and problem.page_size % plan.block_n
    return 2 * plan.num_stages - 1 if gathered else plan.num_stages


def bind(problem: Problem, plan: DecodePlan, device: torch.device) -> DecodeRunner:
    """What runs calls of ``problem`` as ``plan`` says: the split kernel and, where keys are split, combine."""
    group, heads_kv, page_size, head_dim_v = problem.group, problem.num_heads_kv, problem.page_size, problem.head_dim_v
    num_splits, num_programs, block_n = plan.num_splits, plan.num_programs, plan.block_n
    split = combines(plan) and num_programs == 0
    blocks = row_blocks(problem, plan)
    units = problem.batch * heads_kv * blocks
    grid = (num_programs, 1) if num_programs else (units, num_splits)
    if not 1 <= grid[1] <= _MAX_SPLITS or not 0 <= grid[0] < _FAR:
        limit = f"a grid of {grid[0]} x {grid[1]} programs: at most {_FAR - 1} x {_MAX_SPLITS}"
        raise UnsupportedError("The plan does not fit a launch.", {plan.kernel: [limit]})
    min_keys = max(1, -(-plan.min_keys_per_split // block_n)) * block_n
    max_seqlen_q = problem.seqlen_q
    band = band_view(problem.band)
    numbers = (heads_kv, problem.batch, blocks, min_keys)
    far_stride = _FAR // block_n
    pointer = pointer_of(decode_kernel)
    launches = {layout: _split_launch(problem, plan, device, *layout) for layout in [_usual_layout(problem)]}
    combine = bind_combine(problem, plan, device) if combines(plan) else None
    no_lse, no_partials = (None,) * 4, (None,) * 3
    rows_of_programs = 2 * num_programs * plan.block_m
    no_pages: tuple[object, ...] = (None,) * 3
    constants = next(iter(launches.values())).constants

    def run(stream: int, call: DecodeCall) -> None:
        q, k, v, seqlens_k, page_table, cu_seqlens_q, sinks, slopes, out, lse, scale, softcap = call
        k_strides, v_strides = k.stride(), v.stride()
        same = k_strides == v_strides
        far = k_strides[0] >= _FAR or k_strides[1] >= far_stride or v_strides[0] >= _FAR or v_strides[1] >= far_stride
        launch = launches.get((far, same))
        if launch is None:
            launch = launches[far, same] = _split_launch(problem, plan, device, far, same)
        if page_table is None:
            capacity, pages = k.shape[1], no_pages
        else:
            capacity, pages = page_table.shape[1] * page_size, (pointer(page_table), page_table.stride(0), k.shape[0])
        if cu_seqlens_q is not None:
            total_q = q.shape[0]
            q_strides, out_strides = (0, *q.stride()[:2]), (0, *out.stride()[:2])
            lengths = (pointer(seqlens_k), pointer(cu_seqlens_q), capacity, max_seqlen_q, total_q)
            lse_view = no_lse if lse is None else (pointer(lse), 0, *lse.stride())
        else:
            total_q = q.shape[0] * q.shape[1]
            q_strides, out_strides = q.stride()[:3], out.stride()[:3]
            lengths = (pointer(seqlens_k), None, capacity, max_seqlen_q, total_q)
            lse_view = no_lse if lse is None else (pointer(lse), *lse.stride())
        slopes_view = (None, None) if slopes is None else (pointer(slopes), slopes.stride(0) if slopes.ndim == 2 else 0)
        scores = (scale * _LOG2E, softcap or None, *slopes_view)
        out_view = (pointer(out), *out_strides)
        v_view = (pointer(v), None, None, None) if same else (pointer(v), *v_strides[:3])
        sink = None if sinks is None else pointer(sinks)
        tensors = ((pointer(q), *q_strides), (pointer(k), *k_strides[:3]), v_view, out_view)
        rows = total_q * heads_kv * group
        num_partials = rows_of_programs or (rows * num_splits if split else 0)
        partials: tuple[object, ...] = no_partials
        if num_partials:
            scratch = workspace(num_partials * (head_dim_v + 1), device)
            partials = (pointer(scratch), num_partials * head_dim_v, num_splits if split else None)
        # where every row's keys are split, its result is combine's to write
        lse_now, sink_now = (no_lse, None) if split else (lse_view, sink)
        launch.run(*grid, stream, *tensors, lse_now, partials, lengths, pages, scores, band, sink_now, *numbers, *constants)
        if combine is not None:
            combine(stream, rows, partials, out_view, lse_view, lengths, sink)

    return on_device(run, device)


def _usual_layout(problem: Problem) -> tuple[bool, bool]:
    """(far_keys, same_strides) of caches as they are commonly allocated; others are compiled when they come."""
    return False, problem.head_dim == problem.head_dim_v


def _split_launch(problem: Problem, plan: DecodePlan, device: torch.device, far_keys: bool, same_strides: bool) -> Launch:
    return launcher(decode_spec(problem, plan, far_keys=far_keys, same_strides=same_strides), device)
