"""The keys' pass: dK and dV of 128 keys a tile, two warpgroups of 64 keys each, over all queries that see them.

Scores are computed with the keys as rows: then probabilities and their gradients, once rounded, are operands of dV and dK as they
lie in registers, and nothing goes through shared memory. The queries of all heads that share the keys are walked one head after
another, so that the sum over heads is made where dK and dV are. A block's scores are asked for while the last one's dK is computed.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from flashtile.kernels.gluon.backward_load import blocks_of_queries, load_keys_and_queries, turned
from flashtile.kernels.gluon.backward_results import clear_gradient, padded_dim, store_gradient
from flashtile.kernels.gluon.chain import begin_after_last
from flashtile.kernels.gluon.forward_memory import NOTE, ROWS, allocate_barriers, allocate_tiles
from flashtile.kernels.gluon.forward_schedule import read_note, whole_blocks
from flashtile.kernels.gluon.forward_scores import clear_values, operand_layout, products_layout, seen_keys
from flashtile.kernels.gluon.names import barrier
from flashtile.kernels.tile.band import visible_keys
from flashtile.kernels.tile.schedule import owned_rows


@gluon.jit
def backward_keys_kernel(
    q, k, v, dout, dk_box, dv_box, dk, dv, statistics, tokens, keys, band, counter, num_programs, num_heads_kv, batch, heads_at_once,
    scale, scale_log2, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Grid: programs, each of which takes tiles of 128 keys; where ``counter`` is None, the one of its number.

    ``band`` is seen from the keys (Band.transposed), and so is ``keys``: a TokensView with keys in the place of queries.
    """
    D: gl.constexpr = padded_dim(HEAD_DIM)
    DV: gl.constexpr = padded_dim(HEAD_DIM_V)
    k_tiles = allocate_tiles(k, 4, ROWS, ROWS, D)
    v_tiles = allocate_tiles(v, 4, ROWS, ROWS, DV)
    q_ring = allocate_tiles(q, STAGES, BLOCK_M, BLOCK_M, D)
    dout_ring = allocate_tiles(dout, STAGES, BLOCK_M, BLOCK_M, DV)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], FLAT)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], FLAT)
    notes = gl.allocate_shared_memory(gl.int32, [4, NOTE], mbarrier.MBarrierLayout())
    k_full = allocate_barriers(2, 1)
    k_empty = allocate_barriers(2, 2)
    v_full = allocate_barriers(2, 1)
    q_full = allocate_barriers(STAGES, 2)
    q_empty = allocate_barriers(STAGES, 2)
    dout_full = allocate_barriers(STAGES, 1)
    dout_empty = allocate_barriers(STAGES, 2)
    fence_async_shared()
    memory = (
        k_tiles, v_tiles, q_ring, dout_ring, lse_ring, delta_ring, notes, k_full, k_empty, v_full, q_full, q_empty, dout_full, dout_empty
    )  # fmt: skip
    begin_after_last(PDL)
    gl.warp_specialize([
        (sum_over_queries, (dk_box, dv_box, dk, dv, tokens, keys, band, batch, num_heads_kv, scale, scale_log2, memory,
                            0, GROUP, BLOCK_M, HEAD_DIM, HEAD_DIM_V, STAGES)),
        (sum_over_queries, (dk_box, dv_box, dk, dv, tokens, keys, band, batch, num_heads_kv, scale, scale_log2, memory,
                            1, GROUP, BLOCK_M, HEAD_DIM, HEAD_DIM_V, STAGES)),
        (load_keys_and_queries, (q, k, v, dout, statistics, tokens, keys, band, counter, num_programs, batch, num_heads_kv, heads_at_once,
                                 memory, GROUP, BLOCK_M, D, DV, STAGES, False, 2)),
    ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


@gluon.jit
def sum_over_queries(
    dk_box, dv_box, dk_view, dv_view, tokens, keys, band, batch, num_heads_kv, scale, scale_log2, memory,
    C: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Consumer C's 64 keys of every tile that the producer brings; the first consumer also clears keys that nobody owns."""
    k_tiles, v_tiles, q_ring, dout_ring, lse_ring, delta_ring, notes, k_full, k_empty, v_full, q_full, q_empty, dout_full, dout_empty = (
        memory
    )
    D: gl.constexpr = padded_dim(HEAD_DIM)
    DV: gl.constexpr = padded_dim(HEAD_DIM_V)
    tiles_done = gl.program_id(0) * 0
    stage = tiles_done
    phase = tiles_done
    mbarrier.wait(k_full.index(0), 0)
    b, h, key, key_start, seqlen_q, seqlen_k, stored, _ = read_note(notes, tiles_done, C)
    while b >= 0:
        slot = tiles_done & 1
        k_own = k_tiles[1].index(2 * slot + C)
        v_own = v_tiles[1].index(2 * slot + C)
        low, high = blocks_of_queries(band, key - C * ROWS, seqlen_q, seqlen_k, BLOCK_M)
        whole_low, whole_high = whole_blocks(band, key, seqlen_k, seqlen_q, BLOCK_M)
        place = (band, whole_low, whole_high, notes, tiles_done)
        dk = gl.zeros([ROWS, D], gl.float32, products_layout(D))
        dv = gl.zeros([ROWS, DV], gl.float32, products_layout(DV))
        block = low
        s = start_scores_of_keys(k_own, q_ring, q_full, tokens, stage, phase, block, place, C, BLOCK_M, D)
        if tiles_done > 0:
            # the last tile's results have left what was its keys' and values' memory
            tma.store_wait(0)
            barrier()
            mbarrier.arrive(k_empty.index(slot ^ 1), count=1)
        mbarrier.wait(v_full.index(slot), (tiles_done >> 1) & 1)
        s = warpgroup_mma_wait(0, deps=(s,))
        for _ in range(GROUP * (high - low) - 1):
            dv_coming, ds = add_values(
                s, s, v_own, dout_ring, lse_ring, delta_ring, dout_full, tokens, stage, phase, block, place, scale_log2, dv,
                C, BLOCK_M, D, DV, False, False,
            )  # fmt: skip
            dk_coming = warpgroup_mma(gl.convert_layout(ds, operand_layout(D)), q_ring[1].index(stage), dk, is_async=True)
            # while dv's operand may be in use, its registers are taken: the next scores would not have enough
            dv = warpgroup_mma_wait(1, deps=(dv_coming,))
            barrier()
            mbarrier.arrive(dout_empty.index(stage), count=1)
            next_stage, next_phase = turned(stage, phase, STAGES)
            block += 1
            if block == high:
                block = low
            s = start_scores_of_keys(k_own, q_ring, q_full, tokens, next_stage, next_phase, block, place, C, BLOCK_M, D)
            dk, s = warpgroup_mma_wait(0, deps=(dk_coming, s))
            barrier()
            mbarrier.arrive(q_empty.index(stage), count=1)
            stage = next_stage
            phase = next_phase
        v_own = v_tiles[1].index(2 * slot_anew(notes, tiles_done, C) + C)
        dv_coming, ds = add_values(
            s, s, v_own, dout_ring, lse_ring, delta_ring, dout_full, tokens, stage, phase, block, place, scale_log2, dv,
            C, BLOCK_M, D, DV, False, False,
        )  # fmt: skip
        dk_coming = warpgroup_mma(gl.convert_layout(ds, operand_layout(D)), q_ring[1].index(stage), dk, is_async=True)
        dv, dk = warpgroup_mma_wait(0, deps=(dv_coming, dk_coming))
        barrier()
        mbarrier.arrive(dout_empty.index(stage), count=1)
        mbarrier.arrive(q_empty.index(stage), count=1)
        stage, phase = turned(stage, phase, STAGES)

        b, h, key, key_start, seqlen_q, seqlen_k, stored, _ = read_note(notes, tiles_done, C)
        b_keys = b * 0 if tokens.cu_seqlens_k is not None else b
        slot = tiles_done & 1
        dk = of_seen_keys(dk * scale, band, key, seqlen_q, seqlen_k)
        dv = of_seen_keys(dv, band, key, seqlen_q, seqlen_k)
        store_gradient(dv_box, dv_view, v_tiles, 2 * slot + C, dv, b_keys, key_start, key, stored, h, HEAD_DIM_V)
        store_gradient(dk_box, dk_view, k_tiles, 2 * slot + C, dk, b_keys, key_start, key, stored, h, HEAD_DIM)
        tiles_done += 1
        mbarrier.wait(k_full.index(tiles_done & 1), (tiles_done >> 1) & 1)
        b, h, key, key_start, seqlen_q, seqlen_k, stored, _ = read_note(notes, tiles_done, C)
    if C == 0 and tokens.cu_seqlens_k is not None:
        owned = owned_rows(keys, batch)
        clear_gradient(dk_view, owned, keys.total_q, num_heads_kv, HEAD_DIM)
        clear_gradient(dv_view, owned, keys.total_q, num_heads_kv, HEAD_DIM_V)
    tma.store_wait(0)


@gluon.jit
def slot_anew(notes, tiles_done, C: gl.constexpr):
    """The tile's slot, which is ``tiles_done & 1``, as a number that the assembler cannot tell from another.

    What a loop and the code behind it compute alike of an address, ptxas (12.8) computes once, ahead of the loop, and jumps past that
    where the loop has no step at all: products behind it would read whatever memory the last tile's address says.
    """
    b, _, _, _, _, _, _, _ = read_note(notes, tiles_done, C)
    # a sequence's number has no sign
    return (tiles_done & 1) + (b >> 31)


@gluon.jit
def start_scores_of_keys(
    k_own, q_ring, q_full, tokens, stage, phase, block, place, C: gl.constexpr, BLOCK_M: gl.constexpr, D: gl.constexpr
):  # fmt: skip
    """k q^T [64, BLOCK_M] of the queries in a stage of the ring, on its way once they are there."""
    mbarrier.wait(q_full.index(stage), phase)
    clear_foreign(q_ring, tokens, stage, block, place, C, BLOCK_M, D)
    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, products_layout(BLOCK_M))
    return warpgroup_mma(k_own, q_ring[1].index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def add_values(
    s, lse_log2, v_own, dout_ring, lse_ring, delta_ring, dout_full, tokens, stage, phase, block, place, scale_log2, dv,
    C: gl.constexpr, BLOCK_M: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, KEYS_END: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """(dv plus probabilities times dout, on its way; the scores' gradients, rounded).

    KEYS_END: in blocks that are masked, also keys behind those that count get gradient 0. EARLY: there are registers for what the
    softmax needs of the queries while products run; ``lse_log2`` is read already.
    """
    band, whole_low, whole_high, notes, tiles_done = place
    S: gl.constexpr = products_layout(BLOCK_M)
    mbarrier.wait(dout_full.index(stage), phase)
    clear_foreign(dout_ring, tokens, stage, block, place, C, BLOCK_M, DV)
    dout = dout_ring[1].index(stage)
    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, S)
    dp_coming = warpgroup_mma(v_own, dout.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if not EARLY:
        lse_log2 = lse_ring.index(stage).load(gl.SliceLayout(0, S))
    p = gl.exp2(s * scale_log2 - gl.expand_dims(lse_log2, 0))
    if (block < whole_low) | (block >= whole_high):
        # read again, so that the other blocks' registers need not hold it
        _, _, key, _, seqlen_q, seqlen_k, _, _ = read_note(notes, tiles_done, C)
        seen = seen_keys(band, key + seqlen_q - seqlen_k, block * BLOCK_M, seqlen_q, BLOCK_M)
        if KEYS_END:
            seen = seen & gl.expand_dims(key + gl.arange(0, ROWS, gl.SliceLayout(1, S)) < seqlen_k, 1)
        p = gl.where(seen, p, 0.0)
    operand = gl.convert_layout(p.to(dout.dtype), operand_layout(DV))
    dv_coming = warpgroup_mma(operand, dout, dv, is_async=True)
    if EARLY:
        delta = delta_ring.index(stage).load(gl.SliceLayout(0, S))
    dp = warpgroup_mma_wait(1, deps=(dp_coming,))
    if not EARLY:
        delta = delta_ring.index(stage).load(gl.SliceLayout(0, S))
    ds = p * (dp - gl.expand_dims(delta, 0))
    return dv_coming, ds.to(dout.dtype)


@gluon.jit
def clear_foreign(ring, tokens, stage, block, place, C: gl.constexpr, BLOCK_M: gl.constexpr, DIM: gl.constexpr):
    """Of packed queries, what lies behind the sequence's last one becomes zero: 0 x NaN is NaN."""
    if tokens.cu_seqlens_q is not None:
        _, _, whole_high, notes, tiles_done = place
        if block >= whole_high:
            _, _, _, _, seqlen_q, _, _, _ = read_note(notes, tiles_done, C)
            if (block + 1) * BLOCK_M > seqlen_q:
                clear_values(ring, stage, block * BLOCK_M, 0, seqlen_q, BLOCK_M, DIM)


@gluon.jit
def of_seen_keys(x, band, key, seqlen_q, seqlen_k):
    """Rows of x [64, dim] of keys that count and that any query sees; 0 for others, of which nothing else is known."""
    n = key + gl.arange(0, ROWS, gl.SliceLayout(1, x.type.layout))
    lowest, highest = visible_keys(band, n + seqlen_q - seqlen_k, 0, seqlen_q)
    return gl.where(gl.expand_dims((lowest <= highest) & (n < seqlen_k), 1), x, 0.0)
