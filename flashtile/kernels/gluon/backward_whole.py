"""The backward in one pass: dK and dV of 128 keys a tile as in the keys' pass, and what these keys give to dQ, added in memory.

Gradients of scores go through shared memory, where dQ = dS K finds those of both warpgroups' keys. Of dQ, as of dS, dims or keys are
the rows: dQ^T = K^T dS^T, [64 dims, queries]. Who computes it: each of the two warpgroups one half (of the dims, or of the queries
where a head has 64 dims), behind a barrier between them; or, with ADDERS, a third warpgroup that does nothing else, which leaves
the other two registers for their keys and values.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from flashtile.kernels.gluon.backward_keys import add_values, of_seen_keys, start_scores_of_keys
from flashtile.kernels.gluon.backward_load import blocks_of_queries, load_keys_and_queries, turned
from flashtile.kernels.gluon.backward_results import clear_gradient, padded_dim, store_gradient
from flashtile.kernels.gluon.backward_sums import SUMS_BLOCK, SUMS_SIDE, add_to_sums, sums_of_head
from flashtile.kernels.gluon.chain import begin_after_last
from flashtile.kernels.gluon.forward_memory import NOTE, PANEL, ROWS, allocate_barriers, allocate_tiles, tile_layout
from flashtile.kernels.gluon.forward_schedule import read_note, whole_blocks
from flashtile.kernels.gluon.forward_scores import clear_values, operand_layout, products_layout
from flashtile.kernels.gluon.names import barrier
from flashtile.kernels.tile.schedule import owned_rows


@gluon.jit
def backward_whole_kernel(
    q, k, v, dout, dk_box, dv_box, dk, dv, sums, statistics, tokens, keys, band, counter, num_programs, num_heads_kv, batch, heads_at_once,
    scale, scale_log2, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    STAGES: gl.constexpr, ADDERS: gl.constexpr, VALUES_IN_REGISTERS: gl.constexpr, FROM_SHARED: gl.constexpr,
    REGISTERS: gl.constexpr, ADDER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Grid: programs, each of which takes tiles of 128 keys; where ``counter`` is None, the one of its number and no other.

    ``band`` is seen from the keys (Band.transposed), and so is ``keys``: a TokensView with keys in the place of queries.
    VALUES_IN_REGISTERS: keys and values are operands in registers. FROM_SHARED: dK takes gradients of scores from where dQ does.
    """
    D: gl.constexpr = padded_dim(HEAD_DIM)
    DV: gl.constexpr = padded_dim(HEAD_DIM_V)
    SLOTS: gl.constexpr = 1 if counter is None else 2
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
    q_full = allocate_barriers(STAGES, 1)
    q_empty = allocate_barriers(STAGES, 2)
    dout_full = allocate_barriers(STAGES, 1)
    # with ADDERS queries are given back later than their gradients of out; else both at once, which takes the threads together less often
    dout_empty = q_empty
    if ADDERS:
        dout_empty = allocate_barriers(STAGES, 2)
    ds_full, ds_empty, k_read = q_full, q_full, q_full
    if ADDERS:
        ds_full = allocate_barriers(STAGES, 2)
        ds_empty = allocate_barriers(STAGES, 1)
        k_read = allocate_barriers(1, 1)
    fence_async_shared()
    memory = (
        k_tiles, v_tiles, q_ring, dout_ring, lse_ring, delta_ring, notes, k_full, k_empty, v_full, q_full, q_empty, dout_full, dout_empty
    )  # fmt: skip
    exchange = (ds_ring, ds_full, ds_empty, k_read)
    begin_after_last(PDL)
    # constants are written inside the calls, for a tuple bound to a name makes numbers of them
    if ADDERS:
        gl.warp_specialize([
            (sum_and_add, (dk_box, dv_box, dk, dv, sums, tokens, keys, band, batch, num_heads_kv, scale, scale_log2, memory, exchange,
                           0, GROUP, BLOCK_M, HEAD_DIM, HEAD_DIM_V, STAGES, True, VALUES_IN_REGISTERS, FROM_SHARED, SLOTS)),
            (sum_and_add, (dk_box, dv_box, dk, dv, sums, tokens, keys, band, batch, num_heads_kv, scale, scale_log2, memory, exchange,
                           1, GROUP, BLOCK_M, HEAD_DIM, HEAD_DIM_V, STAGES, True, VALUES_IN_REGISTERS, FROM_SHARED, SLOTS)),
            (add_for_both, (sums, tokens, band, num_heads_kv, memory, exchange, GROUP, BLOCK_M, D, STAGES, SLOTS)),
            (load_keys_and_queries, (q, k, v, dout, statistics, tokens, keys, band, counter, num_programs, batch, num_heads_kv,
                                     heads_at_once, memory, GROUP, BLOCK_M, D, DV, STAGES, STAGGERED)),
        ], [4, 4, 1], [REGISTERS, ADDER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (sum_and_add, (dk_box, dv_box, dk, dv, sums, tokens, keys, band, batch, num_heads_kv, scale, scale_log2, memory, exchange,
                           0, GROUP, BLOCK_M, HEAD_DIM, HEAD_DIM_V, STAGES, False, VALUES_IN_REGISTERS, FROM_SHARED, SLOTS)),
            (sum_and_add, (dk_box, dv_box, dk, dv, sums, tokens, keys, band, batch, num_heads_kv, scale, scale_log2, memory, exchange,
                           1, GROUP, BLOCK_M, HEAD_DIM, HEAD_DIM_V, STAGES, False, VALUES_IN_REGISTERS, FROM_SHARED, SLOTS)),
            (load_keys_and_queries, (q, k, v, dout, statistics, tokens, keys, band, counter, num_programs, batch, num_heads_kv,
                                     heads_at_once, memory, GROUP, BLOCK_M, D, DV, STAGES, STAGGERED)),
        ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


@gluon.jit
def sum_and_add(
    dk_box, dv_box, dk_view, dv_view, sums, tokens, keys, band, batch, num_heads_kv, scale, scale_log2, memory, exchange,
    C: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    STAGES: gl.constexpr, ADDERS: gl.constexpr, VALUES_IN_REGISTERS: gl.constexpr, FROM_SHARED: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Consumer C's 64 keys of every tile that the producer brings; without ADDERS also its half of dQ."""
    k_tiles, v_tiles, q_ring, dout_ring, lse_ring, delta_ring, notes, k_full, k_empty, v_full, q_full, q_empty, dout_full, dout_empty = (
        memory
    )
    ds_ring, ds_full, ds_empty, k_read = exchange
    D: gl.constexpr = padded_dim(HEAD_DIM)
    DV: gl.constexpr = padded_dim(HEAD_DIM_V)
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
        own_sums = _own_sums(sums, tokens, b, h, num_heads_kv, C, GROUP, D)
        k_own = k_tiles[1].index(2 * slot + C)
        v_own = v_tiles[1].index(2 * slot + C)
        if VALUES_IN_REGISTERS:
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
        mbarrier.wait(v_full.index(slot), (tiles_done >> 1) & 1)
        _clear_unseen(v_tiles, tokens, band, 2 * slot + C, key, seqlen_q, seqlen_k, DV)
        if VALUES_IN_REGISTERS:
            v_own = v_own.load(operand_layout(BLOCK_M))
        s = warpgroup_mma_wait(0, deps=(s,))
        for _ in range(GROUP * (high - low) - 1):
            if not VALUES_IN_REGISTERS:
                v_own = v_tiles[1].index(2 * _unhoisted(slot, block) + C)
            dv_coming, dk_coming, dq_coming = _start_products(
                s, v_own, k_tiles, slot, memory, exchange, tokens, stage, phase, block, place, scale_log2, dk, dv,
                C, BLOCK_M, D, DV, ADDERS, FROM_SHARED,
            )  # fmt: skip
            # while dv's operand may be in use, its registers are taken: the next scores would not have enough
            if ADDERS:
                dv = warpgroup_mma_wait(1, deps=(dv_coming,))
                barrier()
                mbarrier.arrive(dout_empty.index(stage), count=1)
            else:
                dv, dq = warpgroup_mma_wait(1, deps=(dv_coming, dq_coming))
                add_to_sums(own_sums + block * (BLOCK_M * D), dq)
            next_stage, next_phase = turned(stage, phase, STAGES)
            block, own_sums = _next_block(block, begin, low, high, own_sums, sums, GROUP, D)
            if not VALUES_IN_REGISTERS:
                k_own = k_tiles[1].index(2 * _unhoisted(slot, block) + C)
            s = start_scores_of_keys(k_own, q_ring, q_full, tokens, next_stage, next_phase, block, place, C, BLOCK_M, D)
            dk, s = warpgroup_mma_wait(0, deps=(dk_coming, s))
            barrier()
            mbarrier.arrive(q_empty.index(stage), count=1)
            stage = next_stage
            phase = next_phase
        dv_coming, dk_coming, dq_coming = _start_products(
            s, v_own, k_tiles, slot, memory, exchange, tokens, stage, phase, block, place, scale_log2, dk, dv,
            C, BLOCK_M, D, DV, ADDERS, FROM_SHARED,
        )  # fmt: skip
        if ADDERS:
            dv, dk = warpgroup_mma_wait(0, deps=(dv_coming, dk_coming))
            # what the third warpgroup needs of the keys, it has
            mbarrier.wait(k_read.index(0), tiles_done & 1)
        else:
            dv, dq = warpgroup_mma_wait(1, deps=(dv_coming, dq_coming))
            add_to_sums(own_sums + block * (BLOCK_M * D), dq)
            dk = warpgroup_mma_wait(0, deps=(dk_coming,))
            # the other warpgroup has read this one's keys
            _meet()
        barrier()
        if ADDERS:
            mbarrier.arrive(dout_empty.index(stage), count=1)
        mbarrier.arrive(q_empty.index(stage), count=1)
        stage, phase = turned(stage, phase, STAGES)

        b, h, key, key_start, seqlen_q, seqlen_k, stored, _ = read_note(notes, tiles_done, C)
        b_keys = b * 0 if tokens.cu_seqlens_k is not None else b
        dk = of_seen_keys(dk * scale, band, key, seqlen_q, seqlen_k)
        dv = of_seen_keys(dv, band, key, seqlen_q, seqlen_k)
        store_gradient(dv_box, dv_view, v_tiles, 2 * slot + C, dv, b_keys, key_start, key, stored, h, HEAD_DIM_V)
        store_gradient(dk_box, dk_view, k_tiles, 2 * slot + C, dk, b_keys, key_start, key, stored, h, HEAD_DIM)
        tiles_done += 1
        if SLOTS > 1:
            mbarrier.wait(k_full.index(tiles_done & 1), (tiles_done >> 1) & 1)
            b, h, key, key_start, seqlen_q, seqlen_k, stored, begin = read_note(notes, tiles_done, C)
        else:
            b = b * 0 - 1
    if C == 0 and tokens.cu_seqlens_k is not None:
        owned = owned_rows(keys, batch)
        clear_gradient(dk_view, owned, keys.total_q, num_heads_kv, HEAD_DIM)
        clear_gradient(dv_view, owned, keys.total_q, num_heads_kv, HEAD_DIM_V)
    tma.store_wait(0)


@gluon.jit
def add_for_both(
    sums, tokens, band, num_heads_kv, memory, exchange,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The third warpgroup: K^T of both consumers' keys in registers, and dQ of every block that they leave gradients of."""
    k_tiles, _, _, _, _, _, notes, k_full, k_empty, _, _, _, _, _ = memory
    ds_ring, ds_full, ds_empty, k_read = exchange
    tiles_done = gl.program_id(0) * 0
    stage = tiles_done
    phase = tiles_done
    mbarrier.wait(k_full.index(0), 0)
    b, h, key, _, seqlen_q, seqlen_k, _, begin = read_note(notes, tiles_done, 0)
    while b >= 0:
        slot = tiles_done & (SLOTS - 1)
        low, high = blocks_of_queries(band, key, seqlen_q, seqlen_k, BLOCK_M)
        own_sums = _own_sums(sums, tokens, b, h, num_heads_kv, 0, GROUP, D)
        block = begin
        # the consumers have cleared keys that nobody sees
        mbarrier.wait(ds_full.index(stage), phase)
        first_keys = k_tiles[1].index(2 * slot).permute((1, 0)).load(operand_layout(BLOCK_M))
        last_keys = k_tiles[1].index(2 * slot + 1).permute((1, 0)).load(operand_layout(BLOCK_M))
        barrier()
        mbarrier.arrive(k_read.index(0), count=1)
        for _ in range(GROUP * (high - low)):
            mbarrier.wait(ds_full.index(stage), phase)
            zeros = gl.zeros([D, BLOCK_M], gl.float32, products_layout(BLOCK_M))
            dq = warpgroup_mma(first_keys, ds_ring.index(2 * stage), zeros, use_acc=False, is_async=True)
            dq = warpgroup_mma(last_keys, ds_ring.index(2 * stage + 1), dq, is_async=True)
            dq = warpgroup_mma_wait(0, deps=(dq,))
            barrier()
            mbarrier.arrive(ds_empty.index(stage), count=1)
            add_to_sums(own_sums + block * (BLOCK_M * D), dq)
            stage, phase = turned(stage, phase, STAGES)
            block, own_sums = _next_block(block, begin, low, high, own_sums, sums, GROUP, D)
        if SLOTS > 1:
            barrier()
            mbarrier.arrive(k_empty.index(slot), count=1)
            tiles_done += 1
            mbarrier.wait(k_full.index(tiles_done & 1), (tiles_done >> 1) & 1)
            b, h, key, _, seqlen_q, seqlen_k, _, begin = read_note(notes, tiles_done, 0)
        else:
            b = b * 0 - 1


@gluon.jit
def _start_products(
    s, v_own, k_tiles, slot, memory, exchange, tokens, stage, phase, block, place, scale_log2, dk, dv,
    C: gl.constexpr, BLOCK_M: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, ADDERS: gl.constexpr, FROM_SHARED: gl.constexpr,
):  # fmt: skip
    """dV and dK with a block of queries, and without ADDERS this consumer's half of their dQ (else dK again), all on their way."""
    _, _, q_ring, dout_ring, lse_ring, delta_ring, _, _, _, _, _, _, dout_full, _ = memory
    ds_ring, ds_full, ds_empty, _ = exchange
    dv_coming, ds = add_values(
        s, v_own, dout_ring, lse_ring, delta_ring, dout_full, tokens, stage, phase, block, place, scale_log2, dv, C, BLOCK_M, D, DV, True
    )
    own_ds = ds_ring.index(2 * stage + C)
    if ADDERS:
        mbarrier.wait(ds_empty.index(stage), phase ^ 1)
    own_ds.store(ds)
    fence_async_shared()
    if ADDERS:
        barrier()
        mbarrier.arrive(ds_full.index(stage), count=1)
    else:
        _meet()
        dq_coming = _start_own_dq(k_tiles, ds_ring, _unhoisted(slot, block), stage, C, BLOCK_M, D)
    if FROM_SHARED:
        dk_coming = warpgroup_mma(own_ds, q_ring[1].index(stage), dk, is_async=True)
    else:
        dk_coming = warpgroup_mma(gl.convert_layout(ds, operand_layout(D)), q_ring[1].index(stage), dk, is_async=True)
    if ADDERS:
        return dv_coming, dk_coming, dk_coming
    else:
        return dv_coming, dk_coming, dq_coming


@gluon.jit
def _start_own_dq(k_tiles, ds_ring, slot, stage, C: gl.constexpr, BLOCK_M: gl.constexpr, D: gl.constexpr):
    """Consumer C's half of dQ^T [64 dims, 64 queries] of a block, on its way: a panel of dims, or half of the queries."""
    gl.static_assert(D * BLOCK_M == 2 * SUMS_BLOCK)
    dq = gl.zeros([PANEL, SUMS_SIDE], gl.float32, products_layout(SUMS_SIDE))
    for c in gl.static_range(2):
        keys = k_tiles[1].index(2 * slot + c)
        ds = ds_ring.index(2 * stage + c)
        if D > PANEL:
            keys = keys.slice(C * PANEL, PANEL, dim=1)
        else:
            ds = ds.slice(C * SUMS_SIDE, SUMS_SIDE, dim=1)
        dq = warpgroup_mma(keys.permute((1, 0)), ds, dq, use_acc=c > 0, is_async=True)
    return dq


@gluon.jit
def _unhoisted(slot, block):
    """``slot``, which no compiler knows to be the same in the next turn of a loop: what is computed from it takes no registers there."""
    return slot + (block >> 30)


@gluon.jit
def _own_sums(sums, tokens, b, h, num_heads_kv, C: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr):
    """Where this consumer's blocks of the group's first query head begin: every second one, or all if there is one."""
    return sums_of_head(sums, tokens, b, h * GROUP, num_heads_kv * GROUP, D // PANEL) + C * SUMS_BLOCK


@gluon.jit
def _next_block(block, begin, low, high, own_sums, sums, GROUP: gl.constexpr, D: gl.constexpr):
    """The next block of queries, and where its head's sums begin: behind the last block the first, behind all the next head's."""
    block += 1
    if block == high:
        block = low
    if GROUP > 1:
        if block == begin:
            own_sums += sums.blocks.to(gl.int64) * (D * SUMS_SIDE)
    return block, own_sums


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


@gluon.jit
def _meet():
    """Waits for the other consumer: a barrier of 256 threads, by a number that the compiler does not use."""
    lane = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    gl.inline_asm_elementwise("bar.sync 8, 256; mov.u32 $0, $1;", "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1)
