"""The queries' pass of wide heads: dQ of 128 queries a tile, two warpgroups of 64 rows each, over the keys that they see.

As backward_queries.py, whose producer this is. Shared memory is full: of values a ring holds one block less than of keys, which are
needed longer. So a block's scores come first, then the last block's product into dQ, and its values are waited for last; while these
products run, probabilities are computed.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait

from flashtile.kernels.gluon.backward_results import clear_gradient
from flashtile.kernels.gluon.backward_wide_parts import parts_of_tile, products_of, store_parts, wait_for_parts, zero_parts
from flashtile.kernels.gluon.chain import begin_after_last
from flashtile.kernels.gluon.forward_load import load_tiles
from flashtile.kernels.gluon.forward_memory import ROWS, allocate_exchange, allocate_tiles, main_dim, rest_dim
from flashtile.kernels.gluon.forward_rows import hand_back
from flashtile.kernels.gluon.forward_schedule import blocks_of_rows, keys_of_sequence, read_note, whole_blocks
from flashtile.kernels.gluon.forward_scores import clear_values, operand_layout, rows_layout, seen_keys, start_scores, start_values
from flashtile.kernels.gluon.names import barrier
from flashtile.kernels.tile.gradients import load_statistics
from flashtile.kernels.tile.schedule import owned_rows


@gluon.jit
def backward_wide_queries_kernel(
    q, k, v, dout, dq_box, dq, statistics, tokens, pages, scores, band, counter, num_programs, num_heads, batch, heads_at_once,
    scale, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Grid: programs, each of which takes tiles of 128 queries; where ``counter`` is None, the one of its number."""
    q_tiles = allocate_tiles(q, 2, ROWS, ROWS, HEAD_DIM)
    dout_tiles = allocate_tiles(dout, 2, ROWS, ROWS, HEAD_DIM_V)
    k_ring = allocate_tiles(k, STAGES, BLOCK_N, BLOCK_N, HEAD_DIM)
    v_ring = allocate_tiles(v, STAGES - 1, BLOCK_N, BLOCK_N, HEAD_DIM_V)
    notes, known, q_full, q_empty, k_full, k_empty, v_full, v_empty = allocate_exchange(2, STAGES)
    memory = (q_tiles, k_ring, v_ring, notes, known, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    begin_after_last(PDL)
    gl.warp_specialize([
        (sum_over_keys, (dq_box, dq, statistics, tokens, scores, band, batch, num_heads, scale, memory, dout_tiles,
                         0, BLOCK_N, HEAD_DIM, HEAD_DIM_V, STAGES)),
        (sum_over_keys, (dq_box, dq, statistics, tokens, scores, band, batch, num_heads, scale, memory, dout_tiles,
                         1, BLOCK_N, HEAD_DIM, HEAD_DIM_V, STAGES)),
        (load_tiles, (q, k, v, dout, tokens, pages, scores, band, counter, num_programs, batch, num_heads, heads_at_once, memory,
                      dout_tiles, 2, GROUP, BLOCK_N, HEAD_DIM, HEAD_DIM_V, 0, STAGES, STAGES - 1)),
    ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


@gluon.jit
def sum_over_keys(
    dq_box, dq_view, statistics, tokens, scores, band, batch, num_heads, scale, memory, dout_tiles,
    C: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Consumer C's 64 rows of every tile that the producer brings; the first consumer also clears rows that nobody owns."""
    q_tiles, k_ring, v_ring, notes, known, q_full, q_empty, k_full, k_empty, v_full, v_empty = memory
    ring = (k_ring, v_ring, known, k_full, k_empty, v_full, v_empty)
    VALUE_STAGES: gl.constexpr = STAGES - 1
    R: gl.constexpr = rows_layout(BLOCK_N)
    OPERAND: gl.constexpr = operand_layout(main_dim(HEAD_DIM))
    q = parts_of_tile(q_tiles, C, HEAD_DIM)
    dout = parts_of_tile(dout_tiles, C, HEAD_DIM_V)
    tiles_done = gl.program_id(0) * 0
    mbarrier.wait(q_full.index(C), 0)
    b, h, row, row_start, seqlen_q, seqlen_k, turn, _ = read_note(notes, tiles_done, C)
    while b >= 0:
        b_rows = b * 0 if tokens.cu_seqlens_q is not None else b
        rows = row + gl.arange(0, ROWS, R)
        lse_log2, row_delta = load_statistics(statistics, b_rows, h, row_start, rows, rows < seqlen_q)
        low, high = blocks_of_rows(band, row - C * ROWS, seqlen_q, seqlen_k, 2 * ROWS, BLOCK_N)
        own_low, own_high = blocks_of_rows(band, row, seqlen_q, seqlen_k, ROWS, BLOCK_N)
        own_high = gl.maximum(gl.minimum(own_high, high), low + 1)
        own_low = gl.maximum(gl.minimum(own_low, own_high - 1), low)
        # of a tile's last rows, a warpgroup may have none
        own_low = gl.where(row < seqlen_q, own_low, own_high - 1)
        whole_low, whole_high = whole_blocks(band, row, seqlen_q, seqlen_k, BLOCK_N)
        place = (band, whole_low, whole_high, notes, tiles_done)
        turn = hand_back(ring, turn, high - own_high, STAGES, VALUE_STAGES)

        dq = zero_parts(HEAD_DIM)
        block = own_high - 1
        s = _start_scores(q, ring, tokens, place, block, turn, C, BLOCK_N, HEAD_DIM, STAGES)
        mbarrier.wait(v_full.index(turn % VALUE_STAGES), (turn // VALUE_STAGES) & 1)
        dp = start_scores(dout, v_ring, _stage_of_values(turn, VALUE_STAGES), BLOCK_N, HEAD_DIM_V)
        s, dp = warpgroup_mma_wait(0, deps=(s, dp))
        barrier()
        mbarrier.arrive(v_empty.index(turn % VALUE_STAGES), count=1)
        p = gl.exp2(s * scores.scale_log2 - gl.expand_dims(lse_log2, 1))
        ds = _gradients_of_scores(p, dp, row_delta, place, block, C, BLOCK_N)
        operand = gl.convert_layout(ds.to(dq_box.dtype), OPERAND)
        for _ in range(block - own_low):
            block -= 1
            last_stage = turn % STAGES
            turn += 1
            # the compiler does not know that it is C: it would keep the addresses of all parts of products with this tile for the
            # whole loop, more than there are uniform registers
            tile = gl.where(block >= 0, C, 1 - C)
            q = parts_of_tile(q_tiles, tile, HEAD_DIM)
            s = _start_scores(q, ring, tokens, place, block, turn, C, BLOCK_N, HEAD_DIM, STAGES)
            dq_coming = start_values(operand, k_ring, last_stage, dq, HEAD_DIM)
            mbarrier.wait(v_full.index(turn % VALUE_STAGES), (turn // VALUE_STAGES) & 1)
            dout = parts_of_tile(dout_tiles, tile, HEAD_DIM_V)
            dp = start_scores(dout, v_ring, _stage_of_values(turn, VALUE_STAGES), BLOCK_N, HEAD_DIM_V)
            s = warpgroup_mma_wait(products_of(HEAD_DIM) + products_of(HEAD_DIM_V), deps=(s,))
            p = gl.exp2(s * scores.scale_log2 - gl.expand_dims(lse_log2, 1))
            # these keys are there: to wait for them again ends the basic block, or else the assembler would move the wait for the
            # product with the last ones to the front of the exponentials
            mbarrier.wait(k_full.index(turn % STAGES), (turn // STAGES) & 1)
            dq = wait_for_parts(dq_coming, products_of(HEAD_DIM_V), HEAD_DIM)
            barrier()
            mbarrier.arrive(k_empty.index(last_stage), count=1)
            dp = warpgroup_mma_wait(0, deps=(dp,))
            barrier()
            mbarrier.arrive(v_empty.index(turn % VALUE_STAGES), count=1)
            ds = _gradients_of_scores(p, dp, row_delta, place, block, C, BLOCK_N)
            operand = gl.convert_layout(ds.to(dq_box.dtype), OPERAND)
        stage = turn % STAGES
        dq_coming = start_values(operand, k_ring, stage, dq, HEAD_DIM)
        b, h, row, row_start, seqlen_q, seqlen_k, _, _ = read_note(notes, tiles_done, C)
        low, _ = blocks_of_rows(band, row - C * ROWS, seqlen_q, seqlen_k, 2 * ROWS, BLOCK_N)
        dq = wait_for_parts(dq_coming, 0, HEAD_DIM)
        barrier()
        mbarrier.arrive(k_empty.index(stage), count=1)
        hand_back(ring, turn + 1, block - low, STAGES, VALUE_STAGES)
        b_rows = b * 0 if tokens.cu_seqlens_q is not None else b
        if rest_dim(HEAD_DIM) > 0:
            dq = dq[0] * scale, dq[1] * scale
        else:
            dq = dq[0] * scale, dq[1]
        # all products with q are done: its memory takes their results
        store_parts(dq_box, dq_view, q_tiles, C, dq, b_rows, row_start, row, seqlen_q, h, HEAD_DIM)
        tma.store_wait(0)
        barrier()
        mbarrier.arrive(q_empty.index(C), count=1)
        tiles_done += 1
        mbarrier.wait(q_full.index(C), tiles_done & 1)
        b, h, row, row_start, seqlen_q, seqlen_k, turn, _ = read_note(notes, tiles_done, C)
    if C == 0 and tokens.cu_seqlens_q is not None:
        clear_gradient(dq_view, owned_rows(tokens, batch), tokens.total_q, num_heads, HEAD_DIM)


@gluon.jit
def _start_scores(
    q, ring, tokens, place, block, turn, C: gl.constexpr, BLOCK_N: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """q k^T [64, BLOCK_N] of the keys in turn ``turn`` of the ring, on its way once these are there."""
    k_ring, k_full = ring[0], ring[3]
    band, whole_low, whole_high, notes, tiles_done = place
    stage = turn % STAGES
    mbarrier.wait(k_full.index(stage), (turn // STAGES) & 1)
    # of a dense k, what lies behind the last key reads as zero
    if tokens.cu_seqlens_k is not None or tokens.seqused_k is not None or band.left is not None:
        if (block < whole_low) | (block >= whole_high):
            _, _, _, _, seqlen_q, seqlen_k, _, _ = read_note(notes, tiles_done, C)
            first, _ = keys_of_sequence(band, seqlen_q, seqlen_k)
            key = block * BLOCK_N
            if (key < first) | (key + BLOCK_N > seqlen_k):
                clear_values(k_ring, stage, key, first, seqlen_k, BLOCK_N, DIM)
    return start_scores(q, k_ring, stage, BLOCK_N, DIM)


@gluon.jit
def _gradients_of_scores(p, dp, delta, place, block, C: gl.constexpr, BLOCK_N: gl.constexpr):
    """p (dp - delta), 0 for keys that a row does not see: of those either may be NaN."""
    band, whole_low, whole_high, notes, tiles_done = place
    ds = p * (dp - gl.expand_dims(delta, 1))
    if (block < whole_low) | (block >= whole_high):
        # read again, so that the other blocks' registers need not hold it
        _, _, row, _, seqlen_q, seqlen_k, _, _ = read_note(notes, tiles_done, C)
        ds = gl.where(seen_keys(band, row + seqlen_k - seqlen_q, block * BLOCK_N, seqlen_k, BLOCK_N), ds, 0.0)
    return ds


@gluon.jit
def _stage_of_values(turn, VALUE_STAGES: gl.constexpr):
    """Where the values of turn ``turn`` lie. Of one stage the compiler does not know that it is 0: it would keep the addresses of
    all parts of the values' product for the whole loop, more than there are uniform registers."""
    if VALUE_STAGES == 1:
        return gl.where(turn >= 0, 0, 1)
    else:
        return turn % VALUE_STAGES
