"""A consumer: one warpgroup, 64 rows of each tile, from the first block of keys to the results.

While the softmax of one block is computed, the matrix unit multiplies the probabilities of the block before by its values: the scores
of the next block are asked for first, then that product. Where only a row's first block is cut by an edge of the band, the
loop over the others has no mask.

Source: FlashAttention-3 (Shah et al. 2024), its overlap within a warpgroup.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from flashtile.kernels.gluon.forward_memory import ROWS, main_dim, rest_dim
from flashtile.kernels.gluon.forward_results import store_rows
from flashtile.kernels.gluon.forward_schedule import blocks_of_rows, keys_of_sequence, read_note, whole_blocks
from flashtile.kernels.gluon.forward_scores import (
    clear_values,
    first_softmax,
    masked,
    next_softmax,
    on_pages,
    operand_layout,
    part_of,
    products_layout,
    rescaled_where_grown,
    shaped,
    start_scores,
    start_values,
    wait_for_scores,
    wait_for_values,
)
from flashtile.kernels.gluon.names import barrier
from flashtile.kernels.gluon.results import clear_unowned
from flashtile.kernels.tile.softmax import LOG2E


@gluon.jit
def attend_tiles(
    out_box, out, lse, tokens, scores, band, sinks, batch, num_heads, memory, out_tiles,
    C: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    PAGE_SIZE: gl.constexpr, BOX_ROWS: gl.constexpr, STAGES: gl.constexpr, RESCALE_LOG2: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr, OWN_OUT: gl.constexpr, ONE_EDGE: gl.constexpr,
):  # fmt: skip
    """Consumer C's rows of every tile that the producer brings; the first consumer also clears rows that nobody owns.

    ONE_EDGE: of a row's blocks only the first one is cut by an edge of the band.
    """
    q_tiles, k_ring, v_ring, notes, known, q_full, q_empty, k_full, k_empty, v_full, v_empty = memory
    ring = (k_ring, v_ring, known, k_full, k_empty, v_full, v_empty)
    SHAPED: gl.constexpr = scores.softcap is not None or scores.slopes is not None
    # of a dense k and v, what lies behind the last key reads as zero
    FOREIGN: gl.constexpr = tokens.cu_seqlens_k is not None or tokens.seqused_k is not None
    # a negative scale is in q: maxima want a factor that keeps the order of scores
    scale = gl.maximum(gl.abs(scores.scale_log2), 1e-30)
    factor = 1.0 if SHAPED else scale
    tiles_done = gl.program_id(0) * 0
    mbarrier.wait(q_full.index(C), 0)
    b, h, row, row_start, seqlen_q, seqlen_k, turn, negated = read_note(notes, tiles_done, C)
    while b >= 0:
        q = fetch_rows(q_tiles, C, negated, BLOCK_N, HEAD_DIM, Q_IN_REGISTERS)
        if Q_IN_REGISTERS:
            barrier()
            mbarrier.arrive(q_empty.index(C), count=1)
        slope = 0.0
        if scores.slopes is not None:
            slope = gl.load(scores.slopes + b.to(gl.int64) * scores.slopes_stride_b + h) * LOG2E
        first, _ = keys_of_sequence(band, seqlen_q, seqlen_k)
        place = (row + seqlen_k - seqlen_q, first, seqlen_k, slope, scale, factor)

        low, high = blocks_of_rows(band, row - C * ROWS, seqlen_q, seqlen_k, ROWS * CONSUMERS, BLOCK_N)
        own_low, own_high = blocks_of_rows(band, row, seqlen_q, seqlen_k, ROWS, BLOCK_N)
        own_high = gl.maximum(gl.minimum(own_high, high), low + 1)
        own_low = gl.maximum(gl.minimum(own_low, own_high - 1), low)
        # of a tile's last rows, a warpgroup may have none
        own_low = gl.where(row < seqlen_q, own_low, own_high - 1)
        turn = hand_back(ring, turn, high - own_high, STAGES)

        whole_low, whole_high = whole_blocks(band, row, seqlen_q, seqlen_k, BLOCK_N)
        block = own_high - 1
        o, m, l, p = first_block(
            ring, q, scores, band, place, block, turn, block > own_low, (block < whole_low) | (block >= whole_high),
            FOREIGN, BLOCK_N, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, BOX_ROWS, STAGES,
        )  # fmt: skip
        for _ in range(block - own_low):
            block -= 1
            at_edge = False
            if not ONE_EDGE:
                at_edge = (block < whole_low) | (block >= whole_high)
            o, m, l, p = next_block(
                ring, q, scores, band, place, block, turn, block > own_low, at_edge, o, m, l, p,
                BLOCK_N, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, BOX_ROWS, STAGES, RESCALE_LOG2,
            )  # fmt: skip
            turn += 1
        b, h, row, row_start, seqlen_q, seqlen_k, _, _ = read_note(notes, tiles_done, C)
        if OWN_OUT and not Q_IN_REGISTERS:
            # all products with q are done
            barrier()
            mbarrier.arrive(q_empty.index(C), count=1)
        store_rows(
            out_box, out, lse, tokens, sinks, ring, out_tiles, turn, o, m, l, p, b, h, row, row_start, seqlen_q, factor,
            ROWS * CONSUMERS, BLOCK_N, HEAD_DIM, HEAD_DIM_V, STAGES, OWN_OUT,
        )  # fmt: skip
        low, _ = blocks_of_rows(band, row - C * ROWS, seqlen_q, seqlen_k, ROWS * CONSUMERS, BLOCK_N)
        hand_back(ring, turn + 1, block - low, STAGES)
        if not OWN_OUT:
            # rows of out lie where q's were
            tma.store_wait(0)
            barrier()
            mbarrier.arrive(q_empty.index(C), count=1)
        tiles_done += 1
        mbarrier.wait(q_full.index(C), tiles_done & 1)
        b, h, row, row_start, seqlen_q, seqlen_k, turn, negated = read_note(notes, tiles_done, C)
    if C == 0:
        clear_unowned(out, lse, tokens, batch, num_heads, HEAD_DIM_V, 2 * main_dim(HEAD_DIM_V), 4)
    tma.store_wait(0)


@gluon.jit
def fetch_rows(q_tiles, C: gl.constexpr, negated, BLOCK_N: gl.constexpr, DIM: gl.constexpr, IN_REGISTERS: gl.constexpr):
    """The consumer's rows of q in both parts, as an operand. A negative scale becomes a negated q, which is exact."""
    _, main, _, rest = q_tiles
    if IN_REGISTERS:
        q = main.index(C).load(operand_layout(BLOCK_N))
        if negated > 0:
            q = -q
        q_rest = q
        if rest_dim(DIM) > 0:
            q_rest = part_of(main, rest.index(C), DIM).load(operand_layout(BLOCK_N))
            if negated > 0:
                q_rest = -q_rest
        return q, q_rest
    else:
        if negated > 0:
            _negate(main.index(C))
            if rest_dim(DIM) > 0:
                _negate(rest.index(C))
            fence_async_shared()
            barrier()
        return main.index(C), part_of(main, rest.index(C), DIM) if rest_dim(DIM) > 0 else main.index(C)


