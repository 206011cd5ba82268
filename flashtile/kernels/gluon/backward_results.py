"""Gradients on their way out: rows of a warpgroup through shared memory, or by address where another sequence's follow; rows of nobody."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from flashtile.kernels.gluon.forward_memory import PANEL, ROWS
from flashtile.kernels.gluon.names import barrier
from flashtile.kernels.tile.views import row_offsets


@gluon.constexpr_function
def padded_dim(dim):
    """A head dim as the backward kernels hold it: whole panels, a power of two of them, filled up with zeros."""
    return max(64, 1 << (dim - 1).bit_length())


@gluon.jit
def store_gradient(box, view, tiles, tile, x, b, start, row, end, h, DIM: gl.constexpr):
    """Rows [row, row + 64) of x [64, padded dim] in a sequence of ``end`` rows whose first is row ``start`` of the tensor.

    They go through tile ``tile`` of shared memory, and have not left it yet on return; what reaches beyond the tensor is not written.
    Of a packed tensor (``view.ptr`` is not None), rows that end the sequence are written by address.
    """
    if view.ptr is None or row + ROWS <= end:
        boxes, main, _, _ = tiles
        PANELS: gl.constexpr = main.shape[2] // PANEL
        main.index(tile).store(x.to(box.dtype))
        fence_async_shared()
        barrier()
        for panel in gl.static_range(PANELS):
            tma.async_copy_shared_to_global(box, [b, start + row, h, panel * PANEL], boxes.index(tile * PANELS + panel))
    else:
        store_by_address(view, x, b, start, row, end, h, 0, DIM)


@gluon.jit
def store_by_address(view, x, b, start, row, end, h, FIRST: gl.constexpr, DIM: gl.constexpr):
    """Of rows [row, row + 64) of x, those before row ``end`` of the sequence; columns of a head from FIRST on, before DIM."""
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, x.type.layout))
    d = FIRST + gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
    offsets = row_offsets(view, b, start + rows, h)
    ptrs = view.ptr + gl.expand_dims(offsets, 1) + gl.expand_dims(d, 0)
    gl.store(ptrs, x.to(view.ptr.dtype.element_ty), mask=gl.expand_dims(rows < end, 1) & gl.expand_dims(d < DIM, 0))


@gluon.jit
def clear_gradient(view, owned, total, num_heads, DIM: gl.constexpr):
    """Rows [owned, total) of a packed tensor belong to no sequence: gradient 0. All programs share them."""
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    d = gl.arange(0, 2 * padded_dim(DIM), FLAT)
    for token in range(owned + gl.program_id(0), total, gl.num_programs(0)):
        for head in range(num_heads):
            row = view.ptr + token * view.stride_m + head * view.stride_h
            gl.store(row + d, gl.full([2 * padded_dim(DIM)], 0.0, view.ptr.dtype.element_ty, FLAT), mask=d < DIM)
