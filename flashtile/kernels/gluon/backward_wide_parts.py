"""Tiles and accumulators of wide heads, in two parts of a head dim (forward_memory.py): 192 is computed as 128 + 64.

A tile may have been allocated wider than the dim that lies in it, so that results of another dim can take its place: then both parts
are columns of its first one.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma_wait

from flashtile.kernels.gluon.backward_results import store_by_address
from flashtile.kernels.gluon.forward_memory import PANEL, ROWS, main_dim, panels, rest_dim
from flashtile.kernels.gluon.forward_scores import part_of, products_layout
from flashtile.kernels.gluon.names import barrier


@gluon.constexpr_function
def widest(dim, dim_v):
    """Columns of a tile that holds either head dim in one part."""
    return max(64, 1 << (max(dim, dim_v) - 1).bit_length())


@gluon.constexpr_function
def products_of(dim):
    """How many asynchronous products one over, or into, a head dim is."""
    return 2 if rest_dim(dim) > 0 else 1


@gluon.jit
def parts_of_tile(tiles, tile, DIM: gl.constexpr):
    """Both parts of a tile in shared memory; where there is no second one, the first stands in its place."""
    _, main, _, rest = tiles
    first = main.index(tile)
    if main_dim(DIM) < main.shape[2]:
        if rest_dim(DIM) > 0:
            return first.slice(0, main_dim(DIM), dim=1), first.slice(main_dim(DIM), rest_dim(DIM), dim=1)
        else:
            return first.slice(0, main_dim(DIM), dim=1), first.slice(0, main_dim(DIM), dim=1)
    elif rest_dim(DIM) > 0:
        return first, part_of(main, rest.index(tile), DIM)
    else:
        return first, first


@gluon.jit
def panel_of_tile(tiles, tile, P: gl.constexpr, DIM: gl.constexpr):
    """The box of panel P of a tile."""
    boxes, main, rest_boxes, _ = tiles
    if P < main.shape[2] // PANEL:
        return boxes.index(tile * (main.shape[2] // PANEL) + P)
    else:
        return rest_boxes.index(tile)


@gluon.jit
def load_parts(box, tiles, full, tile, b, row, h, DIM: gl.constexpr):
    """Asks the copy engine for the rows of a tile, from row ``row`` of the tensor on."""
    for panel in gl.static_range(panels(DIM)):
        tma.async_copy_global_to_shared(box, [b, row, h, panel * PANEL], full, panel_of_tile(tiles, tile, panel, DIM))


@gluon.jit
def zero_parts(DIM: gl.constexpr):
    """An accumulator [64, DIM] of zeros; where there is no second part, 0 stands in its place."""
    main = gl.zeros([ROWS, main_dim(DIM)], gl.float32, products_layout(main_dim(DIM)))
    if rest_dim(DIM) > 0:
        return main, gl.zeros([ROWS, rest_dim(DIM)], gl.float32, products_layout(rest_dim(DIM)))
    else:
        return main, 0.0


@gluon.jit
def wait_for_parts(x, AFTER: gl.constexpr, DIM: gl.constexpr):
    """Both parts of an accumulator, while the AFTER products that were started behind it go on."""
    if rest_dim(DIM) > 0:
        return warpgroup_mma_wait(AFTER, deps=(x[0], x[1]))
    else:
        return warpgroup_mma_wait(AFTER, deps=(x[0],)), x[1]


@gluon.jit
def store_parts(box, view, tiles, tile, x, b, start, row, end, h, DIM: gl.constexpr):
    """Rows [row, row + 64) of both parts of x, as ``store_gradient`` has it."""
    if view.ptr is None or row + ROWS <= end:
        main, rest = parts_of_tile(tiles, tile, DIM)
        main.store(x[0].to(box.dtype))
        if rest_dim(DIM) > 0:
            rest.store(x[1].to(box.dtype))
        fence_async_shared()
        barrier()
        for panel in gl.static_range(panels(DIM)):
            tma.async_copy_shared_to_global(box, [b, start + row, h, panel * PANEL], panel_of_tile(tiles, tile, panel, DIM))
    else:
        store_by_address(view, x[0], b, start, row, end, h, 0, DIM)
        if rest_dim(DIM) > 0:
            store_by_address(view, x[1], b, start, row, end, h, main_dim(DIM), DIM)
