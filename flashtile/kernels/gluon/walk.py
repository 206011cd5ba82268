"""Which tiles a program of Hopper's kernel reads, for which rows, and where the results go.

On a grid of splits: one unit (a sequence, key head and block of rows), and one split's share of its keys. On a line: an even
share of all tiles of the batch (stream-K), unit by unit, and the ring runs on from one unit into the next.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents

from flashtile.kernels.gluon.ahead import next_tile, place_ahead, tiles_of_split, unit_of_split
from flashtile.kernels.gluon.attend import attend, fetch_rows, held_dim, merged, share_rows
from flashtile.kernels.gluon.parts import leave_part, merged_parts
from flashtile.kernels.gluon.quantised import holds_codes
from flashtile.kernels.gluon.results import (
    clear_unowned,
    partials_of_split,
    real_rows,
    row_numbers,
    store_no_keys,
    store_out,
    store_partial,
)
from flashtile.kernels.gluon.ring import place_of, start_tile
from flashtile.kernels.tile.quantised import key_scale, value_scale
from flashtile.kernels.tile.schedule import line_length, next_unit, sequence_keys, sequence_rows, share, slot_of, unit_at


@gluon.jit
def walk_split(
    q, k, v, out, lse, partials, ring, lengths, pages, scores, band, sinks, kv_scales, num_heads_kv, batch, row_blocks,
    min_keys_per_split, planned_keys,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    PAGE_SIZE: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr, NUM_WARPS: gl.constexpr, IN_TURN: gl.constexpr, PDL: gl.constexpr,
    ASKED_FOR: gl.constexpr,
):  # fmt: skip
    """A grid of splits: one unit, and of its keys one split's share.

    IN_TURN: the splits take the tiles in turn, so that a program knows its first tiles before it knows the length. As
    far as the plan says that there are keys, it asks for them at once, and reads q and the length meanwhile.
    """
    k_ring, k_tiles, v_ring, v_tiles, full, _empty, _known = ring
    QUANTISED: gl.constexpr = holds_codes(k_tiles.dtype)
    MOVED: gl.constexpr = QUANTISED and q.ptr.dtype.element_ty == gl.bfloat16
    EARLY: gl.constexpr = IN_TURN and PAGE_SIZE == 0 and band.left is None and lengths.cu_seqlens_q is None and lengths.leftpad_k is None
    b, h, row_block, split, num_splits = unit_of_split(num_heads_kv, row_blocks)
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
    q_rows = fetch_rows(q, b, h, row_block, row_start, seqlen_q, True, PACKED, GROUP, BLOCK_M, HEAD_DIM, NUM_WARPS)
    scale_log2 = scores.scale_log2 * key_scale(kv_scales, b, h)
    values_factor = value_scale(kv_scales, b, h)
    q_shared, row_factor = share_rows(q_rows, scale_log2, QUANTISED, BLOCK_M)

    first, last, key, step, count = tiles_of_split(
        lengths, band, b, row_block, seqlen_q, seqlen_k, split, num_splits, min_keys_per_split, GROUP, BLOCK_M, BLOCK_N, SPLIT, IN_TURN
    )
    if not SPLIT:
        clear_unowned(out, lse, lengths, batch, num_heads_kv * GROUP, HEAD_DIM_V, held_dim(HEAD_DIM_V), NUM_WARPS)
    if not ASKED_FOR and (not EARLY or last > planned_keys):
        for i in gl.static_range(STAGES):
            ahead = key + i * step
            wanted = i < count
            if EARLY:
                wanted = wanted & (ahead >= planned_keys)
            place = place_of(pages, b, ahead, first, last, BLOCK_N, PAGE_SIZE, NUM_WARPS)
            start_tile(k, v, k_ring, v_ring, full, i, pages, place, h, ahead, wanted, HEAD_DIM, HEAD_DIM_V, BLOCK_N, PAGE_SIZE, NUM_WARPS)

    if count > 0:
        no_unit = (b, h, row_block, b, b, b, b)
        m, l, acc, _, _ = attend(
            k, v, ring, q_shared, row_factor, lengths, pages, scores, scale_log2, band, num_heads_kv, batch,
            b, h, row_block, seqlen_q, seqlen_k, key, step, count, count * 0, no_unit, count * 0 + STAGES, count,
            GROUP, BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, False, 0, STAGES, NUM_WARPS, ASKED_FOR, MOVED,
        )  # fmt: skip
        if EARLY:
            _drain(full, count, split, num_splits, planned_keys, BLOCK_N, STAGES)
        m, l, acc = merged(m, l, acc, QUANTISED, BLOCK_M, held_dim(HEAD_DIM_V), NUM_WARPS)
        if kv_scales.v is not None:
            acc = acc * values_factor
        unit = (b, h, row_block, row_start, seqlen_q)
        if SPLIT:
            at = partials_of_split(row_numbers(acc), unit, num_heads_kv, lengths, GROUP, BLOCK_M)
            store_partial(m, l, acc, partials, at, real_rows(acc, unit, GROUP, BLOCK_M), HEAD_DIM_V)
        else:
            store_out(m, l, acc, out, lse, lengths, sinks, unit, GROUP, BLOCK_M, HEAD_DIM_V)
    else:
        if EARLY:
            _drain(full, count, split, num_splits, planned_keys, BLOCK_N, STAGES)
        if SPLIT:
            # most programs of a batch of unlike lengths; combine sees lse -inf and does not read their rows
            store_no_keys(partials, lengths, (b, h, row_block, row_start, seqlen_q), num_heads_kv, GROUP, BLOCK_M, NUM_WARPS)


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
def walk_line(
    q, k, v, out, lse, partials, ring, lengths, pages, scores, band, sinks, kv_scales, num_heads_kv, batch,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    PAGE_SIZE: gl.constexpr, SEQUENCES: gl.constexpr, ONE_STEP: gl.constexpr, UNIT_COST: gl.constexpr, STAGES: gl.constexpr,
    NUM_WARPS: gl.constexpr, MERGES: gl.constexpr, PDL: gl.constexpr, ASKED_FOR: gl.constexpr,
):  # fmt: skip
    """Stream-K: this program's share of the line of all tiles, unit by unit; and if it MERGES, a unit that others began."""
    k_ring, k_tiles, v_ring, v_tiles, full, _empty, _known = ring
    QUANTISED: gl.constexpr = holds_codes(k_tiles.dtype)
    MOVED: gl.constexpr = QUANTISED and q.ptr.dtype.element_ty == gl.bfloat16
    PACKED: gl.constexpr = lengths.cu_seqlens_q is not None
    DV: gl.constexpr = held_dim(HEAD_DIM_V)
    program, num_programs = gl.program_id(0), gl.num_programs(0)
    clear_unowned(out, lse, lengths, batch, num_heads_kv * GROUP, HEAD_DIM_V, DV, NUM_WARPS)
    # a layout in which every warp has all of it, so that sums need no exchange between warps
    n = gl.arange(0, SEQUENCES, gl.BlockedLayout([SEQUENCES // 32], [32], [NUM_WARPS], [0]))
    total = line_length(lengths, band, batch, num_heads_kv, n, GROUP, BLOCK_M, BLOCK_N, UNIT_COST, ONE_STEP)
    begin, stop = share(total, program, num_programs)
    unit = unit_at(lengths, band, batch, num_heads_kv, n, begin, GROUP, BLOCK_M, BLOCK_N, UNIT_COST, ONE_STEP)
    entered = unit
    position = gl.maximum(begin, unit[3])
    # the tile that is asked for next, STAGES tiles ahead of the one in use
    ahead, ahead_at = unit, position
    if not ASKED_FOR:
        for stage in gl.static_range(STAGES):
            place = place_ahead(lengths, band, pages, ahead, ahead_at, GROUP, BLOCK_M, BLOCK_N, PAGE_SIZE, NUM_WARPS)
            key = (ahead[5] + ahead_at - ahead[3]) * BLOCK_N
            start_tile(
                k, v, k_ring, v_ring, full, stage, pages, place, ahead[1], key, ahead_at < stop,
                HEAD_DIM, HEAD_DIM_V, BLOCK_N, PAGE_SIZE, NUM_WARPS,
            )  # fmt: skip
            ahead, ahead_at = next_tile(lengths, band, batch, num_heads_kv, ahead, ahead_at, GROUP, BLOCK_M, BLOCK_N, UNIT_COST)
    row_start, seqlen_q = sequence_rows(lengths, unit[0])
    q_rows = fetch_rows(q, unit[0], unit[1], unit[2], row_start, seqlen_q, position < stop, PACKED, GROUP, BLOCK_M, HEAD_DIM, NUM_WARPS)
    if PDL and not MERGES:
        gdc_launch_dependents()
    done = program * 0
    while position < stop:
        b, h, row_block, start, blocks, first_tile, tiles = unit
        until = gl.minimum(start + tiles, stop)
        row_start, seqlen_q = sequence_rows(lengths, b)
        seqlen_k = sequence_keys(lengths, b)
        if BLOCK_M >= 64:
            q_rows = fetch_rows(q, b, h, row_block, row_start, seqlen_q, True, PACKED, GROUP, BLOCK_M, HEAD_DIM, NUM_WARPS)
        scale_log2 = scores.scale_log2 * key_scale(kv_scales, b, h)
        values_factor = value_scale(kv_scales, b, h)
        q_shared, row_factor = share_rows(q_rows, scale_log2, QUANTISED, BLOCK_M)
        unit = next_unit(
            lengths, band, batch, num_heads_kv, b, h, row_block, start, blocks, first_tile, tiles, GROUP, BLOCK_M, BLOCK_N, UNIT_COST
        )
        if BLOCK_M < 64:
            # few rows: the next unit's come while this one's keys are at work
            next_start, next_seqlen_q = sequence_rows(lengths, unit[0])
            q_rows = fetch_rows(
                q, unit[0], unit[1], unit[2], next_start, next_seqlen_q, unit[3] < stop, PACKED, GROUP, BLOCK_M, HEAD_DIM, NUM_WARPS
            )
        m, l, acc, ahead, ahead_at = attend(
            k, v, ring, q_shared, row_factor, lengths, pages, scores, scale_log2, band, num_heads_kv, batch,
            b, h, row_block, seqlen_q, seqlen_k, (first_tile + position - start) * BLOCK_N, BLOCK_N, until - position, done,
            ahead, ahead_at, stop,
            GROUP, BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, True, UNIT_COST, STAGES, NUM_WARPS, ASKED_FOR, MOVED,
        )  # fmt: skip
        m, l, acc = merged(m, l, acc, QUANTISED, BLOCK_M, DV, NUM_WARPS)
        if kv_scales.v is not None:
            acc = acc * values_factor
        rows = (b, h, row_block, row_start, seqlen_q)
        if (position == start) & (until == start + tiles):
            store_out(m, l, acc, out, lse, lengths, sinks, rows, GROUP, BLOCK_M, HEAD_DIM_V)
        else:
            real = real_rows(acc, rows, GROUP, BLOCK_M)
            leave_part(m, l, acc, partials, slot_of(program, begin, start), num_programs, real, BLOCK_M, HEAD_DIM_V, MERGES)
        done += until - position
        position = gl.maximum(until, unit[3])

    b, h, row_block, start, blocks, first_tile, tiles = entered
    if MERGES and (begin < stop) & (start < begin) & (start + tiles <= stop):
        row_start, seqlen_q = sequence_rows(lengths, b)
        num_rows = seqlen_q * GROUP - row_block * BLOCK_M
        m, l, acc = merged_parts(partials, total, program, num_programs, start, num_rows, BLOCK_M, HEAD_DIM_V, DV, NUM_WARPS)
        store_out(m, l, acc, out, lse, lengths, sinks, (b, h, row_block, row_start, seqlen_q), GROUP, BLOCK_M, HEAD_DIM_V)