@gluon.jit
def _negate(tile):
    BLOCKED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    tile.store(-tile.load(BLOCKED))


@gluon.jit
def hand_back(ring, turn, count, STAGES: gl.constexpr, VALUE_STAGES: gl.constexpr = None):
    """Gives back ``count`` blocks that the tile's other rows need; returns the turn behind them.

    VALUE_STAGES: of the values' ring, where it has another number of stages.
    """
    _, _, _, k_full, k_empty, v_full, v_empty = ring
    V_STAGES: gl.constexpr = STAGES if VALUE_STAGES is None else VALUE_STAGES
    for _ in range(count):
        stage = turn % STAGES
        v_stage = turn % V_STAGES
        mbarrier.wait(k_full.index(stage), (turn // STAGES) & 1)
        mbarrier.wait(v_full.index(v_stage), (turn // V_STAGES) & 1)
        # all warps have seen that the block was there: given back, it may be another one at once
        barrier()
        mbarrier.arrive(k_empty.index(stage), count=1)
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        turn += 1
    return turn


@gluon.jit
def first_block(
    ring, q, scores, band, place, block, turn, more, at_edge, FOREIGN: gl.constexpr,
    BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    PAGE_SIZE: gl.constexpr, BOX_ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """(o, m, l, p) of a tile's first block: the probabilities wait for their product with values.

    FOREIGN: behind the sequence's last key lies something else.
    """
    k_ring, v_ring, known, k_full, k_empty, v_full, v_empty = ring
    position, first, seqlen_k, slope, scale, factor = place
    D: gl.constexpr = main_dim(HEAD_DIM_V)
    R: gl.constexpr = rest_dim(HEAD_DIM_V)
    stage = turn % STAGES
    key = block * BLOCK_N
    mbarrier.wait(k_full.index(stage), (turn // STAGES) & 1)
    s = start_scores(q, k_ring, stage, BLOCK_N, HEAD_DIM)
    s = warpgroup_mma_wait(0, deps=(s,))
    bits = _bits_of_pages(known, stage, PAGE_SIZE)
    barrier()
    mbarrier.arrive(k_empty.index(stage), count=1)
    s = shaped(s, scores, scale, slope, position, key, BLOCK_N)
    if PAGE_SIZE > 0:
        if bits != (1 << (BLOCK_N // BOX_ROWS)) - 1:
            s = on_pages(s, bits, BLOCK_N, BOX_ROWS)
    if at_edge:
        s = masked(s, band, position, key, seqlen_k, BLOCK_N)
    m, l, p = first_softmax(s, factor, BLOCK_N)
    o = gl.zeros([ROWS, D], gl.float32, products_layout(D))
    o_rest = factor
    if R > 0:
        o_rest = gl.zeros([ROWS, R], gl.float32, products_layout(R))
    p = gl.convert_layout(p.to(v_ring[1].dtype), operand_layout(D))
    if FOREIGN or band.left is not None:
        if (key < first) | (key + BLOCK_N > seqlen_k):
            mbarrier.wait(v_full.index(stage), (turn // STAGES) & 1)
            clear_values(v_ring, stage, key, first, seqlen_k, BLOCK_N, HEAD_DIM_V)
    mbarrier.wait(k_full.index((turn + 1) % STAGES), ((turn + 1) // STAGES) & 1, pred=more)
    return (o, o_rest), m, l, p


@gluon.jit
def next_block(
    ring, q, scores, band, place, block, turn, more, at_edge, o, m, l, p,
    BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    PAGE_SIZE: gl.constexpr, BOX_ROWS: gl.constexpr, STAGES: gl.constexpr, RESCALE_LOG2: gl.constexpr,
):  # fmt: skip
    """(o, m, l, p) with another block: its softmax, while the last one's probabilities, of turn ``turn``, meet their values."""
    k_ring, v_ring, known, k_full, k_empty, v_full, v_empty = ring
    position, first, seqlen_k, slope, scale, factor = place
    D: gl.constexpr = main_dim(HEAD_DIM_V)
    last_stage = turn % STAGES
    stage = (turn + 1) % STAGES
    key = block * BLOCK_N
    s_coming = start_scores(q, k_ring, stage, BLOCK_N, HEAD_DIM)
    mbarrier.wait(v_full.index(last_stage), (turn // STAGES) & 1)
    o_coming = start_values(p, v_ring, last_stage, o, HEAD_DIM_V)
    s = wait_for_scores(s_coming, HEAD_DIM_V)
    bits = _bits_of_pages(known, stage, PAGE_SIZE)
    # the compiler takes an asynchronous product's reads for done when it is issued, and might leave out this barrier
    barrier()
    mbarrier.arrive(k_empty.index(stage), count=1)
    s = shaped(s, scores, scale, slope, position, key, BLOCK_N)
    if PAGE_SIZE > 0:
        if bits != (1 << (BLOCK_N // BOX_ROWS)) - 1:
            s = on_pages(s, bits, BLOCK_N, BOX_ROWS)
    if at_edge:
        s = masked(s, band, position, key, seqlen_k, BLOCK_N)
    m, l, p_next, alpha = next_softmax(s, m, l, factor, BLOCK_N, RESCALE_LOG2)
    # rounded before the wait, which keeps pairs in their registers: behind it, the loop would take them apart and swap halves
    p_next = gl.convert_layout(p_next.to(p.dtype), operand_layout(D))
    # to wait here for the next block's keys ends the basic block: the assembler would move the wait for the product with
    # values to the front of the exponentials
    mbarrier.wait(k_full.index((turn + 2) % STAGES), ((turn + 2) // STAGES) & 1, pred=more)
    o, p_next = wait_for_values(o_coming, p_next, HEAD_DIM_V)
    barrier()
    mbarrier.arrive(v_empty.index(last_stage), count=1)
    o = rescaled_where_grown(o, alpha, HEAD_DIM_V)
    if band.left is not None:
        if key < first:
            mbarrier.wait(v_full.index(stage), ((turn + 1) // STAGES) & 1)
            clear_values(v_ring, stage, key, first, seqlen_k, BLOCK_N, HEAD_DIM_V)
    return o, m, l, p_next


@gluon.jit
def _bits_of_pages(known, stage, PAGE_SIZE: gl.constexpr):
    """Which of a block's boxes are pages of the cache, as the producer says."""
    if PAGE_SIZE > 0:
        return gl.max(known.index(stage).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    else:
        return 0
