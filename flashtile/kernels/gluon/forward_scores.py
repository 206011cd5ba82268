"""From products to probabilities: layouts of a warpgroup's 64 rows, both products, masks, and the online softmax."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from flashtile.kernels.gluon.forward_memory import PANEL, ROWS, main_dim, rest_dim, tile_layout
from flashtile.kernels.gluon.names import barrier
from flashtile.kernels.tile.band import visible_keys
from flashtile.kernels.tile.softmax import LOG2E, softcapped

_CLEARED = gl.constexpr(16)  # keys at a time


@gluon.constexpr_function
def products_layout(columns):
    """Of 64 rows of a product: scores [64, keys], out [64, dim]."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def operand_layout(columns):
    """Of the first operand of a product with so many columns, in registers."""
    return gl.DotOperandLayout(0, products_layout(columns), 2)


@gluon.constexpr_function
def rows_layout(columns):
    """Of one number a row of a product."""
    return gl.SliceLayout(1, products_layout(columns))


@gluon.jit
def part_of(tile, rest, DIM: gl.constexpr):
    """The second part's columns of a tile that is held as a whole panel."""
    if rest_dim(DIM) < rest.shape[1]:
        return rest.slice(0, rest_dim(DIM), dim=1)
    else:
        return rest


@gluon.jit
def start_scores(q, k_ring, stage, BLOCK_N: gl.constexpr, DIM: gl.constexpr):
    """q k^T [64, BLOCK_N] on its way. ``q`` are both parts, in shared memory or in registers."""
    _, k_tiles, _, k_rest = k_ring
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, products_layout(BLOCK_N))
    s = warpgroup_mma(q[0], k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    if rest_dim(DIM) > 0:
        rest = part_of(k_tiles, k_rest.index(stage), DIM)
        s = warpgroup_mma(q[1], rest.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def start_values(p, v_ring, stage, o, DIM: gl.constexpr):
    """o + p v in both parts on its way."""
    _, v_tiles, _, v_rest = v_ring
    main = warpgroup_mma(p, v_tiles.index(stage), o[0], is_async=True)
    if rest_dim(DIM) > 0:
        operand = gl.convert_layout(p, operand_layout(rest_dim(DIM)))
        return main, warpgroup_mma(operand, part_of(v_tiles, v_rest.index(stage), DIM), o[1], is_async=True)
    else:
        return main, o[1]


@gluon.jit
def wait_for_scores(s, DIM_V: gl.constexpr):
    """The scores, while the products with values that were started behind them go on."""
    AFTER: gl.constexpr = 2 if rest_dim(DIM_V) > 0 else 1
    return warpgroup_mma_wait(AFTER, deps=(s,))


@gluon.jit
def wait_for_values(o, p, DIM_V: gl.constexpr):
    """Both parts of o, and ``p`` as it is from here on."""
    if rest_dim(DIM_V) > 0:
        main, rest, p = warpgroup_mma_wait(0, deps=(o[0], o[1], p))
        return (main, rest), p
    else:
        main, p = warpgroup_mma_wait(0, deps=(o[0], p))
        return (main, o[1]), p


@gluon.jit
def rescaled(o, alpha, DIM_V: gl.constexpr):
    """Both parts of o, each row times its alpha."""
    main = o[0] * _by_row(alpha, main_dim(DIM_V))
    if rest_dim(DIM_V) > 0:
        return main, o[1] * _by_row(alpha, rest_dim(DIM_V))
    else:
        return main, o[1]


@gluon.jit
def rescaled_where_grown(o, alpha, DIM_V: gl.constexpr):
    """``rescaled``, by warps: one of whose rows every alpha is 1 leaves them alone, without asking the others."""
    main = _rescaled_by_warp(o[0], alpha, main_dim(DIM_V))
    if rest_dim(DIM_V) > 0:
        return main, _rescaled_by_warp(o[1], alpha, rest_dim(DIM_V))
    else:
        return main, o[1]


@gluon.jit
def _by_row(alpha, COLUMNS: gl.constexpr):
    return gl.expand_dims(gl.convert_layout(alpha, rows_layout(COLUMNS)), 1)


@gluon.jit
def _rescaled_by_warp(o, alpha, COLUMNS: gl.constexpr):
    """The branch is in assembly: of Triton's own, all warps would have to take the same way, and meet to find out which."""
    HELD: gl.constexpr = ROWS * COLUMNS // 128
    factors, o = gl.broadcast(_by_row(alpha, COLUMNS), o)
    return gl.inline_asm_elementwise(_scaling(HELD), _scaling_operands(HELD), [o, factors], dtype=gl.float32, is_pure=True, pack=HELD)


@gluon.constexpr_function
def _scaling(held):
    """Multiplies ``held`` numbers of a thread, of two rows by turns, unless all factors of the warp are 1."""
    multiply = "".join(f"mul.f32 ${i}, ${i}, ${2 * held + i}; " for i in range(held))
    return (
        "{ .reg .pred first, grown; "
        f"setp.neu.f32 first, ${2 * held}, 0f3F800000; setp.neu.or.f32 grown, ${2 * held + 2}, 0f3F800000, first; "
        "vote.sync.any.pred grown, grown, 0xffffffff; @!grown bra kept; "
        f"{multiply}kept: }}"
    )


@gluon.constexpr_function
def _scaling_operands(held):
    """Results, what they are before, in the same registers, and factors."""
    return ",".join(["=f"] * held + [str(i) for i in range(held)] + ["f"] * held)


@gluon.jit
def shaped(s, scores, factor, slope, position, key, BLOCK_N: gl.constexpr):
    """Scores in base 2 with softcap and ALiBi, where there are any; else as they are. ``position`` is the first row's."""
    if scores.softcap is not None or scores.slopes is not None:
        s = s * factor
    if scores.softcap is not None:
        s = softcapped(s, scores.softcap * LOG2E)
    if scores.slopes is not None:
        at, n = _places(position, key, BLOCK_N)
        s = s - slope * gl.abs(n - at).to(gl.float32)
    return s


@gluon.jit
def masked(s, band, position, key, seqlen_k, BLOCK_N: gl.constexpr):
    """-inf for keys that a row does not see, and for those behind the last."""
    return gl.where(seen_keys(band, position, key, seqlen_k, BLOCK_N), s, float("-inf"))


@gluon.jit
def seen_keys(band, position, key, seqlen_k, BLOCK_N: gl.constexpr):
    """Which of BLOCK_N keys each of 64 rows sees."""
    at, n = _places(position, key, BLOCK_N)
    lowest, highest = visible_keys(band, at, 0, seqlen_k)
    seen = n <= highest
    if band.left is not None:
        seen = seen & (n >= lowest)
    return seen


@gluon.jit
def clear_values(v_ring, stage, key, first, last, BLOCK_N: gl.constexpr, DIM: gl.constexpr):
    """Overwrites values of keys outside [first, last) in a block by zeros: no row sees them, but 0 x NaN is NaN.

    Every warpgroup does so before it reads the block. They write the same, so that it does not matter who comes first.
    """
    _, main, _, rest = v_ring
    PANELS: gl.constexpr = main.shape[2] // PANEL
    for part in range(BLOCK_N // _CLEARED):
        at = key + part * _CLEARED
        if (at < first) | (at + _CLEARED > last):
            for panel in gl.static_range(PANELS):
                _clear_rows(main, (stage * PANELS + panel) * (BLOCK_N // _CLEARED) + part, at, first, last)
            if rest_dim(DIM) > 0:
                _clear_rows(rest, stage * (BLOCK_N // _CLEARED) + part, at, first, last)
    fence_async_shared()
    barrier()


@gluon.jit
def _clear_rows(tiles, number, at, first, last):
    """Clears rows of a panel. Where a panel's rows lie one after another, 16 of them are a small tile."""
    COUNT: gl.constexpr = tiles.shape[0] * tiles.shape[1] * tiles.shape[2] // (_CLEARED * PANEL)
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = tiles._reinterpret(tiles.dtype, [COUNT, _CLEARED, PANEL], tile_layout(_CLEARED, PANEL, tiles.dtype)).index(number)
    key = at + gl.arange(0, _CLEARED, gl.SliceLayout(1, L))
    rows.store(gl.where(gl.expand_dims((key >= first) & (key < last), 1), rows.load(L), 0.0))


@gluon.jit
def on_pages(s, bits, BLOCK_N: gl.constexpr, BOX_ROWS: gl.constexpr):
    """-inf for keys of pages that the cache does not have: a bit for each box of the block says whether it has."""
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, products_layout(BLOCK_N)))
    there = (bits >> (n // BOX_ROWS)) & 1
    return gl.where(gl.expand_dims(there == 1, 0), s, float("-inf"))


@gluon.jit
def _places(position, key, BLOCK_N: gl.constexpr):
    """Key positions of the rows [64, 1] and of the keys [1, BLOCK_N]."""
    L: gl.constexpr = products_layout(BLOCK_N)
    at = position + gl.arange(0, ROWS, gl.SliceLayout(1, L))
    return gl.expand_dims(at, 1), gl.expand_dims(key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, L)), 0)


@gluon.jit
def lane_sums(p, BLOCK_N: gl.constexpr):
    """Row sums [64, 4], apart for the four lanes that share a row: additions of a lane's own numbers, until the last block is done."""
    return gl.sum(gl.sum(gl.reshape(p, [ROWS, BLOCK_N // 8, 4, 2]), 3), 1)


@gluon.jit
def row_sums(l, BLOCK_N: gl.constexpr):
    """Of lane_sums: (64,)."""
    return gl.convert_layout(gl.sum(l, 1), rows_layout(BLOCK_N))


@gluon.jit
def lowest_maximum(factor):
    """Where maxima begin: finite, so that -inf minus a maximum is never NaN, also once multiplied by ``factor``."""
    return -3.0e38 / gl.maximum(factor, 1.0)


@gluon.jit
def first_softmax(s, factor, BLOCK_N: gl.constexpr):
    """Of a tile's first block: (maxima (64,), lane sums, probabilities); maxima are of scores before ``factor`` >= 0.

    A row that has seen no key yet has the lowest maximum and the sum 0.
    """
    m = gl.maximum(gl.max(s, 1), lowest_maximum(factor))
    p = gl.exp2(s * factor - gl.expand_dims(m * factor, 1))
    return m, lane_sums(p, BLOCK_N), p


@gluon.jit
def next_softmax(s, m, l, factor, BLOCK_N: gl.constexpr, RESCALE_LOG2: gl.constexpr):
    """(m, l, probabilities, what o is scaled by) with another block.

    A row's maximum is kept until it grows by 2**RESCALE_LOG2, so that o is seldom scaled; probabilities may be that large.
    """
    largest = gl.max(s, 1)
    if RESCALE_LOG2 > 0:
        m_new = gl.where((largest - m) * factor > RESCALE_LOG2, largest, m)
    else:
        m_new = gl.maximum(m, largest)
    alpha = gl.exp2((m - m_new) * factor)
    p = gl.exp2(s * factor - gl.expand_dims(m_new * factor, 1))
    by_lane = gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, l.type.layout)), 1)
    return m_new, l * by_lane + lane_sums(p, BLOCK_N), p, alpha
