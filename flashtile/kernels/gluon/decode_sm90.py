"""Decode on Hopper: split-KV attention whose key tiles come through a ring that the copy engine fills.

Rows are packed, keys split and results combined as in the portable kernel (flashtile/kernels/decode.py), whose device
functions this one shares. What differs is how tiles come and who computes: the copy engine (TMA) reads K and V some tiles
ahead of the products, and the warps share out either the keys of a tile (own_keys.py: 8 and 16 rows) or the rows
(own_rows.py: 64 and 128).

A program walks units: a unit is a sequence, key head and block of rows. On a grid of splits that is one unit and its
share of the keys. With stream-K all tiles of the batch form a line, of which each program takes an even share, the ring
runs on from one unit into the next. Parts of a unit are merged by combine, or by the last program that has one (parts.py).
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents

from flashtile.kernels.call import DecodeRunner
from flashtile.kernels.combine import bind_combine, combines
from flashtile.kernels.gluon.names import barrier
from flashtile.kernels.gluon.own_keys import merge_warps, own_keys_layout, own_scores, own_values, repeated_rows
from flashtile.kernels.gluon.own_rows import own_rows_layout, row_scores, row_values
from flashtile.kernels.gluon.parts import leave_part, merged_parts, row_numbers, store_partial
from flashtile.kernels.gluon.ring import gathers, place_of, start_tile, tile_ring, wait_for_tile
from flashtile.kernels.launch import TRITON_DTYPES, Arg, Descriptor, Launch, Spec, launcher
from flashtile.kernels.run import bind_split, split_args, split_constants
from flashtile.kernels.tile.band import keys_of, visible_keys
from flashtile.kernels.tile.cache import is_page, page_of
from flashtile.kernels.tile.schedule import (
    line_length,
    next_unit,
    owned_rows,
    sequence_keys,
    sequence_rows,
    share,
    slot_of,
    split_keys,
    unit_at,
)
from flashtile.kernels.tile.softmax import LOG2E, join_sink, natural_lse, normaliser, online_step, softcapped
from flashtile.kernels.tile.views import KeysView, row_offsets
from flashtile.planner.plans import DecodePlan
from flashtile.problem import DTYPE_BYTES, Problem, length_bucket


@gluon.jit
def decode_sm90_kernel(
    q, k, v, out, lse, partials, lengths, pages, scores, band, sinks, num_heads_kv, batch, row_blocks, min_keys_per_split, planned_keys,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    PAGE_SIZE: gl.constexpr, SPLIT: gl.constexpr, SEQUENCES: gl.constexpr, ONE_STEP: gl.constexpr, UNIT_COST: gl.constexpr,
    STAGES: gl.constexpr, NUM_WARPS: gl.constexpr, IN_TURN: gl.constexpr, MERGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Grid: (units, splits), the last splits first; with stream-K, where SEQUENCES > 0, programs."""
    D: gl.constexpr = held_dim(HEAD_DIM)
    DV: gl.constexpr = held_dim(HEAD_DIM_V)
    dtype: gl.constexpr = q.ptr.dtype.element_ty
    k_ring, k_tiles = tile_ring(k, dtype, STAGES, BLOCK_N, D, gathers(PAGE_SIZE, BLOCK_N))
    v_ring, v_tiles = tile_ring(v, dtype, STAGES, BLOCK_N, DV, gathers(PAGE_SIZE, BLOCK_N))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
    ring = (k_ring, k_tiles, v_ring, v_tiles, full)
    if SEQUENCES > 0:
        _walk_line(
            q, k, v, out, lse, partials, ring, lengths, pages, scores, band, sinks, num_heads_kv, batch,
            GROUP, BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, SEQUENCES, ONE_STEP, UNIT_COST, STAGES, NUM_WARPS, MERGES, PDL,
        )  # fmt: skip
    else:
        _walk_split(
            q, k, v, out, lse, partials, ring, lengths, pages, scores, band, sinks, num_heads_kv, batch, row_blocks,
            min_keys_per_split, planned_keys,
            GROUP, BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, SPLIT, STAGES, NUM_WARPS, IN_TURN, PDL,
        )  # fmt: skip


