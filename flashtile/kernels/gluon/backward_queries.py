"""The queries' pass: dQ of 128 queries a tile, two warpgroups of 64 rows each, over the keys that they see.

Its producer is the forward pass's, which brings dout beside q. Gradients of scores, once rounded, are the operand of dQ as they
lie in registers; they meet their keys while the next block's scores and gradients of probabilities are computed.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from flashtile.kernels.gluon.backward_results import clear_gradient, padded_dim, store_gradient
from flashtile.kernels.gluon.chain import begin_after_last
from flashtile.kernels.gluon.forward_load import load_tiles
from flashtile.kernels.gluon.forward_memory import ROWS, allocate_exchange, allocate_tiles
from flashtile.kernels.gluon.forward_rows import hand_back
from flashtile.kernels.gluon.forward_schedule import blocks_of_rows, keys_of_sequence, read_note, whole_blocks
from flashtile.kernels.gluon.forward_scores import clear_values, operand_layout, products_layout, rows_layout, seen_keys
from flashtile.kernels.gluon.names import barrier
from flashtile.kernels.tile.gradients import load_statistics
from flashtile.kernels.tile.schedule import owned_rows


@gluon.jit
def backward_queries_kernel(
    q, k, v, dout, dq_box, dq, statistics, tokens, pages, scores, band, counter, num_programs, num_heads, batch, heads_at_once,
    scale, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    STAGES: gl.constexpr, Q_IN_REGISTERS: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Grid: programs, each of which takes tiles of 128 queries; where ``counter`` is None, the one of its number."""
    D: gl.constexpr = padded_dim(HEAD_DIM)
    DV: gl.constexpr = padded_dim(HEAD_DIM_V)
    q_tiles = allocate_tiles(q, 2, ROWS, ROWS, D)
    dout_tiles = allocate_tiles(dout, 2, ROWS, ROWS, DV)
    k_ring = allocate_tiles(k, STAGES, BLOCK_N, BLOCK_N, D)
    v_ring = allocate_tiles(v, STAGES, BLOCK_N, BLOCK_N, DV)
    notes, known, q_full, q_empty, k_full, k_empty, v_full, v_empty = allocate_exchange(2, STAGES)
    memory = (q_tiles, k_ring, v_ring, notes, known, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    begin_after_last(PDL)
    gl.warp_specialize([
        (sum_over_keys, (dq_box, dq, statistics, tokens, scores, band, batch, num_heads, scale, memory, dout_tiles,
                         0, BLOCK_N, HEAD_DIM, HEAD_DIM_V, STAGES, Q_IN_REGISTERS)),
        (sum_over_keys, (dq_box, dq, statistics, tokens, scores, band, batch, num_heads, scale, memory, dout_tiles,
                         1, BLOCK_N, HEAD_DIM, HEAD_DIM_V, STAGES, Q_IN_REGISTERS)),
        (load_tiles, (q, k, v, dout, tokens, pages, scores, band, counter, num_programs, batch, num_heads, heads_at_once, memory,
                      dout_tiles, 2, GROUP, BLOCK_N, D, DV, 0, STAGES)),
    ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


@gluon.jit
def sum_over_keys(
    dq_box, dq_view, statistics, tokens, scores, band, batch, num_heads, scale, memory, dout_tiles,
    C: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    STAGES: gl.constexpr, Q_IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Consumer C's 64 rows of every tile that the producer brings; the first consumer also clears rows that nobody owns."""
    q_tiles, k_ring, v_ring, notes, known, q_full, q_empty, k_full, k_empty, v_full, v_empty = memory
    ring = (k_ring, v_ring, known, k_full, k_empty, v_full, v_empty)
    D: gl.constexpr = padded_dim(HEAD_DIM)
    R: gl.constexpr = rows_layout(BLOCK_N)
    tiles_done = gl.program_id(0) * 0
    mbarrier.wait(q_full.index(C), 0)
    b, h, row, row_start, seqlen_q, seqlen_k, turn, _ = read_note(notes, tiles_done, C)
    while b >= 0:
        b_rows = b * 0 if tokens.cu_seqlens_q is not None else b
        rows = row + gl.arange(0, ROWS, R)
        lse_log2, row_delta = load_statistics(statistics, b_rows, h, row_start, rows, rows < seqlen_q)
        q = q_tiles[1].index(C)
        if Q_IN_REGISTERS:
            q = q.load(operand_layout(BLOCK_N))
        operands = (q, dout_tiles[1].index(C))
        first, _ = keys_of_sequence(band, seqlen_q, seqlen_k)
        low, high = blocks_of_rows(band, row - C * ROWS, seqlen_q, seqlen_k, 2 * ROWS, BLOCK_N)
        own_low, own_high = blocks_of_rows(band, row, seqlen_q, seqlen_k, ROWS, BLOCK_N)
        own_high = gl.maximum(gl.minimum(own_high, high), low + 1)
        own_low = gl.maximum(gl.minimum(own_low, own_high - 1), low)
        # of a tile's last rows, a warpgroup may have none
        own_low = gl.where(row < seqlen_q, own_low, own_high - 1)
        whole_low, whole_high = whole_blocks(band, row, seqlen_q, seqlen_k, BLOCK_N)
        place = (band, row + seqlen_k - seqlen_q, first, seqlen_k, whole_low, whole_high)
        turn = hand_back(ring, turn, high - own_high, STAGES)

        dq = gl.zeros([ROWS, D], gl.float32, products_layout(D))
        block = own_high - 1
        s, dp = _start_block(operands, ring, tokens, place, block, turn, BLOCK_N, D, STAGES)
        s, dp = warpgroup_mma_wait(0, deps=(s, dp))
        barrier()
        mbarrier.arrive(v_empty.index(turn % STAGES), count=1)
        ds = _gradients_of_scores(s, dp, lse_log2, row_delta, scores, place, block, BLOCK_N)
        operand = gl.convert_layout(ds.to(dq_box.dtype), operand_layout(D))
        for _ in range(block - own_low):
            block -= 1
            last_stage = turn % STAGES
            turn += 1
            s, dp = _start_block(operands, ring, tokens, place, block, turn, BLOCK_N, D, STAGES)
            dq_coming = warpgroup_mma(operand, k_ring[1].index(last_stage), dq, is_async=True)
            s, dp = warpgroup_mma_wait(1, deps=(s, dp))
            barrier()
            mbarrier.arrive(v_empty.index(turn % STAGES), count=1)
            ds = _gradients_of_scores(s, dp, lse_log2, row_delta, scores, place, block, BLOCK_N)
            # these keys are there: to wait for them again ends the basic block, or else the assembler would move the wait for the
            # product with the last ones to the front of the exponentials
            mbarrier.wait(k_full.index(turn % STAGES), (turn // STAGES) & 1)
            dq, ds = warpgroup_mma_wait(0, deps=(dq_coming, ds))
            barrier()
            mbarrier.arrive(k_empty.index(last_stage), count=1)
            operand = gl.convert_layout(ds.to(dq_box.dtype), operand_layout(D))
        stage = turn % STAGES
        dq_coming = warpgroup_mma(operand, k_ring[1].index(stage), dq, is_async=True)
        b, h, row, row_start, seqlen_q, seqlen_k, _, _ = read_note(notes, tiles_done, C)
        low, _ = blocks_of_rows(band, row - C * ROWS, seqlen_q, seqlen_k, 2 * ROWS, BLOCK_N)
        dq = warpgroup_mma_wait(0, deps=(dq_coming,))
        barrier()
        mbarrier.arrive(k_empty.index(stage), count=1)
        hand_back(ring, turn + 1, block - low, STAGES)
        b_rows = b * 0 if tokens.cu_seqlens_q is not None else b
        # all products with q are done: its memory takes their results
        store_gradient(dq_box, dq_view, q_tiles, C, dq * scale, b_rows, row_start, row, seqlen_q, h, HEAD_DIM)
        tma.store_wait(0)
        barrier()
        mbarrier.arrive(q_empty.index(C), count=1)
        tiles_done += 1
        mbarrier.wait(q_full.index(C), tiles_done & 1)
        b, h, row, row_start, seqlen_q, seqlen_k, turn, _ = read_note(notes, tiles_done, C)
    if C == 0 and tokens.cu_seqlens_q is not None:
        clear_gradient(dq_view, owned_rows(tokens, batch), tokens.total_q, num_heads, HEAD_DIM)


@gluon.jit
def _start_block(operands, ring, tokens, place, block, turn, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """(q k^T, dout v^T), both [64, BLOCK_N], of the keys and values in turn ``turn`` of the ring, on their way once these are there."""
    k_ring, v_ring, _, k_full, _, v_full, _ = ring
    band, _, first, seqlen_k, _, _ = place
    stage = turn % STAGES
    phase = (turn // STAGES) & 1
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, products_layout(BLOCK_N))
    mbarrier.wait(k_full.index(stage), phase)
    # of a dense k, what lies behind the last key reads as zero
    if tokens.cu_seqlens_k is not None or tokens.seqused_k is not None or band.left is not None:
        key = block * BLOCK_N
        if (key < first) | (key + BLOCK_N > seqlen_k):
            clear_values(k_ring, stage, key, first, seqlen_k, BLOCK_N, D)
    s = warpgroup_mma(operands[0], k_ring[1].index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(stage), phase)
    dp = warpgroup_mma(operands[1], v_ring[1].index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    return s, dp


@gluon.jit
def _gradients_of_scores(s, dp, lse_log2, delta, scores, place, block, BLOCK_N: gl.constexpr):
    """p (dp - delta), 0 for keys that a row does not see: of those dp may be NaN."""
    band, position, _, seqlen_k, whole_low, whole_high = place
    p = gl.exp2(s * scores.scale_log2 - gl.expand_dims(lse_log2, 1))
    ds = p * (dp - gl.expand_dims(delta, 1))
    if (block < whole_low) | (block >= whole_high):
        ds = gl.where(seen_keys(band, position, block * BLOCK_N, seqlen_k, BLOCK_N), ds, 0.0)
    return ds
