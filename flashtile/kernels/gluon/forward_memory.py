"""Shared memory of the forward kernel: rings of key and value tiles, rows of q and out, and the barriers between their users.

What the copy engine moves at a time is a box of 64 columns (128 bytes), so that a tile is a row of panels, each of which
several boxes may fill. A head dim is held in two parts: a power of two, and what is left up to the next smaller one. So 96 is
computed as 64 + 32 and 192 as 128 + 64; other dims are padded with zeros, which the copy engine writes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

ROWS = gl.constexpr(64)  # of one warpgroup
PANEL = gl.constexpr(64)  # columns of a box
NOTE = gl.constexpr(8)  # numbers that the producer leaves about a tile of rows


@gluon.constexpr_function
def main_dim(dim):
    """The first part of a head dim."""
    whole = max(64, 1 << (dim - 1).bit_length())
    half = whole // 2
    return half if half >= 64 and dim - half <= half // 2 else whole


@gluon.constexpr_function
def rest_dim(dim):
    """The second part of a head dim, at most 64; 0 where the first one holds it."""
    rest = dim - main_dim(dim)
    return 0 if rest <= 0 else max(16, 1 << (rest - 1).bit_length())


@gluon.constexpr_function
def dims_of_main(dim):
    """How many of a head's dims lie in the first part; all others lie in the second, which may hold more."""
    return min(dim, main_dim(dim))


@gluon.constexpr_function
def panels(dim):
    return main_dim(dim) // 64 + (rest_dim(dim) > 0)


@gluon.constexpr_function
def box_rows(block_n, page_size):
    """Keys of one box: a box does not reach from one page into another."""
    return min(block_n, page_size) if page_size > 0 else block_n


@gluon.constexpr_function
def out_fits_q(dim, dim_v):
    """Whether rows of out can take the place of rows of q."""
    return main_dim(dim) % main_dim(dim_v) == 0 and (rest_dim(dim_v) == 0 or rest_dim(dim) > 0)


@gluon.constexpr_function
def bytes_of_tile(rows, dim):
    return rows * panels(dim) * 128


@gluon.constexpr_function
def tile_layout(rows, columns, dtype):
    return gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)


@gluon.jit
def allocate_tiles(box, COUNT: gl.constexpr, TILE_ROWS: gl.constexpr, BOX_ROWS: gl.constexpr, DIM: gl.constexpr):
    """COUNT tiles [TILE_ROWS, DIM]: as boxes and as what wgmma reads, of the first part and of the second.

    ``box`` is a tensor map. Where there is no second part, the first stands in its place.
    """
    boxes, tiles = _allocate_part(box, COUNT, TILE_ROWS, BOX_ROWS, main_dim(DIM))
    if rest_dim(DIM) > 0:
        rest_boxes, rest_tiles = _allocate_part(box, COUNT, TILE_ROWS, BOX_ROWS, PANEL)
        return boxes, tiles, rest_boxes, rest_tiles
    else:
        return boxes, tiles, boxes, tiles


@gluon.jit
def _allocate_part(box, COUNT: gl.constexpr, TILE_ROWS: gl.constexpr, BOX_ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    BOXES: gl.constexpr = COUNT * (COLUMNS // PANEL) * (TILE_ROWS // BOX_ROWS)
    boxes = gl.allocate_shared_memory(box.dtype, [BOXES, 1, BOX_ROWS, 1, PANEL], box.layout)
    return boxes, boxes._reinterpret(box.dtype, [COUNT, TILE_ROWS, COLUMNS], tile_layout(TILE_ROWS, COLUMNS, box.dtype))


@gluon.jit
def rows_in_place(tiles, COUNT: gl.constexpr, DIM: gl.constexpr, DIM_V: gl.constexpr):
    """COUNT tiles of q as tiles of rows of out, of which the first part of a tile of q may hold several: the first one is used."""
    boxes, main, rest_boxes, rest = tiles
    WIDTH: gl.constexpr = main_dim(DIM) // main_dim(DIM_V)
    LAYOUT: gl.constexpr = tile_layout(ROWS, main_dim(DIM_V), boxes.dtype)
    return boxes, boxes._reinterpret(boxes.dtype, [COUNT * WIDTH, ROWS, main_dim(DIM_V)], LAYOUT), rest_boxes, rest


@gluon.jit
def allocate_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each passed after so many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def allocate_exchange(CONSUMERS: gl.constexpr, STAGES: gl.constexpr):
    """What producer and consumers tell each other by: (notes, known pages, six arrays of barriers).

    Each array says "full" (the producer's copies have arrived) or "empty" (the consumers need the memory no longer): of each
    consumer's rows of q, and of each stage of the rings of keys and of values.
    """
    LAYOUT: gl.constexpr = mbarrier.MBarrierLayout()
    notes = gl.allocate_shared_memory(gl.int32, [2 * CONSUMERS, NOTE], LAYOUT)
    known = gl.allocate_shared_memory(gl.int32, [STAGES, 1], LAYOUT)
    q_full = allocate_barriers(CONSUMERS, 1)
    q_empty = allocate_barriers(CONSUMERS, 1)
    k_full = allocate_barriers(STAGES, 1)
    k_empty = allocate_barriers(STAGES, CONSUMERS)
    v_full = allocate_barriers(STAGES, 1)
    v_empty = allocate_barriers(STAGES, CONSUMERS)
    fence_async_shared()
    return notes, known, q_full, q_empty, k_full, k_empty, v_full, v_empty
