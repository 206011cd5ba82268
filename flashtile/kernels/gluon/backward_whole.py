"""The backward in one pass: dK and dV of 128 keys a tile as in the keys' pass, and what these keys give to dQ, added in memory.

Gradients of scores go through shared memory, where dQ = dS K finds those of both warpgroups' keys (backward_whole_dq.py). Who computes
it: each of the two warpgroups one half, once both have left their gradients; or, with ADDERS, a third warpgroup that does nothing
else (backward_adders.py), which leaves the other two registers for their keys.

BEHIND: a warpgroup computes its half of a block's dQ among the products of the next block, and so does not stand still until the
other one has come as far.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from flashtile.kernels.gluon.backward_adders import add_for_both
from flashtile.kernels.gluon.backward_keys import add_values, of_seen_keys, start_scores_of_keys
from flashtile.kernels.gluon.backward_load import blocks_of_queries, load_keys_and_queries, turned
from flashtile.kernels.gluon.backward_results import clear_gradient, padded_dim, store_gradient
from flashtile.kernels.gluon.backward_sums import add_to_sums, allocate_outgoing
from flashtile.kernels.gluon.backward_whole_dq import meet, next_block, own_sums_of_head, start_own_dq, turned_back, unhoisted
from flashtile.kernels.gluon.chain import begin_after_last
from flashtile.kernels.gluon.forward_memory import NOTE, ROWS, allocate_barriers, allocate_tiles, tile_layout
from flashtile.kernels.gluon.forward_schedule import read_note, whole_blocks
from flashtile.kernels.gluon.forward_scores import clear_values, operand_layout, products_layout
from flashtile.kernels.gluon.names import barrier
from flashtile.kernels.tile.schedule import owned_rows


@gluon.jit
def backward_whole_kernel(
    q, k, v, dout, dk_box, dv_box, dk, dv, sums, sums_box, statistics, tokens, keys, band, counter, num_programs, num_heads_kv, batch,
    heads_at_once, scale, scale_log2, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    STAGES: gl.constexpr, ADDERS: gl.constexpr, SPARE: gl.constexpr, BEHIND: gl.constexpr, FROM_SHARED: gl.constexpr,
    REGISTERS: gl.constexpr, ADDER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Grid: programs, each of which takes tiles of 128 keys; where ``counter`` is None, the one of its number and no other.

    Where programs stay, the next keys come while results of the last ones leave: with ADDERS into a second place, of the two that
    keys and results share; without, results have a place of their own, for addresses that vary would take too many registers.

    ``band`` is seen from the keys (Band.transposed), and so is ``keys``: a TokensView with keys in the place of queries.
    SPARE: registers are left for keys as operands, and to read what the softmax needs of the queries while products run.
    FROM_SHARED: dK takes gradients of scores from where dQ does.
    """
    D: gl.constexpr = padded_dim(HEAD_DIM)
    DV: gl.constexpr = padded_dim(HEAD_DIM_V)
    STAY: gl.constexpr = counter is not None
    SLOTS: gl.constexpr = 2 if STAY and ADDERS else 1
    STAGGERED: gl.constexpr = band.left is None and band.right is None
    k_tiles = allocate_tiles(k, 2 * SLOTS, ROWS, ROWS, D)
    v_tiles = allocate_tiles(v, 2 * SLOTS, ROWS, ROWS, DV)
    q_ring = allocate_tiles(q, STAGES, BLOCK_M, BLOCK_M, D)
    dout_ring = allocate_tiles(dout, STAGES, BLOCK_M, BLOCK_M, DV)
    ds_ring = gl.allocate_shared_memory(k.dtype, [2 * STAGES, ROWS, BLOCK_M], tile_layout(ROWS, BLOCK_M, k.dtype))
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], FLAT)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], FLAT)
    notes = gl.allocate_shared_memory(gl.int32, [4, NOTE], mbarrier.MBarrierLayout())
    k_full = allocate_barriers(2, 1)
    k_empty = allocate_barriers(2, 3 if ADDERS else 2)
    v_full = allocate_barriers(2, 1)
    q_full = allocate_barriers(STAGES, 2)
    q_empty = allocate_barriers(STAGES, 2)
    dout_full = allocate_barriers(STAGES, 1)
    # with ADDERS queries are given back later than their gradients of out; else both at once, which takes the threads together less often
    dout_empty = q_empty
    if ADDERS:
        dout_empty = allocate_barriers(STAGES, 2)
    ds_full, ds_empty, k_read = q_full, q_full, q_full
    if ADDERS or BEHIND:
        ds_full = allocate_barriers(STAGES, 2)
        ds_empty = allocate_barriers(STAGES, 1 if ADDERS else 2)
    outgoing = ds_ring
    if ADDERS:
        k_read = allocate_barriers(1, 1)
        outgoing = allocate_outgoing(sums_box, 2)
    dk_tiles, dv_tiles = k_tiles, v_tiles
    if STAY and not ADDERS:
        dk_tiles = allocate_tiles(k, 2, ROWS, ROWS, D)
        dv_tiles = allocate_tiles(v, 2, ROWS, ROWS, DV)
    fence_async_shared()
    memory = (
        k_tiles, v_tiles, q_ring, dout_ring, lse_ring, delta_ring, notes, k_full, k_empty, v_full, q_full, q_empty, dout_full, dout_empty
    )  # fmt: skip
    exchange = (ds_ring, ds_full, ds_empty, k_read)
    results = (dk_tiles, dv_tiles)
    begin_after_last(PDL)
    # a program that does not stay is told so by way of a second place for keys, which nobody holds and which has no memory
    # constants are written inside the calls, for a tuple bound to a name makes numbers of them
    if ADDERS:
        gl.warp_specialize([
            (sum_and_add, (dk_box, dv_box, dk, dv, sums, tokens, keys, band, batch, num_heads_kv, scale, scale_log2, memory, exchange,
                           results, 0, GROUP, BLOCK_M, HEAD_DIM, HEAD_DIM_V, STAGES, True, SPARE, BEHIND, FROM_SHARED, SLOTS, STAY)),
            (sum_and_add, (dk_box, dv_box, dk, dv, sums, tokens, keys, band, batch, num_heads_kv, scale, scale_log2, memory, exchange,
                           results, 1, GROUP, BLOCK_M, HEAD_DIM, HEAD_DIM_V, STAGES, True, SPARE, BEHIND, FROM_SHARED, SLOTS, STAY)),
            (add_for_both, (sums, sums_box, outgoing, tokens, band, num_heads_kv, memory, exchange, GROUP, BLOCK_M, D, STAGES, STAY)),
            (load_keys_and_queries, (q, k, v, dout, statistics, tokens, keys, band, counter, num_programs, batch, num_heads_kv,
                                     heads_at_once, memory, GROUP, BLOCK_M, D, DV, STAGES, STAGGERED, 2)),
        ], [4, 4, 1], [REGISTERS, ADDER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (sum_and_add, (dk_box, dv_box, dk, dv, sums, tokens, keys, band, batch, num_heads_kv, scale, scale_log2, memory, exchange,
                           results, 0, GROUP, BLOCK_M, HEAD_DIM, HEAD_DIM_V, STAGES, False, SPARE, BEHIND, FROM_SHARED, SLOTS, STAY)),
            (sum_and_add, (dk_box, dv_box, dk, dv, sums, tokens, keys, band, batch, num_heads_kv, scale, scale_log2, memory, exchange,
                           results, 1, GROUP, BLOCK_M, HEAD_DIM, HEAD_DIM_V, STAGES, False, SPARE, BEHIND, FROM_SHARED, SLOTS, STAY)),
            (load_keys_and_queries, (q, k, v, dout, statistics, tokens, keys, band, counter, num_programs, batch, num_heads_kv,
                                     heads_at_once, memory, GROUP, BLOCK_M, D, DV, STAGES, STAGGERED, 1 if STAY else 2)),
        ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


@gluon.jit
def sum_and_add(
    dk_box, dv_box, dk_view, dv_view, sums, tokens, keys, band, batch, num_heads_kv, scale, scale_log2, memory, exchange, results,
    C: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr, STAGES: gl.constexpr,
    ADDERS: gl.constexpr, SPARE: gl.constexpr, BEHIND: gl.constexpr, FROM_SHARED: gl.constexpr, SLOTS: gl.constexpr, STAY: gl.constexpr,
):  # fmt: skip
    """Consumer C's 64 keys of every tile that the producer brings; without ADDERS also its half of dQ."""
    k_tiles, v_tiles, q_ring, dout_ring, lse_ring, delta_ring, notes, k_full, k_empty, v_full, q_full, q_empty, dout_full, dout_empty = (
        memory
    )
    ds_ring, ds_full, ds_empty, k_read = exchange
    dk_tiles, dv_tiles = results
    D: gl.constexpr = padded_dim(HEAD_DIM)
    DV: gl.constexpr = padded_dim(HEAD_DIM_V)
    OF_QUERIES: gl.constexpr = gl.SliceLayout(0, products_layout(BLOCK_M))
    tiles_done = gl.program_id(0) * 0
    stage = tiles_done
    phase = tiles_done
    mbarrier.wait(k_full.index(0), 0)
    b, h, key, key_start, seqlen_q, seqlen_k, stored, begin = read_note(notes, tiles_done, C)
    while b >= 0:
        slot = tiles_done & (SLOTS - 1)
        low, high = blocks_of_queries(band, key - C * ROWS, seqlen_q, seqlen_k, BLOCK_M)
        whole_low, whole_high = whole_blocks(band, key, seqlen_k, seqlen_q, BLOCK_M)
        # keys behind the last one must give nothing to dQ
        whole_high = gl.where(key + ROWS > seqlen_k, 0, whole_high)
        place = (band, whole_low, whole_high, notes, tiles_done)
        _clear_unseen(k_tiles, tokens, band, 2 * slot + C, key, seqlen_q, seqlen_k, D)
        own_sums = own_sums_of_head(sums, tokens, b, h, num_heads_kv, C, GROUP, D)
        k_own = k_tiles[1].index(2 * slot + C)
        v_own = v_tiles[1].index(2 * slot + C)
        if SPARE:
            k_own = k_own.load(operand_layout(BLOCK_M))
        dk = gl.zeros([ROWS, D], gl.float32, products_layout(D))
        dv = gl.zeros([ROWS, DV], gl.float32, products_layout(DV))
        block = begin
        s = start_scores_of_keys(k_own, q_ring, q_full, tokens, stage, phase, block, place, C, BLOCK_M, D)
        if SLOTS > 1:
            if tiles_done > 0:
                # the last tile's results have left what was its keys' and values' memory
                tma.store_wait(0)
                barrier()
                mbarrier.arrive(k_empty.index(slot ^ 1), count=1)
        mbarrier.wait(v_full.index(slot), (tiles_done // SLOTS) & 1)
        _clear_unseen(v_tiles, tokens, band, 2 * slot + C, key, seqlen_q, seqlen_k, DV)
        lse_log2 = lse_ring.index(stage).load(OF_QUERIES) if SPARE else s
        s = warpgroup_mma_wait(0, deps=(s,))
        steps = GROUP * (high - low)
        last_sums = own_sums
        for step in range(steps - 1):
            v_own = v_tiles[1].index(2 * unhoisted(slot, block) + C)
            dv_coming, dk_coming, dq_coming = _start_products(
                s, lse_log2, v_own, k_tiles, slot, memory, exchange, tokens, stage, phase, block, place, scale_log2, dk, dv,
                C, BLOCK_M, D, DV, STAGES, ADDERS, SPARE, BEHIND, FROM_SHARED,
            )  # fmt: skip
            # while dv's operand may be in use, its registers are taken: the next scores would not have enough
            if ADDERS:
                dv = warpgroup_mma_wait(1, deps=(dv_coming,))
                barrier()
                mbarrier.arrive(dout_empty.index(stage), count=1)
            else:
                dv, dq = warpgroup_mma_wait(1, deps=(dv_coming, dq_coming))
            block_sums = own_sums + block * (BLOCK_M * D)
            next_stage, next_phase = turned(stage, phase, STAGES)
            block, own_sums = next_block(block, begin, low, high, own_sums, sums, GROUP, D)
            if not SPARE:
                k_own = k_tiles[1].index(2 * unhoisted(slot, block) + C)
            s = start_scores_of_keys(k_own, q_ring, q_full, tokens, next_stage, next_phase, block, place, C, BLOCK_M, D)
            if SPARE:
                lse_log2 = lse_ring.index(next_stage).load(OF_QUERIES)
            # beneath the product, since they keep shared memory from answering
            if BEHIND:
                if step > 0:
                    add_to_sums(last_sums, dq)
                last_sums = block_sums
            elif not ADDERS:
                add_to_sums(block_sums, dq)
            dk, s = warpgroup_mma_wait(0, deps=(dk_coming, s))
            barrier()
            if BEHIND:
                last_stage, _ = turned_back(stage, phase, STAGES)
                mbarrier.arrive(ds_empty.index(last_stage), count=1, pred=step > 0)
            mbarrier.arrive(q_empty.index(stage), count=1)
            stage = next_stage
            phase = next_phase
        v_own = v_tiles[1].index(2 * unhoisted(slot, block) + C)
        dv_coming, dk_coming, dq_coming = _start_products(
            s, lse_log2, v_own, k_tiles, slot, memory, exchange, tokens, stage, phase, block, place, scale_log2, dk, dv,
            C, BLOCK_M, D, DV, STAGES, ADDERS, SPARE, BEHIND, FROM_SHARED,
        )  # fmt: skip
        block_sums = own_sums + block * (BLOCK_M * D)
        if ADDERS:
            dv, dk = warpgroup_mma_wait(0, deps=(dv_coming, dk_coming))
            # what the third warpgroup needs of the keys, it has
            mbarrier.wait(k_read.index(0), tiles_done & 1)
        else:
            dv, dq = warpgroup_mma_wait(1, deps=(dv_coming, dq_coming))
            if BEHIND:
                if steps > 1:
                    add_to_sums(last_sums, dq)
                mbarrier.wait(ds_full.index(stage), phase)
                dq_coming = start_own_dq(k_tiles, ds_ring, unhoisted(slot, block), stage, C, BLOCK_M, D)
                dk, dq = warpgroup_mma_wait(0, deps=(dk_coming, dq_coming))
                add_to_sums(block_sums, dq)
            else:
                add_to_sums(block_sums, dq)
                dk = warpgroup_mma_wait(0, deps=(dk_coming,))
            if not STAY:
                # the other warpgroup has read this one's keys
                meet()
        barrier()
        if BEHIND:
            last_stage, _ = turned_back(stage, phase, STAGES)
            mbarrier.arrive(ds_empty.index(last_stage), count=1, pred=steps > 1)
            mbarrier.arrive(ds_empty.index(stage), count=1)
        if ADDERS:
            mbarrier.arrive(dout_empty.index(stage), count=1)
        elif STAY:
            mbarrier.arrive(k_empty.index(0), count=1)
        mbarrier.arrive(q_empty.index(stage), count=1)
        stage, phase = turned(stage, phase, STAGES)

        b, h, key, key_start, seqlen_q, seqlen_k, stored, _ = read_note(notes, tiles_done, C)
        b_keys = b * 0 if tokens.cu_seqlens_k is not None else b
        dk = of_seen_keys(dk * scale, band, key, seqlen_q, seqlen_k)
        dv = of_seen_keys(dv, band, key, seqlen_q, seqlen_k)
        if STAY and not ADDERS:
            # the last tile's results have left their place
            tma.store_wait(0)
            barrier()
        store_gradient(dv_box, dv_view, dv_tiles, 2 * slot + C, dv, b_keys, key_start, key, stored, h, HEAD_DIM_V)
        store_gradient(dk_box, dk_view, dk_tiles, 2 * slot + C, dk, b_keys, key_start, key, stored, h, HEAD_DIM)
        tiles_done += 1
        if STAY:
            mbarrier.wait(k_full.index(tiles_done & (SLOTS - 1)), (tiles_done // SLOTS) & 1)
            b, h, key, key_start, seqlen_q, seqlen_k, stored, begin = read_note(notes, tiles_done, C)
        else:
            b = b * 0 - 1
    if C == 0 and tokens.cu_seqlens_k is not None:
        owned = owned_rows(keys, batch)
        clear_gradient(dk_view, owned, keys.total_q, num_heads_kv, HEAD_DIM)
        clear_gradient(dv_view, owned, keys.total_q, num_heads_kv, HEAD_DIM_V)
    tma.store_wait(0)


@gluon.jit
def _start_products(
    s, lse_log2, v_own, k_tiles, slot, memory, exchange, tokens, stage, phase, block, place, scale_log2, dk, dv,
    C: gl.constexpr, BLOCK_M: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr, ADDERS: gl.constexpr,
    SPARE: gl.constexpr, BEHIND: gl.constexpr, FROM_SHARED: gl.constexpr,
):  # fmt: skip
    """dV and dK with a block of queries, and without ADDERS this consumer's half of a block's dQ (else dK again), all on their way.

    That block is the one before with BEHIND: the product says nothing with a tile's first block.
    """
    _, _, q_ring, dout_ring, lse_ring, delta_ring, _, _, _, _, _, _, dout_full, _ = memory
    ds_ring, ds_full, ds_empty, _ = exchange
    dv_coming, ds = add_values(
        s, lse_log2, v_own, dout_ring, lse_ring, delta_ring, dout_full, tokens, stage, phase, block, place, scale_log2, dv,
        C, BLOCK_M, D, DV, True, SPARE,
    )  # fmt: skip
    own_ds = ds_ring.index(2 * stage + C)
    if BEHIND:
        last_stage, last_phase = turned_back(stage, phase, STAGES)
        mbarrier.wait(ds_full.index(last_stage), last_phase)
        dq_coming = start_own_dq(k_tiles, ds_ring, unhoisted(slot, block), last_stage, C, BLOCK_M, D)
        dk_coming = warpgroup_mma(gl.convert_layout(ds, operand_layout(D)), q_ring[1].index(stage), dk, is_async=True)
    if ADDERS or BEHIND:
        mbarrier.wait(ds_empty.index(stage), phase ^ 1)
    own_ds.store(ds)
    fence_async_shared()
    if ADDERS or BEHIND:
        barrier()
        mbarrier.arrive(ds_full.index(stage), count=1)
    else:
        meet()
        dq_coming = start_own_dq(k_tiles, ds_ring, unhoisted(slot, block), stage, C, BLOCK_M, D)
    if not BEHIND:
        if FROM_SHARED:
            dk_coming = warpgroup_mma(own_ds, q_ring[1].index(stage), dk, is_async=True)
        else:
            dk_coming = warpgroup_mma(gl.convert_layout(ds, operand_layout(D)), q_ring[1].index(stage), dk, is_async=True)
    if ADDERS:
        return dv_coming, dk_coming, dk_coming
    else:
        return dv_coming, dk_coming, dq_coming


@gluon.jit
def _clear_unseen(tiles, tokens, band, tile, key, seqlen_q, seqlen_k, DIM: gl.constexpr):
    """Rows of keys that no query sees become zero: their gradients are, but 0 x NaN is NaN.

    Behind the last key of a dense tensor zeros are read.
    """
    if tokens.cu_seqlens_k is not None or tokens.seqused_k is not None or band.right is not None:
        first = seqlen_k * 0
        if band.right is not None:
            first = gl.maximum(seqlen_k - seqlen_q - band.right, 0)
        if (key < first) | (key + ROWS > seqlen_k):
            clear_values(tiles, tile, key, first, seqlen_k, ROWS, DIM)
