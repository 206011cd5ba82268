"""Where results go: out and lse, or partial results; and rows that nobody owns."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.kernels.tile.schedule import owned_rows
from flashtile.kernels.tile.softmax import join_sink, natural_lse, normaliser
from flashtile.kernels.tile.views import row_offsets


@gluon.jit
def row_numbers(acc):
    """Numbers of the rows of a result [rows, dim] within their block."""
    return gl.arange(0, acc.shape[0], gl.SliceLayout(1, acc.type.layout))


@gluon.jit
def real_rows(acc, unit, GROUP: gl.constexpr, BLOCK_M: gl.constexpr):
    """Which rows of a result [rows, dim] the unit (b, h, row block, first token, queries) has."""
    return unit[2] * BLOCK_M + row_numbers(acc) < unit[4] * GROUP


@gluon.jit
def partials_of_split(row, unit, num_heads_kv, lengths, GROUP: gl.constexpr, BLOCK_M: gl.constexpr):
    """Where the partial results of a grid of splits lie: [token, head, split]."""
    b, h, row_block, row_start, seqlen_q = unit
    rows = row_block * BLOCK_M + row
    token = row_start + rows // GROUP
    if lengths.cu_seqlens_q is None:
        token += b * seqlen_q
    head = h * GROUP + rows % GROUP
    split = gl.num_programs(1) - 1 - gl.program_id(1)
    return (token.to(gl.int64) * (num_heads_kv * GROUP) + head) * gl.num_programs(1) + split


@gluon.jit
def store_no_keys(partials, lengths, unit, num_heads_kv, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, NUM_WARPS: gl.constexpr):
    """A split without keys: lse -inf."""
    row = gl.arange(0, BLOCK_M, gl.BlockedLayout([1], [32], [NUM_WARPS], [0]))
    at = partials_of_split(row, unit, num_heads_kv, lengths, GROUP, BLOCK_M)
    nothing = gl.full([BLOCK_M], float("-inf"), gl.float32, row.type.layout)
    gl.store(partials.ptr + partials.lse_start + at, nothing, mask=unit[2] * BLOCK_M + row < unit[4] * GROUP)


@gluon.jit
def store_out(m, l, acc, out, lse, lengths, sinks, unit, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM_V: gl.constexpr):
    """The unit's rows of out and lse, with the sink."""
    R: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    d = gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
    m, l = gl.convert_layout(m, R), gl.convert_layout(l, R)
    b, h, row_block, row_start, seqlen_q = unit
    rows = row_block * BLOCK_M + row_numbers(acc)
    real = rows < seqlen_q * GROUP
    token = row_start + rows // GROUP
    head = h * GROUP + rows % GROUP
    b_rows = b * 0 if lengths.cu_seqlens_q is not None else b
    if sinks is not None:
        m, l, alpha = join_sink(m, l, gl.load(sinks + head, mask=real, other=0.0))
        acc = acc * gl.expand_dims(alpha, 1)
    if lse.ptr is not None:
        at = b_rows.to(gl.int64) * lse.stride_b + head.to(gl.int64) * lse.stride_h + token.to(gl.int64) * lse.stride_m
        gl.store(lse.ptr + at, natural_lse(m, l), mask=real)
    offsets = row_offsets(out, b_rows, token, head)
    result = (acc * gl.expand_dims(normaliser(l), 1)).to(out.ptr.dtype.element_ty)
    ptrs = out.ptr + gl.expand_dims(offsets, 1) + gl.expand_dims(d, 0)
    gl.store(ptrs, result, mask=gl.expand_dims(real, 1) & gl.expand_dims(d < HEAD_DIM_V, 0))


@gluon.jit
def clear_unowned(out, lse, lengths, batch, num_heads, HEAD_DIM_V: gl.constexpr, DV: gl.constexpr, NUM_WARPS: gl.constexpr):
    """Packed queries past the last sequence's end see no key: out 0, lse -inf. All programs share them."""
    if lengths.cu_seqlens_q is not None:
        FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
        d = gl.arange(0, DV, FLAT)
        for token in range(owned_rows(lengths, batch) + gl.program_id(0), lengths.total_q, gl.num_programs(0)):
            for head in range(num_heads):
                row = out.ptr + token * out.stride_m + head * out.stride_h
                gl.store(row + d, gl.full([DV], 0.0, out.ptr.dtype.element_ty, FLAT), mask=d < HEAD_DIM_V)
                if lse.ptr is not None:
                    gl.store(lse.ptr + head * lse.stride_h + token * lse.stride_m, float("-inf"))


@gluon.jit
def store_partial(m, l, acc, partials, at, real, HEAD_DIM_V: gl.constexpr):
    """Rows ``at`` (int64) of the partial results: normalised, with their lse."""
    R: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    d = gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
    m, l = gl.convert_layout(m, R), gl.convert_layout(l, R)
    gl.store(partials.ptr + partials.lse_start + at, natural_lse(m, l), mask=real)
    ptrs = partials.ptr + gl.expand_dims(at * HEAD_DIM_V, 1) + gl.expand_dims(d, 0)
    gl.store(ptrs, acc * gl.expand_dims(normaliser(l), 1), mask=gl.expand_dims(real, 1) & gl.expand_dims(d < HEAD_DIM_V, 0))
