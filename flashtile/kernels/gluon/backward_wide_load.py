"""The producer of the wide keys' pass: one warp that brings 64 keys of a tile, their values, and the queries that see them.

A tile's first queries are asked for before its keys: their memory is free when the last tile's results still are on their way out.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashtile.kernels.gluon.backward_load import blocks_of_queries, turned
from flashtile.kernels.gluon.backward_wide_parts import load_parts
from flashtile.kernels.gluon.forward_memory import ROWS, bytes_of_tile
from flashtile.kernels.gluon.forward_schedule import tile_numbered, write_note
from flashtile.kernels.gluon.names import barrier
from flashtile.kernels.tile.gradients import load_statistics
from flashtile.kernels.tile.schedule import sequence_rows, stored_keys


@gluon.jit
def load_wide_keys_and_queries(
    q, k, v, dout, statistics, tokens, keys, band, counter, num_programs, batch, num_heads_kv, heads_at_once, memory,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, DIM: gl.constexpr, DIM_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Brings every block of 64 keys that this program takes, and for each query head of their group its blocks of queries."""
    k_tile, v_tile, q_ring, dout_ring, lse_ring, delta_ring, notes, of_k, of_v, rings = memory
    k_full, k_empty = of_k
    v_full, v_empty = of_v
    q_full, q_empty, dout_full, dout_empty = rings
    LAST_FIRST: gl.constexpr = band.right is not None
    t = gl.program_id(0)
    stage = t * 0
    phase = t * 0
    tiles_done = t * 0
    b, h, block, walk = tile_numbered(t, keys, batch, num_heads_kv, heads_at_once, (t * 0, t * 0), ROWS, LAST_FIRST)
    while b >= 0:
        key = block * ROWS
        row_start, seqlen_q = sequence_rows(tokens, b)
        key_start, seqlen_k = stored_keys(tokens, b)
        _, stored = sequence_rows(keys, b)
        low, high = blocks_of_queries(band, key, seqlen_q, seqlen_k, BLOCK_M, ROWS)
        b_rows = b * 0 if tokens.cu_seqlens_q is not None else b
        b_keys = b * 0 if tokens.cu_seqlens_k is not None else b
        h_q = h * GROUP
        row = low * BLOCK_M
        for i in range(GROUP * (high - low)):
            rows = row + gl.arange(0, BLOCK_M, gl.BlockedLayout([1], [32], [1], [0]))
            # asked for before the wait, so that they come meanwhile
            lse_log2, row_delta = load_statistics(statistics, b_rows, h_q, row_start, rows, rows < seqlen_q)
            mbarrier.wait(q_empty.index(stage), phase ^ 1)
            lse_ring.index(stage).store(lse_log2)
            barrier()
            mbarrier.expect(q_full.index(stage), bytes_of_tile(BLOCK_M, DIM))
            load_parts(q, q_ring, q_full.index(stage), stage, b_rows, row_start + row, h_q, DIM)
            if i == 0:
                mbarrier.wait(k_empty.index(0), (tiles_done & 1) ^ 1)
                write_note(notes.index(tiles_done & 1), b, h, key, key_start, seqlen_q, seqlen_k, stored, key)
                barrier()
                mbarrier.expect(k_full.index(0), bytes_of_tile(ROWS, DIM))
                load_parts(k, k_tile, k_full.index(0), 0, b_keys, key_start + key, h, DIM)
                mbarrier.wait(v_empty.index(0), (tiles_done & 1) ^ 1)
                mbarrier.expect(v_full.index(0), bytes_of_tile(ROWS, DIM_V))
                load_parts(v, v_tile, v_full.index(0), 0, b_keys, key_start + key, h, DIM_V)
            mbarrier.wait(dout_empty.index(stage), phase ^ 1)
            delta_ring.index(stage).store(row_delta)
            barrier()
            mbarrier.expect(dout_full.index(stage), bytes_of_tile(BLOCK_M, DIM_V))
            load_parts(dout, dout_ring, dout_full.index(stage), stage, b_rows, row_start + row, h_q, DIM_V)
            stage, phase = turned(stage, phase, STAGES)
            row += BLOCK_M
            if row == high * BLOCK_M:
                row = low * BLOCK_M
                h_q += 1
        # asked for while the consumers still walk the last blocks, and no earlier: whoever comes first takes the next tile
        if counter is not None:
            t = num_programs + gl.atomic_add(counter, 1, sem="relaxed")
        else:
            t += num_programs
        tiles_done += 1
        b, h, block, walk = tile_numbered(t, keys, batch, num_heads_kv, heads_at_once, walk, ROWS, LAST_FIRST)
    mbarrier.wait(k_empty.index(0), (tiles_done & 1) ^ 1)
    write_note(notes.index(tiles_done & 1), b, b, b, b, b, b, b, b)
    barrier()
    mbarrier.arrive(k_full.index(0), count=1)
    mbarrier.wait(v_empty.index(0), (tiles_done & 1) ^ 1)
    mbarrier.arrive(v_full.index(0), count=1)
    if counter is not None:
        # the last program leaves the counter as it found it
        if gl.atomic_add(counter + 1, 1, sem="acq_rel") == num_programs - 1:
            gl.store(counter, 0)
            gl.store(counter + 1, 0)
