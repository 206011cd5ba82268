"""The ring: key tiles in shared memory that are read some tiles ahead of the products.

A contiguous cache, and pages that hold whole tiles, are read by the copy engine (TMA), a tile in one box: one thread asks,
and a barrier in shared memory counts the bytes in. What a box reaches beyond the cache, and a page that does not exist,
reads as zeros. A tile of several pages comes in a box for each, which warps of their own ask for (asking.py). Keys of other
pages are gathered by asynchronous copies of 16 bytes a thread, in one group a tile; keys that nobody may see are zeros there.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from flashtile.kernels.gluon.names import barrier
from flashtile.kernels.gluon.quantised import stored_dim
from flashtile.kernels.tile.cache import is_page, page_of


@gluon.constexpr_function
def gathers(page_size, block_n):
    """Whether a tile's keys lie in several pages, or not at the start of one."""
    return page_size > 0 and page_size % block_n != 0


@gluon.constexpr_function
def copies_layout(num_warps):
    """Who copies what of a gathered tile: 8 threads the 128 bytes of 64 dims, whatever the head dim."""
    return gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])


@gluon.jit
def tile_ring(view, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, DIM: gl.constexpr, GATHERED: gl.constexpr):
    """A ring for tiles of K or V, twice: as what is written, and as [STAGES, BLOCK_N, stored DIM] to compute with."""
    dtype: gl.constexpr = view.ptr.dtype.element_ty if GATHERED else view.dtype
    STORED: gl.constexpr = stored_dim(DIM, dtype)
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, STORED], dtype)
    if GATHERED:
        tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, STORED], TILE)
        return tiles, tiles
    else:
        boxes = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 1, STORED], view.layout)
        return boxes, boxes._reinterpret(dtype, [STAGES, BLOCK_N, STORED], TILE)


@gluon.jit
def place_of(pages, b, key, first, last, BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr, NUM_WARPS: gl.constexpr):
    """Where the tile from ``key`` on lies: its sequence or page, or each key's page.

    Table entries of pages without a key in [first, last) are not read; -1 stands there. Nothing is done with an entry
    here, so that it may be on its way for a while.
    """
    if gathers(PAGE_SIZE, BLOCK_N):
        at = key + gl.arange(0, BLOCK_N, gl.SliceLayout(1, copies_layout(NUM_WARPS)))
        return page_of(pages, b, at, (at >= first) & (at < last), PAGE_SIZE)
    elif PAGE_SIZE > 0:
        return page_of(pages, b, key, (key + BLOCK_N > first) & (key < last), PAGE_SIZE)
    else:
        return b


@gluon.jit
def start_tile(
    k, v, k_ring, v_ring, full, stage, pages, place, h, key, pred,
    HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr, BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Asks for the K and V of BLOCK_N keys from ``key`` on, if ``pred``. Where keys are gathered, every call is a group, wanted or not."""
    if gathers(PAGE_SIZE, BLOCK_N):
        # what is masked is written, as zeros: a tile that is not wanted must not be touched
        if pred:
            known = is_page(pages, place)
            slot = (key + gl.arange(0, BLOCK_N, gl.SliceLayout(1, copies_layout(NUM_WARPS)))).to(gl.uint32) % PAGE_SIZE
            page = gl.where(known, place, 0).to(gl.int64)
            _gather(k, k_ring.index(stage), h, page, slot.to(gl.int64), known, HEAD_DIM, NUM_WARPS)
            _gather(v, v_ring.index(stage), h, page, slot.to(gl.int64), known, HEAD_DIM_V, NUM_WARPS)
        async_copy.commit_group()
    else:
        slot = key % PAGE_SIZE if PAGE_SIZE > 0 else key
        mbarrier.expect(full.index(stage), k.block_type.nbytes + v.block_type.nbytes, pred=pred)
        tma.async_copy_global_to_shared(k, [place, slot, h, 0], full.index(stage), k_ring.index(stage), pred=pred)
        tma.async_copy_global_to_shared(v, [place, slot, h, 0], full.index(stage), v_ring.index(stage), pred=pred)


@gluon.jit
def _gather(view, tile, h, page, slot, known, HEAD_DIM: gl.constexpr, NUM_WARPS: gl.constexpr):
    d = gl.arange(0, tile.shape[1], gl.SliceLayout(0, copies_layout(NUM_WARPS)))
    rows = page * view.stride_b + slot * view.stride_n + h.to(gl.int64) * view.stride_h
    mask = gl.expand_dims(known, 1) & gl.expand_dims(d < stored_dim(HEAD_DIM, tile.dtype), 0)
    async_copy.async_copy_global_to_shared(tile, view.ptr + gl.expand_dims(rows, 1) + gl.expand_dims(d, 0), mask=mask)


@gluon.jit
def wait_for_tile(full, stage, turn, BY_WGMMA: gl.constexpr, STAGES: gl.constexpr, GATHERED: gl.constexpr):
    """Returns when the stage's tile of that turn through the ring is there, for all threads."""
    if GATHERED:
        async_copy.wait_group(STAGES - 1)
        if BY_WGMMA:
            fence_async_shared()
        barrier()
    else:
        mbarrier.wait(full.index(stage), turn & 1)
