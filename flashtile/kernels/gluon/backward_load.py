"""The producer of the keys' pass: one warp that finds blocks of keys, and asks for them and for the queries that see them.

q and dout come by the copy engine. What the softmax needs of each query, its lse and its delta, the warp reads itself, since
their rows are not aligned as the copy engine wants them, and puts into shared memory beside q: two arrivals a block of queries.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashtile.kernels.gluon.forward_load import load_box
from flashtile.kernels.gluon.forward_memory import ROWS, bytes_of_tile
from flashtile.kernels.gluon.forward_schedule import blocks_of_rows, tile_numbered, write_note
from flashtile.kernels.gluon.names import barrier
from flashtile.kernels.tile.gradients import load_statistics
from flashtile.kernels.tile.schedule import sequence_rows, stored_keys


@gluon.jit
def load_keys_and_queries(
    q, k, v, dout, statistics, tokens, keys, band, counter, num_programs, batch, num_heads_kv, heads_at_once, memory,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, DIM: gl.constexpr, DIM_V: gl.constexpr, STAGES: gl.constexpr, STAGGERED: gl.constexpr,
    SLOTS: gl.constexpr,
):  # fmt: skip
    """Brings every block of 128 keys that this program takes, and for each query head of their group its blocks of queries.

    SLOTS tiles of keys have barriers of their own, and those that are used have memory. STAGGERED: neighbours among the blocks of keys
    begin at other queries than each other, and come round to the first ones later.
    """
    k_tiles, v_tiles, q_ring, dout_ring, lse_ring, delta_ring, notes, k_full, k_empty, v_full, q_full, q_empty, dout_full, dout_empty = (
        memory
    )
    LAST_FIRST: gl.constexpr = band.right is not None
    BLOCK_N: gl.constexpr = 2 * ROWS
    t = gl.program_id(0)
    stage = t * 0
    phase = t * 0
    tiles_done = t * 0
    b, h, block, walk = tile_numbered(t, keys, batch, num_heads_kv, heads_at_once, (t * 0, t * 0), BLOCK_N, LAST_FIRST)
    while b >= 0:
        key = block * BLOCK_N
        row_start, seqlen_q = sequence_rows(tokens, b)
        key_start, seqlen_k = stored_keys(tokens, b)
        _, stored = sequence_rows(keys, b)
        low, high = blocks_of_queries(band, key, seqlen_q, seqlen_k, BLOCK_M)
        begin = low + block % (high - low) if STAGGERED else low
        b_rows = b * 0 if tokens.cu_seqlens_q is not None else b
        b_keys = b * 0 if tokens.cu_seqlens_k is not None else b
        slot = tiles_done & (SLOTS - 1)
        mbarrier.wait(k_empty.index(slot), ((tiles_done // SLOTS) & 1) ^ 1)
        for c in gl.static_range(2):
            write_note(notes.index(2 * c + (tiles_done & 1)), b, h, key, key_start, seqlen_q, seqlen_k, stored, begin)
        barrier()
        mbarrier.expect(k_full.index(slot), 2 * bytes_of_tile(ROWS, DIM))
        for c in gl.static_range(2):
            load_box(k, k_tiles, k_full.index(slot), 2 * slot + c, b_keys, key_start + key + c * ROWS, h, 0, 1, DIM)
        mbarrier.expect(v_full.index(slot), 2 * bytes_of_tile(ROWS, DIM_V))
        for c in gl.static_range(2):
            load_box(v, v_tiles, v_full.index(slot), 2 * slot + c, b_keys, key_start + key + c * ROWS, h, 0, 1, DIM_V)
        h_q = h * GROUP
        row = begin * BLOCK_M
        for _ in range(GROUP * (high - low)):
            rows = row + gl.arange(0, BLOCK_M, gl.BlockedLayout([1], [32], [1], [0]))
            # asked for before the wait, so that they come meanwhile
            lse_log2, row_delta = load_statistics(statistics, b_rows, h_q, row_start, rows, rows < seqlen_q)
            mbarrier.wait(q_empty.index(stage), phase ^ 1)
            mbarrier.expect(q_full.index(stage), bytes_of_tile(BLOCK_M, DIM))
            load_box(q, q_ring, q_full.index(stage), stage, b_rows, row_start + row, h_q, 0, 1, DIM)
            mbarrier.wait(dout_empty.index(stage), phase ^ 1)
            mbarrier.expect(dout_full.index(stage), bytes_of_tile(BLOCK_M, DIM_V))
            load_box(dout, dout_ring, dout_full.index(stage), stage, b_rows, row_start + row, h_q, 0, 1, DIM_V)
            lse_ring.index(stage).store(lse_log2)
            delta_ring.index(stage).store(row_delta)
            barrier()
            mbarrier.arrive(q_full.index(stage), count=1)
            stage, phase = turned(stage, phase, STAGES)
            row += BLOCK_M
            if row == high * BLOCK_M:
                row = low * BLOCK_M
            if row == begin * BLOCK_M:
                h_q += 1
        # asked for no earlier, so that no tile waits for a program while another has none
        if counter is not None:
            t = num_programs + gl.atomic_add(counter, 1, sem="relaxed")
        else:
            t += num_programs
        tiles_done += 1
        b, h, block, walk = tile_numbered(t, keys, batch, num_heads_kv, heads_at_once, walk, BLOCK_N, LAST_FIRST)
    slot = tiles_done & (SLOTS - 1)
    mbarrier.wait(k_empty.index(slot), ((tiles_done // SLOTS) & 1) ^ 1)
    for c in gl.static_range(2):
        write_note(notes.index(2 * c + (tiles_done & 1)), b, b, b, b, b, b, b, b)
    barrier()
    mbarrier.arrive(k_full.index(slot), count=1)
    if counter is not None:
        # the last program leaves the counter as it found it
        if gl.atomic_add(counter + 1, 1, sem="acq_rel") == num_programs - 1:
            gl.store(counter, 0)
            gl.store(counter + 1, 0)


@gluon.jit
def blocks_of_queries(band, key, seqlen_q, seqlen_k, BLOCK_M: gl.constexpr, NUM_KEYS: gl.constexpr = 128):
    """[low, high) blocks of BLOCK_M queries that any of NUM_KEYS keys is seen by, never none; ``band`` is seen from the keys."""
    low, high = blocks_of_rows(band, key, seqlen_k, seqlen_q, NUM_KEYS, BLOCK_M)
    # a block that there is, also where no query sees a key
    blocks = gl.maximum(gl.cdiv(seqlen_q, BLOCK_M), 1)
    low = gl.minimum(low, blocks - 1)
    # keys behind those that count have a gradient too, which is 0
    return low, gl.where(key < seqlen_k, gl.minimum(high, blocks), low + 1)


@gluon.jit
def turned(stage, phase, STAGES: gl.constexpr):
    """The next stage of a ring, and the parity of its barriers there."""
    if STAGES == 2:
        return stage ^ 1, phase ^ stage
    else:
        wraps = stage == STAGES - 1
        return gl.where(wraps, 0, stage + 1), gl.where(wraps, phase ^ 1, phase)
