"""The producer: one warp that finds tiles of rows and asks the copy engine for their q, keys and values, some blocks ahead.

Keys are walked from the last block to the first, so that the block on a causal diagonal, which is masked, comes at the
start, where nothing could hide behind it anyway.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from flashtile.kernels.gluon.forward_memory import PANEL, ROWS, bytes_of_tile, main_dim, rest_dim
from flashtile.kernels.gluon.forward_schedule import blocks_of_rows, tile_numbered, write_note
from flashtile.kernels.gluon.names import barrier
from flashtile.kernels.tile.schedule import sequence_rows, stored_keys


@gluon.jit
def load_tiles(
    q, k, v, tokens, pages, band, counter, batch, num_heads, heads_at_once, memory,
    CONSUMERS: gl.constexpr, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    PAGE_SIZE: gl.constexpr, BOX_ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Brings every tile of rows that this program takes, and at the end says that there are no more."""
    q_tiles, k_ring, v_ring, notes, known, q_full, q_empty, k_full, k_empty, v_full, v_empty = memory
    k_way, v_way = (k, k_ring, k_full, k_empty), (v, v_ring, v_full, v_empty)
    BLOCK_M: gl.constexpr = ROWS * CONSUMERS
    LAST_FIRST: gl.constexpr = band.right is not None
    t = gl.program_id(0)
    turn = t * 0
    tiles_done = t * 0
    b, h, row_block, walk = tile_numbered(t, tokens, batch, num_heads, heads_at_once, (t * 0, t * 0), BLOCK_M, LAST_FIRST)
    while b >= 0:
        row = row_block * BLOCK_M
        row_start, seqlen_q = sequence_rows(tokens, b)
        key_start, seqlen_k = stored_keys(tokens, b)
        low, high = blocks_of_rows(band, row, seqlen_q, seqlen_k, BLOCK_M, BLOCK_N)
        b_rows = b * 0 if tokens.cu_seqlens_q is not None else b
        b_keys = b * 0 if tokens.cu_seqlens_k is not None else b
        # the first keys need not wait until the last tile's q is done with
        key = key_start + (high - 1) * BLOCK_N
        _load_block(k_way, b_keys, key, h // GROUP, turn, BLOCK_N, HEAD_DIM, STAGES)
        for c in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(c), (tiles_done & 1) ^ 1)
            write_note(notes.index(c), b, h, row, row_start, seqlen_q, seqlen_k, low, high)
            barrier()
            mbarrier.expect(q_full.index(c), bytes_of_tile(ROWS, HEAD_DIM))
            _load_box(q, q_tiles, q_full.index(c), c, b_rows, row_start + row + c * ROWS, h, 0, 1, HEAD_DIM)
        _load_block(v_way, b_keys, key, h // GROUP, turn, BLOCK_N, HEAD_DIM_V, STAGES)
        turn += 1
        # the next tile's number comes while this one's keys do
        if counter is not None:
            t = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
        else:
            t += gl.num_programs(0)
        for _ in range(high - low - 1):
            key -= BLOCK_N
            _load_block(k_way, b_keys, key, h // GROUP, turn, BLOCK_N, HEAD_DIM, STAGES)
            _load_block(v_way, b_keys, key, h // GROUP, turn, BLOCK_N, HEAD_DIM_V, STAGES)
            turn += 1
        tiles_done += 1
        b, h, row_block, walk = tile_numbered(t, tokens, batch, num_heads, heads_at_once, walk, BLOCK_M, LAST_FIRST)
    for c in gl.static_range(CONSUMERS):
        mbarrier.wait(q_empty.index(c), (tiles_done & 1) ^ 1)
        write_note(notes.index(c), b, b, b, b, b, b, b, b)
        barrier()
        mbarrier.arrive(q_full.index(c), count=1)
    if counter is not None:
        # the last program leaves the counter as it found it
        if gl.atomic_add(counter + 1, 1, sem="acq_rel") == gl.num_programs(0) - 1:
            gl.store(counter, 0)
            gl.store(counter + 1, 0)


@gluon.jit
def _load_block(way, b, key, h, turn, BLOCK_N: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr):
    """A block of keys or values into its stage of the ring, once that is empty."""
    box, ring, full, empty = way
    stage = turn % STAGES
    mbarrier.wait(empty.index(stage), ((turn // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), bytes_of_tile(BLOCK_N, DIM))
    _load_box(box, ring, full.index(stage), stage, b, key, h, 0, 1, DIM)


@gluon.jit
def _load_box(box, tiles, full, tile, b, row, h, number, NUMBERS: gl.constexpr, DIM: gl.constexpr):
    """The panels of box ``number`` of a tile's NUMBERS, from row ``row`` of the tensor on."""
    boxes, _, rest_boxes, _ = tiles
    PANELS: gl.constexpr = main_dim(DIM) // PANEL
    for panel in gl.static_range(PANELS):
        at = (tile * PANELS + panel) * NUMBERS + number
        tma.async_copy_global_to_shared(box, [b, row, h, panel * PANEL], full, boxes.index(at))
    if rest_dim(DIM) > 0:
        tma.async_copy_global_to_shared(box, [b, row, h, main_dim(DIM)], full, rest_boxes.index(tile * NUMBERS + number))
