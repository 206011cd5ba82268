"""The producer: one warp that finds tiles of rows and asks the copy engine for their q, keys and values, some blocks ahead.

Keys are walked from the last block to the first, so that the block on a causal diagonal, which is masked, comes at the
start, where nothing could hide behind it anyway.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from flashtile.kernels.gluon.forward_memory import PANEL, ROWS, box_rows, bytes_of_tile, main_dim, rest_dim
from flashtile.kernels.gluon.forward_schedule import blocks_of_rows, keys_of_sequence, tile_numbered, write_note
from flashtile.kernels.gluon.names import barrier
from flashtile.kernels.tile.cache import is_page, page_of
from flashtile.kernels.tile.schedule import sequence_rows, stored_keys

_BY_LANE = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))


@gluon.jit
def load_tiles(
    q, k, v, dout, tokens, pages, scores, band, counter, num_programs, batch, num_heads, heads_at_once, memory, dout_tiles,
    CONSUMERS: gl.constexpr, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    PAGE_SIZE: gl.constexpr, STAGES: gl.constexpr, VALUE_STAGES: gl.constexpr = None,
):  # fmt: skip
    """Brings every tile of rows that this program takes, and says at the end that there are no more.

    With q comes ``dout``, which has the values' head dim, unless it is None. VALUE_STAGES: of the values' ring, where it has
    another number of stages.
    """
    q_tiles, k_ring, v_ring, notes, known, q_full, q_empty, k_full, k_empty, v_full, v_empty = memory
    k_way, v_way = (k, k_ring, k_full, k_empty), (v, v_ring, v_full, v_empty)
    V_STAGES: gl.constexpr = STAGES if VALUE_STAGES is None else VALUE_STAGES
    BLOCK_M: gl.constexpr = ROWS * CONSUMERS
    LAST_FIRST: gl.constexpr = band.right is not None
    # in the order in which they are needed: forward's values behind the next block's keys, backward's with their own
    VALUES_BEHIND: gl.constexpr = dout is None
    ROW_BYTES: gl.constexpr = bytes_of_tile(ROWS, HEAD_DIM) + (bytes_of_tile(ROWS, HEAD_DIM_V) if dout is not None else 0)
    t = gl.program_id(0)
    turn = t * 0
    tiles_done = t * 0
    negated = gl.where(scores.scale_log2 < 0.0, 1, 0)
    b, h, row_block, walk = tile_numbered(t, tokens, batch, num_heads, heads_at_once, (t * 0, t * 0), BLOCK_M, LAST_FIRST)
    while b >= 0:
        row = row_block * BLOCK_M
        row_start, seqlen_q = sequence_rows(tokens, b)
        key_start, seqlen_k = stored_keys(tokens, b)
        low, high = blocks_of_rows(band, row, seqlen_q, seqlen_k, BLOCK_M, BLOCK_N)
        b_rows = b * 0 if tokens.cu_seqlens_q is not None else b
        b_keys = b * 0 if tokens.cu_seqlens_k is not None else b
        first, last = keys_of_sequence(band, seqlen_q, seqlen_k)
        seen = (first, last)
        place = (known, pages, b_keys, h // GROUP, key_start)
        key = (high - 1) * BLOCK_N
        page_of_box = _pages_of_block(pages, b_keys, seen, key, BLOCK_N, PAGE_SIZE)
        page_of_next = _pages_of_block(pages, b_keys, seen, key - BLOCK_N, BLOCK_N, PAGE_SIZE)
        # the first keys need not wait until the last tile's q is done with
        _load_block(k_way, place, page_of_box, key, turn, True, BLOCK_N, HEAD_DIM, PAGE_SIZE, STAGES)
        for c in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(c), (tiles_done & 1) ^ 1)
            write_note(notes.index(2 * c + (tiles_done & 1)), b, h, row, row_start, seqlen_q, seqlen_k, turn, negated)
            barrier()
            mbarrier.expect(q_full.index(c), ROW_BYTES)
            load_box(q, q_tiles, q_full.index(c), c, b_rows, row_start + row + c * ROWS, h, 0, 1, HEAD_DIM)
            if dout is not None:
                load_box(dout, dout_tiles, q_full.index(c), c, b_rows, row_start + row + c * ROWS, h, 0, 1, HEAD_DIM_V)
        # the next tile's number comes while this one's keys do
        if counter is not None:
            t = num_programs + gl.atomic_add(counter, 1, sem="relaxed")
        else:
            t += num_programs
        if not VALUES_BEHIND:
            _load_block(v_way, place, page_of_box, key, turn, False, BLOCK_N, HEAD_DIM_V, PAGE_SIZE, V_STAGES)
        for _ in range(high - low - 1):
            last_key, page_of_last = key, page_of_box
            key -= BLOCK_N
            # a block's pages are looked up one block ahead
            page_of_box = page_of_next
            page_of_next = _pages_of_block(pages, b_keys, seen, key - BLOCK_N, BLOCK_N, PAGE_SIZE)
            _load_block(k_way, place, page_of_box, key, turn + 1, True, BLOCK_N, HEAD_DIM, PAGE_SIZE, STAGES)
            if VALUES_BEHIND:
                _load_block(v_way, place, page_of_last, last_key, turn, False, BLOCK_N, HEAD_DIM_V, PAGE_SIZE, V_STAGES)
            else:
                _load_block(v_way, place, page_of_box, key, turn + 1, False, BLOCK_N, HEAD_DIM_V, PAGE_SIZE, V_STAGES)
            turn += 1
        if VALUES_BEHIND:
            _load_block(v_way, place, page_of_box, key, turn, False, BLOCK_N, HEAD_DIM_V, PAGE_SIZE, V_STAGES)
        turn += 1
        tiles_done += 1
        b, h, row_block, walk = tile_numbered(t, tokens, batch, num_heads, heads_at_once, walk, BLOCK_M, LAST_FIRST)
    for c in gl.static_range(CONSUMERS):
        mbarrier.wait(q_empty.index(c), (tiles_done & 1) ^ 1)
        write_note(notes.index(2 * c + (tiles_done & 1)), b, b, b, b, b, b, b, b)
        barrier()
        mbarrier.arrive(q_full.index(c), count=1)
    if counter is not None:
        # the last program leaves the counter as it found it
        if gl.atomic_add(counter + 1, 1, sem="acq_rel") == num_programs - 1:
            gl.store(counter, 0)
            gl.store(counter + 1, 0)


@gluon.jit
def _pages_of_block(pages, b, seen, key, BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """The page of each box of a block of keys, a box a lane, or 0 without pages: all table entries are asked for at once.

    -1 stands for boxes of which no query sees any key: such entries are not read.
    """
    if PAGE_SIZE > 0:
        first, last = seen
        BOX_ROWS: gl.constexpr = box_rows(BLOCK_N, PAGE_SIZE)
        of_box = key + gl.arange(0, 32, _BY_LANE) * BOX_ROWS
        box_seen = (of_box + BOX_ROWS > first) & (of_box < gl.minimum(last, key + BLOCK_N))
        return page_of(pages, b, of_box, box_seen, PAGE_SIZE)
    else:
        return 0


@gluon.jit
def _load_block(
    way, place, page_of_box, key, turn, OF_KEYS: gl.constexpr,
    BLOCK_N: gl.constexpr, DIM: gl.constexpr, PAGE_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A block of keys or values, from key ``key`` of the sequence on, into its stage of the ring once that is empty.

    ``place`` is (known pages, the page table, sequence, key head, first token within the tensor). On pages, also says which of the
    block's boxes are there: one that is not reads as zero, as the copy engine has it for all that lies outside a tensor.
    """
    box, ring, full, empty = way
    known, pages, b, h, key_start = place
    BOXES: gl.constexpr = BLOCK_N // box_rows(BLOCK_N, PAGE_SIZE)
    stage = turn % STAGES
    # a number that only the assembler knows leaves it to unroll loops over boxes: it counts the producer's few registers
    boxes = gl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [turn * 0 + BOXES], dtype=gl.int32, is_pure=True, pack=1)
    mbarrier.wait(empty.index(stage), ((turn // STAGES) & 1) ^ 1)
    if PAGE_SIZE > 0 and OF_KEYS:
        bits = gl.sum(is_page(pages, page_of_box).to(gl.int32) << gl.arange(0, 32, _BY_LANE), 0)
        known.index(stage).store(gl.full([1], bits, gl.int32, _BY_LANE))
        barrier()
    mbarrier.expect(full.index(stage), bytes_of_tile(BLOCK_N, DIM))
    if PAGE_SIZE > 0:
        for i in range(boxes):
            # a lane's number for all of them, which takes less time than to read the table again
            page = gl.sum(gl.where(gl.arange(0, 32, _BY_LANE) == i, page_of_box, 0), 0)
            load_box(box, ring, full.index(stage), stage, page, key % PAGE_SIZE if BOXES == 1 else 0, h, i, BOXES, DIM)
    else:
        load_box(box, ring, full.index(stage), stage, b, key_start + key, h, 0, 1, DIM)


@gluon.jit
def load_box(box, tiles, full, tile, b, row, h, number, NUMBERS: gl.constexpr, DIM: gl.constexpr):
    """The panels of box ``number`` of a tile's NUMBERS, from row ``row`` of the tensor on."""
    boxes, _, rest_boxes, _ = tiles
    PANELS: gl.constexpr = main_dim(DIM) // PANEL
    for panel in gl.static_range(PANELS):
        at = (tile * PANELS + panel) * NUMBERS + number
        tma.async_copy_global_to_shared(box, [b, row, h, panel * PANEL], full, boxes.index(at))
    if rest_dim(DIM) > 0:
        tma.async_copy_global_to_shared(box, [b, row, h, main_dim(DIM)], full, rest_boxes.index(tile * NUMBERS + number))
