"""A unit's rows over tiles of keys: scores, masks, online softmax, values; the products as own_keys.py and own_rows.py have them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from flashtile.kernels.gluon.ahead import next_tile, place_ahead, visible_to_rows
from flashtile.kernels.gluon.asking import on_pages
from flashtile.kernels.gluon.names import barrier
from flashtile.kernels.gluon.own_keys import merge_warps, own_keys_layout, own_scores, own_values, repeated_rows
from flashtile.kernels.gluon.own_rows import own_rows_layout, row_scores, row_values
from flashtile.kernels.gluon.quantised import columns_as_keys
from flashtile.kernels.gluon.ring import gathers, place_of, start_tile, wait_for_tile
from flashtile.kernels.tile.band import visible_keys
from flashtile.kernels.tile.cache import is_page, page_of
from flashtile.kernels.tile.quantised import rows_as_half
from flashtile.kernels.tile.softmax import LOG2E, online_step, softcapped
from flashtile.kernels.tile.views import row_offsets


@gluon.constexpr_function
def held_dim(dim):
    """A head dim as tiles hold it."""
    return max(16, 1 << (dim - 1).bit_length())


@gluon.constexpr_function
def _rows_layout(block_m, dim, dtype):
    """q in shared memory: as wgmma reads it, or as ldmatrix does."""
    if block_m >= 64:
        return gl.NVMMASharedLayout.get_default_for([block_m, dim], dtype)
    return gl.SwizzledSharedLayout(8, 1, 8, [1, 0])


@gluon.jit
def fetch_rows(
    q, b, h, row_block, row_start, seqlen_q, wanted, packed: gl.constexpr,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """A unit's rows of q [max(16, BLOCK_M), dim] on their way to registers; zeros where there is none, or none is ``wanted``."""
    D: gl.constexpr = held_dim(HEAD_DIM)
    ACROSS: gl.constexpr = min(32, D // 8)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [NUM_WARPS, 1], [1, 0])
    local = gl.arange(0, max(16, BLOCK_M), gl.SliceLayout(1, WIDE))
    d = gl.arange(0, D, gl.SliceLayout(0, WIDE))
    rows = row_block * BLOCK_M + local
    real = (local < BLOCK_M) & (rows < seqlen_q * GROUP) & wanted
    b_rows = b * 0 if packed else b
    offsets = row_offsets(q, b_rows, row_start + rows // GROUP, h * GROUP + rows % GROUP)
    mask = gl.expand_dims(real, 1) & gl.expand_dims(d < HEAD_DIM, 0)
    return gl.load(q.ptr + gl.expand_dims(offsets, 1) + gl.expand_dims(d, 0), mask=mask, other=0.0)


@gluon.jit
def share_rows(tile, scale_log2, QUANTISED: gl.constexpr, BLOCK_M: gl.constexpr):
    """(the rows in shared memory, what their scores are multiplied by first), the latter (rows,) where bfloat16 meets quantised keys.

    A negative scale becomes a negated q, which is exact: online_step wants a factor that keeps the order of scores.
    """
    row_factor = scale_log2  # nothing looks at it
    if QUANTISED and tile.dtype == gl.bfloat16:
        tile, row_factor = rows_as_half(tile)
    tile = gl.where(scale_log2 < 0.0, -tile, tile)
    if QUANTISED:
        tile = columns_as_keys(tile)
    q_shared = gl.allocate_shared_memory(tile.dtype, tile.shape, _rows_layout(BLOCK_M, tile.shape[1], tile.dtype), tile)
    if BLOCK_M >= 64:
        fence_async_shared()
    return q_shared, row_factor


@gluon.jit
def attend(
    k, v, ring, q_shared, row_factor, lengths, pages, scores, scale_log2, band, num_heads_kv, batch, b, h, row_block, seqlen_q, seqlen_k,
    key, step, count, done, ahead, ahead_at, stop,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    PAGE_SIZE: gl.constexpr, ON_LINE: gl.constexpr, UNIT_COST: gl.constexpr, STAGES: gl.constexpr, NUM_WARPS: gl.constexpr,
    ASKED_FOR: gl.constexpr, MOVED: gl.constexpr,
):  # fmt: skip
    """A unit's rows over ``count`` tiles of keys, ``step`` keys apart: (m, l, acc), base 2, not normalised, as the warps have them.

    The tiles are the program's number ``done`` and on. Unless warps of their own ask for tiles, what is ahead is asked for here
    until it reaches ``stop``: the number of tiles, or on a line a position, where it may be another unit's, so that it is
    returned too.
    """
    k_ring, k_tiles, v_ring, v_tiles, full, empty, known = ring
    OWN_ROWS: gl.constexpr = BLOCK_M >= 64
    ROWS: gl.constexpr = max(16, BLOCK_M)
    D: gl.constexpr = held_dim(HEAD_DIM)
    DV: gl.constexpr = held_dim(HEAD_DIM_V)
    SHAPED: gl.constexpr = scores.softcap is not None or scores.slopes is not None
    GATHERED: gl.constexpr = gathers(PAGE_SIZE, BLOCK_N) and not ASKED_FOR
    # q's fragments stay in registers where the accumulator, and what a line is kept track of by, leave room
    HOLD_Q: gl.constexpr = D + DV <= 384 and not ON_LINE
    factor = gl.maximum(gl.abs(scale_log2), 1e-37)

    # a row's number and a key's within its tile: (ROWS,) and [1, BLOCK_N], or [1, ROWS] and [warps, 1, own keys]
    if OWN_ROWS:
        KEY_AXIS: gl.constexpr = 1
        S: gl.constexpr = own_rows_layout(NUM_WARPS, BLOCK_N)
        A: gl.constexpr = own_rows_layout(NUM_WARPS, DV)
        row = gl.arange(0, ROWS, gl.SliceLayout(1, S))
        n = gl.expand_dims(gl.arange(0, BLOCK_N, gl.SliceLayout(0, S)), 0)
        m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
        l = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, S))
        acc = gl.full([ROWS, DV], 0.0, gl.float32, A)
    else:
        KEY_AXIS: gl.constexpr = 2
        OWN: gl.constexpr = BLOCK_N // NUM_WARPS
        S: gl.constexpr = own_keys_layout(NUM_WARPS)
        A: gl.constexpr = S
        row = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, S))), 0)
        warp = gl.arange(0, NUM_WARPS, gl.SliceLayout(1, gl.SliceLayout(2, S)))
        own = gl.arange(0, OWN, gl.SliceLayout(0, gl.SliceLayout(1, S)))
        n = gl.expand_dims(gl.expand_dims(warp * OWN, 1), 2) + gl.expand_dims(gl.expand_dims(own, 0), 1)
        m = gl.full([NUM_WARPS, ROWS], float("-inf"), gl.float32, gl.SliceLayout(2, S))
        l = gl.full([NUM_WARPS, ROWS], 0.0, gl.float32, gl.SliceLayout(2, S))
        acc = gl.full([NUM_WARPS, ROWS, DV], 0.0, gl.float32, A)
        if HOLD_Q:
            q_operand = repeated_rows(q_shared, ROWS, D, NUM_WARPS)
        if MOVED:
            row_factor = gl.expand_dims(gl.expand_dims(gl.convert_layout(row_factor, gl.SliceLayout(0, gl.SliceLayout(2, S))), 0), 2)
    offset = seqlen_k - seqlen_q
    first, last = visible_to_rows(lengths, band, b, row_block, seqlen_q, seqlen_k, GROUP, BLOCK_M)
    at = (row_block * BLOCK_M + row) // GROUP + offset
    lowest, highest = visible_keys(band, at, first, last)
    # what every row sees needs no mask
    first_at = row_block * BLOCK_M // GROUP + offset
    last_at = gl.minimum((row_block * BLOCK_M + BLOCK_M - 1) // GROUP, seqlen_q - 1) + offset
    lowest_of_all, _ = visible_keys(band, last_at, first, last)
    _, highest_of_all = visible_keys(band, first_at, first, last)
    if scores.slopes is not None:
        head = h * GROUP + (row_block * BLOCK_M + row) % GROUP
        slope = gl.load(scores.slopes + b.to(gl.int64) * scores.slopes_stride_b + head) * LOG2E

    for i in range(count):
        stage = (done + i) % STAGES
        # page ids are asked for before the wait, so that they come meanwhile
        if ASKED_FOR:
            place = b
        elif ON_LINE:
            place = place_ahead(lengths, band, pages, ahead, ahead_at, GROUP, BLOCK_M, BLOCK_N, PAGE_SIZE, NUM_WARPS)
        else:
            place = place_of(pages, b, key + STAGES * step, first, last, BLOCK_N, PAGE_SIZE, NUM_WARPS)
        if GATHERED:
            page = page_of(pages, b, key + n, (key + n >= first) & (key + n < last), PAGE_SIZE)
        elif PAGE_SIZE > 0 and not ASKED_FOR:
            page = page_of(pages, b, key, (key + BLOCK_N > first) & (key < last), PAGE_SIZE)
        wait_for_tile(full, stage, (done + i) // STAGES, OWN_ROWS, STAGES, GATHERED)
        if OWN_ROWS:
            s = row_scores(q_shared, k_tiles.index(stage), ROWS, BLOCK_N, NUM_WARPS)
        else:
            if not HOLD_Q:
                q_operand = repeated_rows(q_shared, ROWS, D, NUM_WARPS)
            s = own_scores(q_operand, k_tiles.index(stage), ROWS, BLOCK_N, D, NUM_WARPS)
        if MOVED:
            s = s * row_factor
        if SHAPED:
            s = s * factor
            if scores.softcap is not None:
                s = softcapped(s, scores.softcap * LOG2E)
            if scores.slopes is not None:
                s = s - gl.expand_dims(slope, KEY_AXIS) * gl.abs(key + n - gl.expand_dims(at, KEY_AXIS)).to(gl.float32)
        if ASKED_FOR:
            s = on_pages(s, known, stage, n, BLOCK_N, PAGE_SIZE)
        elif PAGE_SIZE > 0:
            s = gl.where(is_page(pages, page), s, float("-inf"))
        if (key < lowest_of_all) | (key + BLOCK_N - 1 > highest_of_all):
            s = gl.where((key + n >= gl.expand_dims(lowest, KEY_AXIS)) & (key + n <= gl.expand_dims(highest, KEY_AXIS)), s, float("-inf"))
        m, l, p, alpha = online_step(m, l, s, 1.0 if SHAPED else factor, KEY_AXIS)
        acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(KEY_AXIS, A)), KEY_AXIS)
        unseen = False if GATHERED else (key < first) | (key + BLOCK_N > last)
        if OWN_ROWS:
            acc = row_values(p, v_tiles.index(stage), acc, unseen, first, last, key, BLOCK_N, DV, NUM_WARPS)
        else:
            acc = own_values(p, v_tiles.index(stage), acc, unseen, first, last, key, BLOCK_N, DV, NUM_WARPS)
        if ASKED_FOR:
            barrier()
            mbarrier.arrive(empty.index(stage), count=1)
        elif GATHERED or ahead_at < stop:
            barrier()
            ahead_h, ahead_key = h, key + STAGES * step
            if ON_LINE:
                ahead_h, ahead_key = ahead[1], (ahead[5] + ahead_at - ahead[3]) * BLOCK_N
            start_tile(
                k, v, k_ring, v_ring, full, stage, pages, place, ahead_h, ahead_key, ahead_at < stop,
                HEAD_DIM, HEAD_DIM_V, BLOCK_N, PAGE_SIZE, NUM_WARPS,
            )  # fmt: skip
        if ON_LINE and not ASKED_FOR:
            ahead, ahead_at = next_tile(lengths, band, batch, num_heads_kv, ahead, ahead_at, GROUP, BLOCK_M, BLOCK_N, UNIT_COST)
        else:
            ahead_at += 1
        key += step

    return m, l, acc, ahead, ahead_at


@gluon.jit
def merged(m, l, acc, QUANTISED: gl.constexpr, BLOCK_M: gl.constexpr, DV: gl.constexpr, NUM_WARPS: gl.constexpr):
    """The rows' (m, l, acc), whichever way the warps shared the work."""
    if BLOCK_M < 64:
        m, l, acc = merge_warps(m, l, acc, QUANTISED, BLOCK_M, DV, NUM_WARPS)
    return m, l, acc
