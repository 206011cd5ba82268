"""The third warpgroup of the backward in one pass: dQ of every block, of both other warpgroups' keys, which the copy engine adds.

Two blocks are on their way at a time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from flashtile.kernels.gluon.backward_load import blocks_of_queries, turned
from flashtile.kernels.gluon.backward_sums import first_block, send_to_sums
from flashtile.kernels.gluon.forward_schedule import read_note
from flashtile.kernels.gluon.forward_scores import operand_layout, products_layout
from flashtile.kernels.gluon.names import barrier


@gluon.jit
def add_for_both(
    sums, sums_box, outgoing, tokens, band, num_heads_kv, memory, exchange,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, STAY: gl.constexpr,
):  # fmt: skip
    """Holds K^T of the tile in registers, and multiplies what the consumers leave of each block of 64 queries by it."""
    k_tiles, _, _, _, _, _, notes, k_full, k_empty, _, _, _, _, _ = memory
    ds_ring, ds_full, ds_empty, k_read = exchange
    tiles_done = gl.program_id(0) * 0
    stage = tiles_done
    phase = tiles_done
    sent = tiles_done
    mbarrier.wait(k_full.index(0), 0)
    b, h, key, _, seqlen_q, seqlen_k, _, begin = read_note(notes, tiles_done, 0)
    while b >= 0:
        slot = tiles_done & 1
        low, high = blocks_of_queries(band, key, seqlen_q, seqlen_k, BLOCK_M)
        # of 64 dims and 64 queries: fewer than 2^31 fill any memory
        head = first_block(sums, tokens, b, h * GROUP, num_heads_kv * GROUP).to(gl.int32)
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
            # the block before the last has left its place
            tma.store_wait(1)
            barrier()
            mbarrier.arrive(ds_empty.index(stage), count=1)
            send_to_sums(sums_box, head + block, outgoing.index(sent & 1), dq)
            sent += 1
            stage, phase = turned(stage, phase, STAGES)
            block += 1
            if block == high:
                block = low
            if GROUP > 1:
                if block == begin:
                    head += sums.blocks
        if STAY:
            barrier()
            mbarrier.arrive(k_empty.index(slot), count=1)
            tiles_done += 1
            mbarrier.wait(k_full.index(tiles_done & 1), (tiles_done >> 1) & 1)
            b, h, key, _, seqlen_q, seqlen_k, _, begin = read_note(notes, tiles_done, 0)
        else:
            b = b * 0 - 1
    tma.store_wait(0)
