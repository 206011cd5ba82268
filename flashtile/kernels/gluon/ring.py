"""The ring: key tiles in shared memory that the copy engine (TMA) fills some tiles ahead of the products.

A tile of BLOCK_N keys is read in boxes of BOX keys: one box from a contiguous cache or a long page, else one for each
page. Boxes of several pages are cut into columns of 64 dims too (128 bytes, as wide as shared memory is swizzled), so
that together they lie as one tile does. What a box reaches beyond the cache, and a page that does not exist, reads as zeros.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def tile_ring(desc, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, DIM: gl.constexpr):
    """A ring for the tiles of ``desc``, twice: as boxes to fill, and as [STAGES, BLOCK_N, DIM] to use."""
    BOX: gl.constexpr = desc.block_type.shape[1]
    COLUMNS: gl.constexpr = desc.block_type.shape[3]
    BOXES: gl.constexpr = BLOCK_N // BOX * (DIM // COLUMNS)
    boxes = gl.allocate_shared_memory(desc.dtype, [STAGES * BOXES, 1, BOX, 1, COLUMNS], desc.layout)
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, DIM], desc.dtype)
    return boxes, boxes._reinterpret(desc.dtype, [STAGES, BLOCK_N, DIM], TILE)


@gluon.jit
def box_pages(pages, b, key, first, last, BLOCK_N: gl.constexpr, BOX: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """The pages of a tile's boxes, a scalar each; -1, which reads as zeros, where a box has no key in [first, last)."""
    ids = ()
    if PAGE_SIZE:
        row = pages.table + b.to(gl.int64) * pages.stride_b
        for j in gl.static_range(BLOCK_N // BOX):
            start = key + j * BOX
            ids = ids + (gl.load(row + start // PAGE_SIZE, mask=(start + BOX > first) & (start < last), other=-1),)
    return ids


@gluon.jit
def start_tile(k, v, k_boxes, v_boxes, full, stage, ids, b, h, key, pred, BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """Asks for the K and V of BLOCK_N keys from ``key`` on; the stage's barrier counts their bytes in."""
    BOX: gl.constexpr = k.block_type.shape[1]
    BOXES: gl.constexpr = BLOCK_N // BOX
    K_PARTS: gl.constexpr = k_boxes.shape[0] // full.shape[0] // BOXES
    V_PARTS: gl.constexpr = v_boxes.shape[0] // full.shape[0] // BOXES
    BYTES: gl.constexpr = BOXES * (K_PARTS * k.block_type.nbytes + V_PARTS * v.block_type.nbytes)
    bar = full.index(stage)
    mbarrier.expect(bar, BYTES, pred=pred)
    for j in gl.static_range(BOXES):
        if PAGE_SIZE:
            block = ids[j]
            slot = (key + j * BOX) % PAGE_SIZE
        else:
            block = b
            slot = key + j * BOX
        for part in gl.static_range(K_PARTS):
            box = k_boxes.index((stage * K_PARTS + part) * BOXES + j)
            tma.async_copy_global_to_shared(k, [block, slot, h, part * k.block_type.shape[3]], bar, box, pred=pred)
        for part in gl.static_range(V_PARTS):
            box = v_boxes.index((stage * V_PARTS + part) * BOXES + j)
            tma.async_copy_global_to_shared(v, [block, slot, h, part * v.block_type.shape[3]], bar, box, pred=pred)