@gluon.jit
def _walk_split(
    q, k, v, out, lse, partials, ring, lengths, pages, scores, band, sinks, num_heads_kv, batch, row_blocks,
    min_keys_per_split, planned_keys,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    PAGE_SIZE: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr, NUM_WARPS: gl.constexpr, IN_TURN: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A grid of splits: one unit, and of its keys one split's share.

    IN_TURN: the splits take the tiles in turn, so that a program knows its first tiles before it knows the length. As
    far as the plan says that there are keys, it asks for them at once, and reads q and the length meanwhile.
    """
    k_ring, k_tiles, v_ring, v_tiles, full = ring
    EARLY: gl.constexpr = IN_TURN and PAGE_SIZE == 0 and band.left is None and lengths.cu_seqlens_q is None
    program = gl.program_id(0)
    num_splits = gl.num_programs(1)
    split = num_splits - 1 - gl.program_id(1)
    b = program // row_blocks // num_heads_kv
    h = (program // row_blocks) % num_heads_kv
    row_block = program % row_blocks
    row_start, seqlen_q = sequence_rows(lengths, b)
    seqlen_k = sequence_keys(lengths, b)
    if EARLY:
        for i in gl.static_range(STAGES):
            key = (split + i * num_splits) * BLOCK_N
            start_tile(
                k, v, k_ring, v_ring, full, i, pages, b, h, key, key < planned_keys, HEAD_DIM, HEAD_DIM_V, BLOCK_N, PAGE_SIZE, NUM_WARPS
            )
    if PDL:
        gdc_launch_dependents()
    PACKED: gl.constexpr = lengths.cu_seqlens_q is not None
    q_rows = _fetch_rows(q, b, h, row_block, row_start, seqlen_q, True, PACKED, GROUP, BLOCK_M, HEAD_DIM, NUM_WARPS)
    q_shared = _share_rows(q_rows, scores, BLOCK_M)

    first, last = _visible_to_rows(band, row_block, seqlen_q, seqlen_k, GROUP, BLOCK_M)
    if IN_TURN:
        first_tile = first // BLOCK_N
        key = (first_tile + split) * BLOCK_N
        step = num_splits * BLOCK_N
        count = gl.cdiv(gl.maximum(gl.cdiv(last, BLOCK_N) - first_tile - split, 0), num_splits)
    else:
        key, end = split_keys(first, last, split, num_splits, min_keys_per_split, BLOCK_N)
        step = BLOCK_N
        count = gl.where(end > key, gl.cdiv(end - key, BLOCK_N), 0)
    if not SPLIT:
        # somebody writes the rows of a sequence that sees no key
        count = gl.maximum(count, 1)
        _clear_unowned(out, lse, lengths, batch, num_heads_kv * GROUP, HEAD_DIM_V, held_dim(HEAD_DIM_V), NUM_WARPS)
    if row_block * BLOCK_M >= seqlen_q * GROUP:
        count = count * 0
    if not EARLY or last > planned_keys:
        for i in gl.static_range(STAGES):
            ahead = key + i * step
            wanted = i < count
            if EARLY:
                wanted = wanted & (ahead >= planned_keys)
            place = place_of(pages, b, ahead, first, last, BLOCK_N, PAGE_SIZE, NUM_WARPS)
            start_tile(k, v, k_ring, v_ring, full, i, pages, place, h, ahead, wanted, HEAD_DIM, HEAD_DIM_V, BLOCK_N, PAGE_SIZE, NUM_WARPS)

    if count > 0:
        no_unit = (b, h, row_block, b, b, b, b)
        m, l, acc, _, _ = _attend(
            k, v, ring, q_shared, lengths, pages, scores, band, num_heads_kv, batch, b, h, row_block, seqlen_q, seqlen_k,
            key, step, count, count * 0, no_unit, count * 0 + STAGES, count,
            GROUP, BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, False, 0, STAGES, NUM_WARPS,
        )  # fmt: skip
        if EARLY:
            _drain(full, count, split, num_splits, planned_keys, BLOCK_N, STAGES)
        m, l, acc = _merged(m, l, acc, BLOCK_M, held_dim(HEAD_DIM_V), NUM_WARPS)
        unit = (b, h, row_block, row_start, seqlen_q)
        if SPLIT:
            at = _partials_of_split(row_numbers(acc), unit, num_heads_kv, lengths, GROUP, BLOCK_M)
            store_partial(m, l, acc, partials, at, _real_rows(acc, unit, GROUP, BLOCK_M), HEAD_DIM_V)
        else:
            _store_out(m, l, acc, out, lse, lengths, sinks, unit, GROUP, BLOCK_M, HEAD_DIM_V)
    else:
        if EARLY:
            _drain(full, count, split, num_splits, planned_keys, BLOCK_N, STAGES)
        if SPLIT:
            # most programs of a batch of unlike lengths; combine sees lse -inf and does not read their rows
            _store_no_keys(partials, lengths, (b, h, row_block, row_start, seqlen_q), num_heads_kv, GROUP, BLOCK_M, NUM_WARPS)


@gluon.jit
def _drain(full, count, split, num_splits, planned_keys, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Waits for tiles that were asked for early and are not needed.

    The ring's memory serves other ends once the products are done, and other programs once this one is: nothing may be
    on its way there.
    """
    if count < STAGES:
        for i in gl.static_range(STAGES):
            mbarrier.wait(full.index(i), 0, pred=(i >= count) & ((split + i * num_splits) * BLOCK_N < planned_keys))


@gluon.jit
def _merged(m, l, acc, BLOCK_M: gl.constexpr, DV: gl.constexpr, NUM_WARPS: gl.constexpr):
    """The rows' (m, l, acc), whichever way the warps shared the work."""
    if BLOCK_M < 64:
        m, l, acc = merge_warps(m, l, acc, BLOCK_M, DV, NUM_WARPS)
    return m, l, acc


@gluon.jit
def _walk_line(
    q, k, v, out, lse, partials, ring, lengths, pages, scores, band, sinks, num_heads_kv, batch,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    PAGE_SIZE: gl.constexpr, SEQUENCES: gl.constexpr, ONE_STEP: gl.constexpr, UNIT_COST: gl.constexpr, STAGES: gl.constexpr,
    NUM_WARPS: gl.constexpr, MERGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Stream-K: this program's share of the line of all tiles, unit by unit; and if it MERGES, a unit that others began."""
    k_ring, k_tiles, v_ring, v_tiles, full = ring
    PACKED: gl.constexpr = lengths.cu_seqlens_q is not None
    DV: gl.constexpr = held_dim(HEAD_DIM_V)
    program, num_programs = gl.program_id(0), gl.num_programs(0)
    _clear_unowned(out, lse, lengths, batch, num_heads_kv * GROUP, HEAD_DIM_V, DV, NUM_WARPS)
    # a layout in which every warp has all of it, so that sums need no exchange between warps
    n = gl.arange(0, SEQUENCES, gl.BlockedLayout([SEQUENCES // 32], [32], [NUM_WARPS], [0]))
    total = line_length(lengths, band, batch, num_heads_kv, n, GROUP, BLOCK_M, BLOCK_N, UNIT_COST, ONE_STEP)
    begin, stop = share(total, program, num_programs)
    unit = unit_at(lengths, band, batch, num_heads_kv, n, begin, GROUP, BLOCK_M, BLOCK_N, UNIT_COST, ONE_STEP)
    entered = unit
    position = gl.maximum(begin, unit[3])
    # the tile that is asked for next, STAGES tiles ahead of the one in use
    ahead, ahead_at = unit, position
    for stage in gl.static_range(STAGES):
        place = _place_ahead(lengths, band, pages, ahead, ahead_at, GROUP, BLOCK_M, BLOCK_N, PAGE_SIZE, NUM_WARPS)
        key = (ahead[5] + ahead_at - ahead[3]) * BLOCK_N
        start_tile(
            k, v, k_ring, v_ring, full, stage, pages, place, ahead[1], key, ahead_at < stop,
            HEAD_DIM, HEAD_DIM_V, BLOCK_N, PAGE_SIZE, NUM_WARPS,
        )  # fmt: skip
        ahead, ahead_at = _next_tile(lengths, band, batch, num_heads_kv, ahead, ahead_at, GROUP, BLOCK_M, BLOCK_N, UNIT_COST)
    row_start, seqlen_q = sequence_rows(lengths, unit[0])
    q_rows = _fetch_rows(q, unit[0], unit[1], unit[2], row_start, seqlen_q, position < stop, PACKED, GROUP, BLOCK_M, HEAD_DIM, NUM_WARPS)
    if PDL and not MERGES:
        gdc_launch_dependents()
    done = program * 0
    while position < stop:
        b, h, row_block, start, blocks, first_tile, tiles = unit
        until = gl.minimum(start + tiles, stop)
        row_start, seqlen_q = sequence_rows(lengths, b)
        seqlen_k = sequence_keys(lengths, b)
        if BLOCK_M >= 64:
            q_rows = _fetch_rows(q, b, h, row_block, row_start, seqlen_q, True, PACKED, GROUP, BLOCK_M, HEAD_DIM, NUM_WARPS)
        q_shared = _share_rows(q_rows, scores, BLOCK_M)
        unit = next_unit(
            lengths, band, batch, num_heads_kv, b, h, row_block, start, blocks, first_tile, tiles, GROUP, BLOCK_M, BLOCK_N, UNIT_COST
        )
        if BLOCK_M < 64:
            # few rows: the next unit's come while this one's keys are at work
            next_start, next_seqlen_q = sequence_rows(lengths, unit[0])
            q_rows = _fetch_rows(
                q, unit[0], unit[1], unit[2], next_start, next_seqlen_q, unit[3] < stop, PACKED, GROUP, BLOCK_M, HEAD_DIM, NUM_WARPS
            )
        m, l, acc, ahead, ahead_at = _attend(
            k, v, ring, q_shared, lengths, pages, scores, band, num_heads_kv, batch, b, h, row_block, seqlen_q, seqlen_k,
            (first_tile + position - start) * BLOCK_N, BLOCK_N, until - position, done, ahead, ahead_at, stop,
            GROUP, BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, True, UNIT_COST, STAGES, NUM_WARPS,
        )  # fmt: skip
        m, l, acc = _merged(m, l, acc, BLOCK_M, DV, NUM_WARPS)
        rows = (b, h, row_block, row_start, seqlen_q)
        if (position == start) & (until == start + tiles):
            _store_out(m, l, acc, out, lse, lengths, sinks, rows, GROUP, BLOCK_M, HEAD_DIM_V)
        else:
            real = _real_rows(acc, rows, GROUP, BLOCK_M)
            leave_part(m, l, acc, partials, slot_of(program, begin, start), num_programs, real, BLOCK_M, HEAD_DIM_V, MERGES)
        done += until - position
        position = gl.maximum(until, unit[3])

    b, h, row_block, start, blocks, first_tile, tiles = entered
    if MERGES and (begin < stop) & (start < begin) & (start + tiles <= stop):
        row_start, seqlen_q = sequence_rows(lengths, b)
        num_rows = seqlen_q * GROUP - row_block * BLOCK_M
        m, l, acc = merged_parts(partials, total, program, num_programs, start, num_rows, BLOCK_M, HEAD_DIM_V, DV, NUM_WARPS)
        _store_out(m, l, acc, out, lse, lengths, sinks, (b, h, row_block, row_start, seqlen_q), GROUP, BLOCK_M, HEAD_DIM_V)


@gluon.constexpr_function
def held_dim(dim):
    """A head dim as tiles hold it."""
    return max(16, 1 << (dim - 1).bit_length())


@gluon.constexpr_function
def _rows_layout(block_m, dim, dtype):
    """q in shared memory: as wgmma reads it, or as ldmatrix does."""
    if block_m >= 64:
        return gl.NVMMASharedLayout.get_default_for([block_m, dim], dtype)
    return gl.SwizzledSharedLayout(8, 1, 8, [1, 0])


@gluon.jit
def _visible_to_rows(band, row_block, seqlen_q, seqlen_k, GROUP: gl.constexpr, BLOCK_M: gl.constexpr):
    """[first, last) keys that any row of the block may see."""
    offset = seqlen_k - seqlen_q
    first_position = row_block * BLOCK_M // GROUP
    last_position = gl.minimum((row_block * BLOCK_M + BLOCK_M - 1) // GROUP, seqlen_q - 1)
    return keys_of(band, first_position + offset, last_position + offset, seqlen_k)


@gluon.jit
def _next_tile(
    lengths, band, batch, num_heads_kv, unit, position,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, UNIT_COST: gl.constexpr,
):  # fmt: skip
    """The next tile's unit and position on the line."""
    b, h, row_block, start, row_blocks, first_tile, tiles = unit
    position += 1
    if position == start + tiles:
        b, h, row_block, start, row_blocks, first_tile, tiles = next_unit(
            lengths, band, batch, num_heads_kv, b, h, row_block, start, row_blocks, first_tile, tiles, GROUP, BLOCK_M, BLOCK_N, UNIT_COST
        )
        position = start
    return (b, h, row_block, start, row_blocks, first_tile, tiles), position


@gluon.jit
def _place_ahead(
    lengths, band, pages, unit, position,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Where a tile of the line lies, as ``place_of`` has it."""
    b, _, row_block, start, _, first_tile, _ = unit
    first, last = b, b
    if PAGE_SIZE > 0:
        _, seqlen_q = sequence_rows(lengths, b)
        first, last = _visible_to_rows(band, row_block, seqlen_q, sequence_keys(lengths, b), GROUP, BLOCK_M)
    return place_of(pages, b, (first_tile + position - start) * BLOCK_N, first, last, BLOCK_N, PAGE_SIZE, NUM_WARPS)


@gluon.jit
def _attend(
    k, v, ring, q_shared, lengths, pages, scores, band, num_heads_kv, batch, b, h, row_block, seqlen_q, seqlen_k,
    key, step, count, done, ahead, ahead_at, stop,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    PAGE_SIZE: gl.constexpr, ON_LINE: gl.constexpr, UNIT_COST: gl.constexpr, STAGES: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """A unit's rows over ``count`` tiles of keys, ``step`` keys apart: (m, l, acc), base 2, not normalised, as the warps have them.

    The tiles are the program's number ``done`` and on. What is ahead is asked for until it reaches ``stop``: the number of
    tiles, or on a line a position, where it may be another unit's, so that it is returned too.
    """
    k_ring, k_tiles, v_ring, v_tiles, full = ring
    OWN_ROWS: gl.constexpr = BLOCK_M >= 64
    ROWS: gl.constexpr = max(16, BLOCK_M)
    D: gl.constexpr = held_dim(HEAD_DIM)
    DV: gl.constexpr = held_dim(HEAD_DIM_V)
    SHAPED: gl.constexpr = scores.softcap is not None or scores.slopes is not None
    GATHERED: gl.constexpr = gathers(PAGE_SIZE, BLOCK_N)
    # q's fragments stay in registers where the accumulator, and what a line is kept track of by, leave room
    HOLD_Q: gl.constexpr = D + DV <= 384 and not ON_LINE
    factor = gl.maximum(gl.abs(scores.scale_log2), 1e-30)

    # a row's number and a key's within its tile: (ROWS,) and [1, BLOCK_N], or [1, ROWS] and [warps, 1, own keys]
    if OWN_ROWS:
        KEY_AXIS: gl.constexpr = 1
        S: gl.constexpr = own_rows_layout(NUM_WARPS, BLOCK_N)
        A: gl.constexpr = own_rows_layout(NUM_WARPS, DV)
        row = gl.arange(0, ROWS, gl.SliceLayout(1, S))
        n = gl.expand_dims(gl.arange(0, BLOCK_N, gl.SliceLayout(0, S)), 0)
        m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
        l = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, S))
        acc = gl.full([ROWS, DV], 0.0, gl.float32, A)
    else:
        KEY_AXIS: gl.constexpr = 2
        OWN: gl.constexpr = BLOCK_N // NUM_WARPS
        S: gl.constexpr = own_keys_layout(NUM_WARPS)
        A: gl.constexpr = S
        row = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, S))), 0)
        warp = gl.arange(0, NUM_WARPS, gl.SliceLayout(1, gl.SliceLayout(2, S)))
        own = gl.arange(0, OWN, gl.SliceLayout(0, gl.SliceLayout(1, S)))
        n = gl.expand_dims(gl.expand_dims(warp * OWN, 1), 2) + gl.expand_dims(gl.expand_dims(own, 0), 1)
        m = gl.full([NUM_WARPS, ROWS], float("-inf"), gl.float32, gl.SliceLayout(2, S))
        l = gl.full([NUM_WARPS, ROWS], 0.0, gl.float32, gl.SliceLayout(2, S))
        acc = gl.full([NUM_WARPS, ROWS, DV], 0.0, gl.float32, A)
        if HOLD_Q:
            q_operand = repeated_rows(q_shared, ROWS, D, NUM_WARPS)
    offset = seqlen_k - seqlen_q
    first, last = _visible_to_rows(band, row_block, seqlen_q, seqlen_k, GROUP, BLOCK_M)
    at = (row_block * BLOCK_M + row) // GROUP + offset
    lowest, highest = visible_keys(band, at, first, last)
    # what every row sees needs no mask
    first_at = row_block * BLOCK_M // GROUP + offset
    last_at = gl.minimum((row_block * BLOCK_M + BLOCK_M - 1) // GROUP, seqlen_q - 1) + offset
    lowest_of_all, _ = visible_keys(band, last_at, first, last)
    _, highest_of_all = visible_keys(band, first_at, first, last)
    if scores.slopes is not None:
        head = h * GROUP + (row_block * BLOCK_M + row) % GROUP
        slope = gl.load(scores.slopes + b.to(gl.int64) * scores.slopes_stride_b + head) * LOG2E

    for i in range(count):
        stage = (done + i) % STAGES
        # page ids are asked for before the wait, so that they come meanwhile
        if ON_LINE:
            place = _place_ahead(lengths, band, pages, ahead, ahead_at, GROUP, BLOCK_M, BLOCK_N, PAGE_SIZE, NUM_WARPS)
        else:
            place = place_of(pages, b, key + STAGES * step, first, last, BLOCK_N, PAGE_SIZE, NUM_WARPS)
        if GATHERED:
            page = page_of(pages, b, key + n, (key + n >= first) & (key + n < last), PAGE_SIZE)
        elif PAGE_SIZE > 0:
            page = page_of(pages, b, key, (key + BLOCK_N > first) & (key < last), PAGE_SIZE)
        wait_for_tile(full, stage, (done + i) // STAGES, OWN_ROWS, STAGES, GATHERED)
        if OWN_ROWS:
            s = row_scores(q_shared, k_tiles.index(stage), ROWS, BLOCK_N, NUM_WARPS)
        else:
            if not HOLD_Q:
                q_operand = repeated_rows(q_shared, ROWS, D, NUM_WARPS)
            s = own_scores(q_operand, k_tiles.index(stage), ROWS, BLOCK_N, D, NUM_WARPS)
        if SHAPED:
            s = s * factor
            if scores.softcap is not None:
                s = softcapped(s, scores.softcap * LOG2E)
            if scores.slopes is not None:
                s = s - gl.expand_dims(slope, KEY_AXIS) * gl.abs(key + n - gl.expand_dims(at, KEY_AXIS)).to(gl.float32)
        if PAGE_SIZE > 0:
            s = gl.where(is_page(pages, page), s, float("-inf"))
        if (key < lowest_of_all) | (key + BLOCK_N - 1 > highest_of_all):
            s = gl.where((key + n >= gl.expand_dims(lowest, KEY_AXIS)) & (key + n <= gl.expand_dims(highest, KEY_AXIS)), s, float("-inf"))
        m, l, p, alpha = online_step(m, l, s, 1.0 if SHAPED else factor, KEY_AXIS)
        acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(KEY_AXIS, A)), KEY_AXIS)
        unseen = False if GATHERED else (key < first) | (key + BLOCK_N > last)
        if OWN_ROWS:
            acc = row_values(p, v_tiles.index(stage), acc, unseen, first, last, key, BLOCK_N, DV, NUM_WARPS)
        else:
            acc = own_values(p, v_tiles.index(stage), acc, unseen, first, last, key, BLOCK_N, DV, NUM_WARPS)
        if GATHERED or ahead_at < stop:
            barrier()
            ahead_h, ahead_key = h, key + STAGES * step
            if ON_LINE:
                ahead_h, ahead_key = ahead[1], (ahead[5] + ahead_at - ahead[3]) * BLOCK_N
            start_tile(
                k, v, k_ring, v_ring, full, stage, pages, place, ahead_h, ahead_key, ahead_at < stop,
                HEAD_DIM, HEAD_DIM_V, BLOCK_N, PAGE_SIZE, NUM_WARPS,
            )  # fmt: skip
        if ON_LINE:
            ahead, ahead_at = _next_tile(lengths, band, batch, num_heads_kv, ahead, ahead_at, GROUP, BLOCK_M, BLOCK_N, UNIT_COST)
        else:
            ahead_at += 1
        key += step

    return m, l, acc, ahead, ahead_at


@gluon.jit
def _fetch_rows(
    q, b, h, row_block, row_start, seqlen_q, wanted, packed: gl.constexpr,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """A unit's rows of q [max(16, BLOCK_M), dim] on their way to registers; zeros where there is none, or none is ``wanted``."""
    D: gl.constexpr = held_dim(HEAD_DIM)
    ACROSS: gl.constexpr = min(32, D // 8)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [NUM_WARPS, 1], [1, 0])
    local = gl.arange(0, max(16, BLOCK_M), gl.SliceLayout(1, WIDE))
    d = gl.arange(0, D, gl.SliceLayout(0, WIDE))
    rows = row_block * BLOCK_M + local
    real = (local < BLOCK_M) & (rows < seqlen_q * GROUP) & wanted
    b_rows = b * 0 if packed else b
    offsets = row_offsets(q, b_rows, row_start + rows // GROUP, h * GROUP + rows % GROUP)
    mask = gl.expand_dims(real, 1) & gl.expand_dims(d < HEAD_DIM, 0)
    return gl.load(q.ptr + gl.expand_dims(offsets, 1) + gl.expand_dims(d, 0), mask=mask, other=0.0)


@gluon.jit
def _share_rows(tile, scores, BLOCK_M: gl.constexpr):
    """The rows in shared memory.

    A negative scale becomes a negated q, which is exact: online_step wants a factor that keeps the order of scores.
    """
    tile = gl.where(scores.scale_log2 < 0.0, -tile, tile)
    q_shared = gl.allocate_shared_memory(tile.dtype, tile.shape, _rows_layout(BLOCK_M, tile.shape[1], tile.dtype), tile)
    if BLOCK_M >= 64:
        fence_async_shared()
    return q_shared


@gluon.jit
def _real_rows(acc, unit, GROUP: gl.constexpr, BLOCK_M: gl.constexpr):
    """Which rows of a result [rows, dim] the unit (b, h, row block, first token, queries) has."""
    return unit[2] * BLOCK_M + row_numbers(acc) < unit[4] * GROUP


@gluon.jit
def _partials_of_split(row, unit, num_heads_kv, lengths, GROUP: gl.constexpr, BLOCK_M: gl.constexpr):
    """Where the partial results of a grid of splits lie: [token, head, split]."""
    b, h, row_block, row_start, seqlen_q = unit
    rows = row_block * BLOCK_M + row
    token = row_start + rows // GROUP
    if lengths.cu_seqlens_q is None:
        token += b * seqlen_q
    head = h * GROUP + rows % GROUP
    split = gl.num_programs(1) - 1 - gl.program_id(1)
    return (token.to(gl.int64) * (num_heads_kv * GROUP) + head) * gl.num_programs(1) + split


@gluon.jit
def _store_no_keys(partials, lengths, unit, num_heads_kv, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, NUM_WARPS: gl.constexpr):
    """A split without keys: lse -inf."""
    row = gl.arange(0, BLOCK_M, gl.BlockedLayout([1], [32], [NUM_WARPS], [0]))
    at = _partials_of_split(row, unit, num_heads_kv, lengths, GROUP, BLOCK_M)
    nothing = gl.full([BLOCK_M], float("-inf"), gl.float32, row.type.layout)
    gl.store(partials.ptr + partials.lse_start + at, nothing, mask=unit[2] * BLOCK_M + row < unit[4] * GROUP)


@gluon.jit
def _store_out(m, l, acc, out, lse, lengths, sinks, unit, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM_V: gl.constexpr):
    """The unit's rows of out and lse, with the sink."""
    R: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    d = gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
    m, l = gl.convert_layout(m, R), gl.convert_layout(l, R)
    b, h, row_block, row_start, seqlen_q = unit
    rows = row_block * BLOCK_M + row_numbers(acc)
    real = rows < seqlen_q * GROUP
    token = row_start + rows // GROUP
    head = h * GROUP + rows % GROUP
    b_rows = b * 0 if lengths.cu_seqlens_q is not None else b
    if sinks is not None:
        m, l, alpha = join_sink(m, l, gl.load(sinks + head, mask=real, other=0.0))
        acc = acc * gl.expand_dims(alpha, 1)
    if lse.ptr is not None:
        at = b_rows.to(gl.int64) * lse.stride_b + head.to(gl.int64) * lse.stride_h + token.to(gl.int64) * lse.stride_m
        gl.store(lse.ptr + at, natural_lse(m, l), mask=real)
    offsets = row_offsets(out, b_rows, token, head)
    result = (acc * gl.expand_dims(normaliser(l), 1)).to(out.ptr.dtype.element_ty)
    ptrs = out.ptr + gl.expand_dims(offsets, 1) + gl.expand_dims(d, 0)
    gl.store(ptrs, result, mask=gl.expand_dims(real, 1) & gl.expand_dims(d < HEAD_DIM_V, 0))


@gluon.jit
def _clear_unowned(out, lse, lengths, batch, num_heads, HEAD_DIM_V: gl.constexpr, DV: gl.constexpr, NUM_WARPS: gl.constexpr):
    """Packed queries past the last sequence's end see no key: out 0, lse -inf. All programs share them."""
    if lengths.cu_seqlens_q is not None:
        FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
        d = gl.arange(0, DV, FLAT)
        for token in range(owned_rows(lengths, batch) + gl.program_id(0), lengths.total_q, gl.num_programs(0)):
            for head in range(num_heads):
                row = out.ptr + token * out.stride_m + head * out.stride_h
                gl.store(row + d, gl.full([DV], 0.0, out.ptr.dtype.element_ty, FLAT), mask=d < HEAD_DIM_V)
                if lse.ptr is not None:
                    gl.store(lse.ptr + head * lse.stride_h + token * lse.stride_m, float("-inf"))


def decode_spec(problem: Problem, plan: DecodePlan) -> Spec:
    """The split kernel's specialisation."""
    gathered = gathers(problem.page_size, plan.block_n)

    def keys(dtype: str, dim: int) -> KeysView | Descriptor:
        if gathered:
            stride = Arg("i64", max(1, problem.alignment // DTYPE_BYTES[dtype]))
            return KeysView(Arg("*" + TRITON_DTYPES[dtype], problem.alignment), stride, stride, stride)
        return Descriptor(TRITON_DTYPES[dtype], (1, plan.block_n, 1, held_dim(dim)))

    return Spec(
        decode_sm90_kernel,
        args={
            **split_args(problem, plan),
            "planned_keys": Arg("i32"),
            "k": keys(problem.dtype_k, problem.head_dim),
            "v": keys(problem.dtype_v, problem.head_dim_v),
        },
        constants={
            **split_constants(problem, plan),
            "STAGES": plan.num_stages,
            "NUM_WARPS": plan.num_warps,
            "IN_TURN": plan.min_keys_per_split <= plan.block_n,
            "MERGES": merges_parts(problem, plan),
        },
        options={"num_warps": plan.num_warps, "num_stages": 1},
    )


def merges_parts(problem: Problem, plan: DecodePlan) -> bool:
    """Whether the programs of a line merge the parts of a unit themselves.

    So they do where only unlike lengths make them share units at all: then most have nothing to merge, and a combine would
    cost its launch. Where every unit is shared, a combine has more programs to merge with. Many rows of long heads fill
    the registers by themselves, and are left to combine too.
    """
    fits = plan.block_m < 64 or max(problem.head_dim, problem.head_dim_v) <= 128
    return fits and plan.num_programs > 0 and plan.num_splits == 1


def prepare(problem: Problem, plan: DecodePlan, device: torch.device) -> None:
    """Compiles what ``bind`` will launch."""
    launcher(decode_spec(problem, plan), device)
    if combines(plan) and not merges_parts(problem, plan):
        bind_combine(problem, plan, device)


def bind(problem: Problem, plan: DecodePlan, device: torch.device) -> DecodeRunner:
    """What runs calls of ``problem`` as ``plan`` says: the split kernel and, where keys are split, combine."""
    launch = launcher(decode_spec(problem, plan), device)
    gathered = gathers(problem.page_size, plan.block_n)

    def with_keys(k: torch.Tensor, v: torch.Tensor) -> tuple[Launch, Any, Any]:
        if gathered:
            return launch, (k.data_ptr(), *k.stride()[:3]), (v.data_ptr(), *v.stride()[:3])
        return launch, k, v

    return bind_split(
        problem, plan, device, torch.Tensor.data_ptr, with_keys, (length_bucket(problem.seqlen_k),), merges_parts(problem, plan)
    )
