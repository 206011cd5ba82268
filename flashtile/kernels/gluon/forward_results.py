"""The end of a tile: the last product, the sink, out and lse."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from flashtile.kernels.gluon.forward_memory import PANEL, ROWS, dims_of_main, main_dim, rest_dim
from flashtile.kernels.gluon.forward_scores import part_of, rescaled, row_sums, rows_layout, start_values, wait_for_values
from flashtile.kernels.gluon.names import barrier
from flashtile.kernels.tile.results import store_lse
from flashtile.kernels.tile.softmax import join_sink, normaliser
from flashtile.kernels.tile.views import row_offsets


@gluon.jit
def store_rows(
    out_box, out, lse, tokens, sinks, ring, out_tiles, turn, o, m, l, p, b, h, row, row_start, seqlen_q, factor,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    STAGES: gl.constexpr, OWN_OUT: gl.constexpr,
):  # fmt: skip
    """Adds the last block's values, of turn ``turn``, and stores the rows' out and lse."""
    k_ring, v_ring, known, k_full, k_empty, v_full, v_empty = ring
    stage = turn % STAGES
    mbarrier.wait(v_full.index(stage), (turn // STAGES) & 1)
    o_coming = start_values(p, v_ring, stage, o, HEAD_DIM_V)
    # (64,)
    R: gl.constexpr = rows_layout(BLOCK_N)
    rows = row + gl.arange(0, ROWS, R)
    l = row_sums(l, BLOCK_N)
    m = m * factor
    alpha = gl.full([ROWS], 1.0, gl.float32, R)
    if sinks is not None:
        m, l, alpha = join_sink(m, l, gl.load(sinks + h))
    b_rows = b * 0 if tokens.cu_seqlens_q is not None else b
    store_lse(lse, b_rows, row_start + rows, h, rows < seqlen_q, m, l)
    o, p = wait_for_values(o_coming, p, HEAD_DIM_V)
    barrier()
    mbarrier.arrive(v_empty.index(stage), count=1)
    o = rescaled(o, alpha * normaliser(l), HEAD_DIM_V)
    if tokens.cu_seqlens_q is None or row + ROWS <= seqlen_q:
        _store_boxes(out_box, out_tiles, o, b_rows, row_start + row, h, row % BLOCK_M, HEAD_DIM, HEAD_DIM_V, OWN_OUT)
    else:
        # behind these rows lie another sequence's
        IN_MAIN: gl.constexpr = dims_of_main(HEAD_DIM_V)
        _store_masked(out, o[0], b_rows, row, row_start, h, seqlen_q, 0, IN_MAIN)
        if rest_dim(HEAD_DIM_V) > 0:
            _store_masked(out, o[1], b_rows, row, row_start, h, seqlen_q, IN_MAIN, HEAD_DIM_V - IN_MAIN)


@gluon.jit
def _store_boxes(
    box, tiles, o, b, row, h, row_in_tile, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr, OWN_OUT: gl.constexpr
):  # fmt: skip
    """Rows of out by way of shared memory. What reaches beyond the tensor's rows or dims is not written."""
    boxes, main, rest_boxes, rest = tiles
    PANELS: gl.constexpr = main_dim(HEAD_DIM_V) // PANEL
    at = row_in_tile // ROWS
    tile = at if OWN_OUT else at * (main_dim(HEAD_DIM) // main_dim(HEAD_DIM_V))
    # the last tile's rows have left
    tma.store_wait(0)
    barrier()
    main.index(tile).store(o[0].to(box.dtype))
    if rest_dim(HEAD_DIM_V) > 0:
        part_of(main, rest.index(at), HEAD_DIM_V).store(o[1].to(box.dtype))
    fence_async_shared()
    barrier()
    for panel in gl.static_range(PANELS):
        tma.async_copy_shared_to_global(box, [b, row, h, panel * PANEL], boxes.index(tile * PANELS + panel))
    if rest_dim(HEAD_DIM_V) > 0:
        tma.async_copy_shared_to_global(box, [b, row, h, main_dim(HEAD_DIM_V)], rest_boxes.index(at))


@gluon.jit
def _store_masked(out, o, b, row, row_start, h, seqlen_q, FIRST: gl.constexpr, DIM: gl.constexpr):
    """Rows of out that exist, dims [FIRST, FIRST + DIM)."""
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, o.type.layout))
    d = gl.arange(0, o.shape[1], gl.SliceLayout(0, o.type.layout))
    offsets = row_offsets(out, b, row_start + rows, h)
    ptrs = out.ptr + gl.expand_dims(offsets, 1) + gl.expand_dims(FIRST + d, 0)
    gl.store(ptrs, o.to(out.ptr.dtype.element_ty), mask=gl.expand_dims(rows < seqlen_q, 1) & gl.expand_dims(d < DIM, 0))
