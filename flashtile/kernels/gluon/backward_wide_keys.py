"""The keys' pass of wide heads: dK and dV of 64 keys a tile, of which one warpgroup sums all of dV and another all of dK.

The registers of one warpgroup hold 64 rows of 256 dims once. So the first computes scores and probabilities, which are dV's operand as
they lie in its registers, and leaves the probabilities in shared memory; the second computes their gradients, and from both those of
the scores, dK's operand. Each needs only the keys or only the values, of which it holds up to 128 dims in registers, since products read
shared memory about as fast as it can be read; its results take their memory. The first asks for a block's
scores before the last block's dV, so that exponentials are computed beside products; the second for the last block's dK before the
next block's gradients of probabilities, so that queries are given back early.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from flashtile.kernels.gluon.backward_keys import clear_foreign, of_seen_keys
from flashtile.kernels.gluon.backward_load import blocks_of_queries, turned
from flashtile.kernels.gluon.backward_results import clear_gradient
from flashtile.kernels.gluon.backward_wide_load import load_wide_keys_and_queries
from flashtile.kernels.gluon.backward_wide_operands import load_operand, products_over, start_products
from flashtile.kernels.gluon.backward_wide_parts import products_of, store_parts, wait_for_parts, widest, zero_parts
from flashtile.kernels.gluon.chain import begin_after_last
from flashtile.kernels.gluon.forward_memory import NOTE, ROWS, allocate_barriers, allocate_tiles, main_dim, rest_dim
from flashtile.kernels.gluon.forward_schedule import read_note, whole_blocks
from flashtile.kernels.gluon.forward_scores import operand_layout, products_layout, seen_keys, start_values
from flashtile.kernels.gluon.names import barrier
from flashtile.kernels.tile.schedule import owned_rows

_HANDOVERS = gl.constexpr(2)  # blocks of probabilities in shared memory


@gluon.jit
def backward_wide_keys_kernel(
    q, k, v, dout, dk_box, dv_box, dk, dv, statistics, tokens, keys, band, counter, num_programs, num_heads_kv, batch, heads_at_once,
    scale, scale_log2, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Grid: programs, each of which takes tiles of 64 keys; where ``counter`` is None, the one of its number.

    ``band`` is seen from the keys (Band.transposed), and so is ``keys``: a TokensView with keys in the place of queries.
    """
    k_tile = allocate_tiles(k, 1, ROWS, ROWS, widest(HEAD_DIM, HEAD_DIM_V))
    v_tile = allocate_tiles(v, 1, ROWS, ROWS, widest(HEAD_DIM, HEAD_DIM_V))
    q_ring = allocate_tiles(q, STAGES, BLOCK_M, BLOCK_M, HEAD_DIM)
    dout_ring = allocate_tiles(dout, STAGES, BLOCK_M, BLOCK_M, HEAD_DIM_V)
    # a row's chunks of 32 bytes change places, so that rows of a warp lie in different banks
    p_ring = gl.allocate_shared_memory(gl.float32, [_HANDOVERS, ROWS, BLOCK_M], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], FLAT)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], FLAT)
    notes = gl.allocate_shared_memory(gl.int32, [2, NOTE], mbarrier.MBarrierLayout())
    of_k = allocate_barriers(1, 1), allocate_barriers(1, 1)
    of_v = allocate_barriers(1, 1), allocate_barriers(1, 1)
    rings = allocate_barriers(STAGES, 1), allocate_barriers(STAGES, 2), allocate_barriers(STAGES, 1), allocate_barriers(STAGES, 2)
    handed = allocate_barriers(_HANDOVERS, 1), allocate_barriers(_HANDOVERS, 1)
    fence_async_shared()
    memory = (k_tile, v_tile, q_ring, dout_ring, lse_ring, delta_ring, notes, of_k, of_v, rings)
    memory_of_dv = (k_tile, q_ring, dout_ring, lse_ring, p_ring, notes, of_k, rings, handed)
    memory_of_dk = (v_tile, q_ring, dout_ring, delta_ring, p_ring, notes, of_v, rings, handed)
    begin_after_last(PDL)
    gl.warp_specialize([
        (sum_values, (dv_box, dv, tokens, keys, band, batch, num_heads_kv, scale_log2, memory_of_dv,
                      GROUP, BLOCK_M, HEAD_DIM, HEAD_DIM_V, STAGES)),
        (sum_keys, (dk_box, dk, tokens, keys, band, batch, num_heads_kv, scale, memory_of_dk,
                    GROUP, BLOCK_M, HEAD_DIM, HEAD_DIM_V, STAGES)),
        (load_wide_keys_and_queries, (q, k, v, dout, statistics, tokens, keys, band, counter, num_programs, batch, num_heads_kv,
                                      heads_at_once, memory, GROUP, BLOCK_M, HEAD_DIM, HEAD_DIM_V, STAGES)),
    ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


@gluon.jit
def sum_values(
    dv_box, dv_view, tokens, keys, band, batch, num_heads_kv, scale_log2, memory,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dV of every tile that the producer brings, and probabilities for the other consumer; clears dV of keys that nobody owns."""
    k_tile, q_ring, dout_ring, lse_ring, p_ring, notes, of_k, rings, handed = memory
    k_full, k_empty = of_k
    q_full, q_empty, dout_full, dout_empty = rings
    of_queries = (q_ring, q_full)
    of_lse = (lse_ring, q_empty)
    tiles_done = gl.program_id(0) * 0
    stage = tiles_done
    phase = tiles_done
    turn = tiles_done
    mbarrier.wait(k_full.index(0), 0)
    b, h, key, key_start, seqlen_q, seqlen_k, stored, _ = read_note(notes, tiles_done, 0)
    while b >= 0:
        low, high = blocks_of_queries(band, key, seqlen_q, seqlen_k, BLOCK_M, ROWS)
        whole_low, whole_high = whole_blocks(band, key, seqlen_k, seqlen_q, BLOCK_M)
        place = (band, whole_low, whole_high, notes, tiles_done)
        dv = zero_parts(HEAD_DIM_V)
        k = load_operand(k_tile, BLOCK_M, HEAD_DIM)
        block = low
        s = _start_scores(k, of_queries, tokens, stage, phase, block, place, BLOCK_M, HEAD_DIM)
        p = _probabilities(s, of_lse, stage, block, place, scale_log2, 0, BLOCK_M)
        _hand_over(p, p_ring, handed, turn)
        turn += 1
        operand = gl.convert_layout(p.to(dv_box.dtype), operand_layout(main_dim(HEAD_DIM_V)))
        for _ in range(GROUP * (high - low) - 1):
            next_stage, next_phase = turned(stage, phase, STAGES)
            next_block = block + 1
            if next_block == high:
                next_block = low
            s = _start_scores(k, of_queries, tokens, next_stage, next_phase, next_block, place, BLOCK_M, HEAD_DIM)
            mbarrier.wait(dout_full.index(stage), phase)
            clear_foreign(dout_ring, tokens, stage, block, place, 0, BLOCK_M, HEAD_DIM_V)
            dv_coming = start_values(operand, dout_ring, stage, dv, HEAD_DIM_V)
            p = _probabilities(s, of_lse, next_stage, next_block, place, scale_log2, products_of(HEAD_DIM_V), BLOCK_M)
            _hand_over(p, p_ring, handed, turn)
            turn += 1
            dv = wait_for_parts(dv_coming, 0, HEAD_DIM_V)
            barrier()
            mbarrier.arrive(dout_empty.index(stage), count=1)
            operand = gl.convert_layout(p.to(dv_box.dtype), operand_layout(main_dim(HEAD_DIM_V)))
            stage = next_stage
            phase = next_phase
            block = next_block
        mbarrier.wait(dout_full.index(stage), phase)
        clear_foreign(dout_ring, tokens, stage, block, place, 0, BLOCK_M, HEAD_DIM_V)
        dv = wait_for_parts(start_values(operand, dout_ring, stage, dv, HEAD_DIM_V), 0, HEAD_DIM_V)
        barrier()
        mbarrier.arrive(dout_empty.index(stage), count=1)
        stage, phase = turned(stage, phase, STAGES)

        dv = _parts_of_seen_keys(dv, notes, tiles_done, band, HEAD_DIM_V)
        _store(dv_box, dv_view, k_tile, dv, notes, tiles_done, tokens, HEAD_DIM_V)
        tma.store_wait(0)
        barrier()
        mbarrier.arrive(k_empty.index(0), count=1)
        tiles_done += 1
        mbarrier.wait(k_full.index(0), tiles_done & 1)
        b, h, key, key_start, seqlen_q, seqlen_k, stored, _ = read_note(notes, tiles_done, 0)
    if tokens.cu_seqlens_k is not None:
        clear_gradient(dv_view, owned_rows(keys, batch), keys.total_q, num_heads_kv, HEAD_DIM_V)


@gluon.jit
def sum_keys(
    dk_box, dk_view, tokens, keys, band, batch, num_heads_kv, scale, memory,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dK of every tile that the producer brings; clears dK of keys that nobody owns."""
    v_tile, q_ring, dout_ring, delta_ring, p_ring, notes, of_v, rings, handed = memory
    v_full, v_empty = of_v
    q_full, q_empty, dout_full, dout_empty = rings
    of_dout = (delta_ring, dout_empty, p_ring, handed)
    tiles_done = gl.program_id(0) * 0
    stage = tiles_done
    phase = tiles_done
    turn = tiles_done
    mbarrier.wait(v_full.index(0), 0)
    b, h, key, key_start, seqlen_q, seqlen_k, stored, _ = read_note(notes, tiles_done, 0)
    while b >= 0:
        low, high = blocks_of_queries(band, key, seqlen_q, seqlen_k, BLOCK_M, ROWS)
        whole_low, whole_high = whole_blocks(band, key, seqlen_k, seqlen_q, BLOCK_M)
        place = (band, whole_low, whole_high, notes, tiles_done)
        dk = zero_parts(HEAD_DIM)
        v = load_operand(v_tile, BLOCK_M, HEAD_DIM_V)
        block = low
        mbarrier.wait(dout_full.index(stage), phase)
        clear_foreign(dout_ring, tokens, stage, block, place, 0, BLOCK_M, HEAD_DIM_V)
        dp = start_products(v, dout_ring, stage, BLOCK_M, HEAD_DIM_V)
        ds = _gradients_of_scores(dp, of_dout, stage, turn, BLOCK_M)
        turn += 1
        operand = gl.convert_layout(ds.to(dk_box.dtype), operand_layout(main_dim(HEAD_DIM)))
        for _ in range(GROUP * (high - low) - 1):
            # these queries' probabilities are there: so the queries are, cleared of foreign ones
            dk_coming = start_values(operand, q_ring, stage, dk, HEAD_DIM)
            next_stage, next_phase = turned(stage, phase, STAGES)
            block += 1
            if block == high:
                block = low
            mbarrier.wait(dout_full.index(next_stage), next_phase)
            clear_foreign(dout_ring, tokens, next_stage, block, place, 0, BLOCK_M, HEAD_DIM_V)
            dp = start_products(v, dout_ring, next_stage, BLOCK_M, HEAD_DIM_V)
            dk = wait_for_parts(dk_coming, products_over(HEAD_DIM_V), HEAD_DIM)
            barrier()
            mbarrier.arrive(q_empty.index(stage), count=1)
            stage = next_stage
            phase = next_phase
            ds = _gradients_of_scores(dp, of_dout, stage, turn, BLOCK_M)
            turn += 1
            operand = gl.convert_layout(ds.to(dk_box.dtype), operand_layout(main_dim(HEAD_DIM)))
        dk = wait_for_parts(start_values(operand, q_ring, stage, dk, HEAD_DIM), 0, HEAD_DIM)
        barrier()
        mbarrier.arrive(q_empty.index(stage), count=1)
        stage, phase = turned(stage, phase, STAGES)

        if rest_dim(HEAD_DIM) > 0:
            dk = dk[0] * scale, dk[1] * scale
        else:
            dk = dk[0] * scale, dk[1]
        dk = _parts_of_seen_keys(dk, notes, tiles_done, band, HEAD_DIM)
        _store(dk_box, dk_view, v_tile, dk, notes, tiles_done, tokens, HEAD_DIM)
        tma.store_wait(0)
        barrier()
        mbarrier.arrive(v_empty.index(0), count=1)
        tiles_done += 1
        mbarrier.wait(v_full.index(0), tiles_done & 1)
        b, h, key, key_start, seqlen_q, seqlen_k, stored, _ = read_note(notes, tiles_done, 0)
    if tokens.cu_seqlens_k is not None:
        clear_gradient(dk_view, owned_rows(keys, batch), keys.total_q, num_heads_kv, HEAD_DIM)


@gluon.jit
def _start_scores(k, of_queries, tokens, stage, phase, block, place, BLOCK_M: gl.constexpr, DIM: gl.constexpr):
    """k q^T [64, BLOCK_M] of the queries in a stage of the ring, on its way once they are there."""
    q_ring, q_full = of_queries
    mbarrier.wait(q_full.index(stage), phase)
    clear_foreign(q_ring, tokens, stage, block, place, 0, BLOCK_M, DIM)
    return start_products(k, q_ring, stage, BLOCK_M, DIM)


@gluon.jit
def _probabilities(s, of_lse, stage, block, place, scale_log2, AFTER: gl.constexpr, BLOCK_M: gl.constexpr):
    """Probabilities [64, BLOCK_M] of scores on their way, behind which AFTER products were started; gives the queries back."""
    lse_ring, q_empty = of_lse
    band, whole_low, whole_high, notes, tiles_done = place
    s = warpgroup_mma_wait(AFTER, deps=(s,))
    lse_log2 = lse_ring.index(stage).load(gl.SliceLayout(0, products_layout(BLOCK_M)))
    barrier()
    mbarrier.arrive(q_empty.index(stage), count=1)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(lse_log2, 0))
    if (block < whole_low) | (block >= whole_high):
        # read again, so that the other blocks' registers need not hold it
        _, _, key, _, seqlen_q, seqlen_k, _, _ = read_note(notes, tiles_done, 0)
        p = gl.where(seen_keys(band, key + seqlen_q - seqlen_k, block * BLOCK_M, seqlen_q, BLOCK_M), p, 0.0)
    return p


@gluon.jit
def _hand_over(p, p_ring, handed, turn):
    """Leaves the probabilities of turn ``turn`` for the other consumer once their place is free."""
    p_full, p_empty = handed
    mbarrier.wait(p_empty.index(turn % _HANDOVERS), ((turn // _HANDOVERS) & 1) ^ 1)
    p_ring.index(turn % _HANDOVERS).store(p)
    barrier()
    mbarrier.arrive(p_full.index(turn % _HANDOVERS), count=1)


@gluon.jit
def _gradients_of_scores(dp, of_dout, stage, turn, BLOCK_M: gl.constexpr):
    """p (dp - delta) of gradients on their way and the probabilities of turn ``turn``; gives dout and these back."""
    delta_ring, dout_empty, p_ring, handed = of_dout
    p_full, p_empty = handed
    dp = warpgroup_mma_wait(0, deps=(dp,))
    delta = delta_ring.index(stage).load(gl.SliceLayout(0, products_layout(BLOCK_M)))
    barrier()
    mbarrier.arrive(dout_empty.index(stage), count=1)
    dp = dp - gl.expand_dims(delta, 0)
    mbarrier.wait(p_full.index(turn % _HANDOVERS), (turn // _HANDOVERS) & 1)
    p = p_ring.index(turn % _HANDOVERS).load(products_layout(BLOCK_M))
    barrier()
    mbarrier.arrive(p_empty.index(turn % _HANDOVERS), count=1)
    return p * dp


@gluon.jit
def _parts_of_seen_keys(x, notes, tiles_done, band, DIM: gl.constexpr):
    """Both parts of a gradient of the tile's keys: 0 for those that do not count or that no query sees."""
    _, _, key, _, seqlen_q, seqlen_k, _, _ = read_note(notes, tiles_done, 0)
    main = of_seen_keys(x[0], band, key, seqlen_q, seqlen_k)
    if rest_dim(DIM) > 0:
        return main, of_seen_keys(x[1], band, key, seqlen_q, seqlen_k)
    else:
        return main, x[1]


@gluon.jit
def _store(box, view, tile, x, notes, tiles_done, tokens, DIM: gl.constexpr):
    """Stores both parts of a gradient of the tile's keys through a tile of shared memory; it may not have left that yet."""
    b, h, key, key_start, _, _, stored, _ = read_note(notes, tiles_done, 0)
    b_keys = b * 0 if tokens.cu_seqlens_k is not None else b
    store_parts(box, view, tile, 0, x, b_keys, key_start, key, stored, h, DIM)
