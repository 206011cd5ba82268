"""Two warps that ask for the pages of every tile, one for K's and one for V's, so that the warps that multiply need not.

They walk the same tiles as those do. A tile of several pages is a box for each page: K's and V's count into one barrier, and
the tile's place in the ring is free again when the warps that multiply are done with it. Which pages exist these learn from a
number beside the ring. To ask takes one warp as long as half an SM takes to read what it asks for: hence two.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from flashtile.kernels.gluon.ahead import next_tile, tiles_of_split, unit_of_split, visible_to_rows
from flashtile.kernels.tile.cache import is_page, page_of
from flashtile.kernels.tile.schedule import line_length, sequence_keys, sequence_rows, share, unit_at


@gluon.jit
def ask_on_line(
    view, boxes, signs, lengths, pages, band, num_heads_kv, batch, OF_KEYS: gl.constexpr,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr, SEQUENCES: gl.constexpr,
    ONE_STEP: gl.constexpr, UNIT_COST: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Asks for K or V of this program's share of the line of all tiles, in its order. ``signs``: full, empty, known."""
    n = gl.arange(0, SEQUENCES, gl.BlockedLayout([SEQUENCES // 32], [32], [1], [0]))
    total = line_length(lengths, band, batch, num_heads_kv, n, GROUP, BLOCK_M, BLOCK_N, UNIT_COST, ONE_STEP)
    begin, stop = share(total, gl.program_id(0), gl.num_programs(0))
    unit = unit_at(lengths, band, batch, num_heads_kv, n, begin, GROUP, BLOCK_M, BLOCK_N, UNIT_COST, ONE_STEP)
    position = gl.maximum(begin, unit[3])
    ids = _tile_on_line(lengths, band, pages, unit, position, stop, GROUP, BLOCK_M, BLOCK_N, PAGE_SIZE)
    done = position * 0
    while position < stop:
        h = unit[1]
        unit, position = next_tile(lengths, band, batch, num_heads_kv, unit, position, GROUP, BLOCK_M, BLOCK_N, UNIT_COST)
        # the next tile's page ids come while this one's place is waited for
        next_ids = _tile_on_line(lengths, band, pages, unit, position, stop, GROUP, BLOCK_M, BLOCK_N, PAGE_SIZE)
        _ask(view, boxes, signs, pages, done, h, ids, OF_KEYS, BLOCK_N, PAGE_SIZE, STAGES)
        ids = next_ids
        done += 1


@gluon.jit
def ask_for_split(
    view, boxes, signs, lengths, pages, band, num_heads_kv, row_blocks, min_keys_per_split, OF_KEYS: gl.constexpr,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, IN_TURN: gl.constexpr,
):  # fmt: skip
    """Asks for K or V of this program's share of its unit's tiles, on a grid of splits."""
    b, h, row_block, split, num_splits = unit_of_split(num_heads_kv, row_blocks)
    _, seqlen_q = sequence_rows(lengths, b)
    first, last, key, step, count = tiles_of_split(
        lengths, band, b, row_block, seqlen_q, sequence_keys(lengths, b), split, num_splits, min_keys_per_split,
        GROUP, BLOCK_M, BLOCK_N, SPLIT, IN_TURN,
    )  # fmt: skip
    ids = _pages_of_tile(pages, b, key, first, last, BLOCK_N, PAGE_SIZE)
    for done in range(count):
        key += step
        next_ids = _pages_of_tile(pages, b, key, first, last, BLOCK_N, PAGE_SIZE)
        _ask(view, boxes, signs, pages, done, h, ids, OF_KEYS, BLOCK_N, PAGE_SIZE, STAGES)
        ids = next_ids


@gluon.jit
def on_pages(s, known, stage, n, BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """Scores s of a tile's keys n, -inf where there is no such page."""
    bits = gl.max(known.index(stage).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)
    if bits != (1 << BLOCK_N // PAGE_SIZE) - 1:
        s = gl.where((bits >> (n // PAGE_SIZE)) & 1 != 0, s, float("-inf"))
    return s


@gluon.jit
def _tile_on_line(
    lengths, band, pages, unit, position, stop, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr
):
    """The ids of a tile's pages; none of a tile beyond ``stop``."""
    b, _, row_block, start, _, first_tile, _ = unit
    key = (first_tile + position - start) * BLOCK_N
    first, last = b * 0, b * 0
    if position < stop:
        _, seqlen_q = sequence_rows(lengths, b)
        first, last = visible_to_rows(lengths, band, b, row_block, seqlen_q, sequence_keys(lengths, b), GROUP, BLOCK_M)
    return _pages_of_tile(pages, b, key, first, last, BLOCK_N, PAGE_SIZE)


@gluon.jit
def _pages_of_tile(pages, b, key, first, last, BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """The ids of a tile's pages; -1, which reads as zeros, for pages without a key in [first, last)."""
    ids = ()
    for i in gl.static_range(BLOCK_N // PAGE_SIZE):
        at = key + i * PAGE_SIZE
        ids = ids + (page_of(pages, b, at, (at + PAGE_SIZE > first) & (at < last), PAGE_SIZE),)
    return ids


@gluon.jit
def _ask(
    view, boxes, signs, pages, done, h, ids, OF_KEYS: gl.constexpr, BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr, STAGES: gl.constexpr
):
    """Asks for K's or V's part of the program's tile number ``done``; with K's goes word which of its pages exist."""
    full, empty, known = signs
    PAGES: gl.constexpr = BLOCK_N // PAGE_SIZE
    stage = done % STAGES
    mbarrier.wait(empty.index(stage), ((done // STAGES) & 1) ^ 1)
    if OF_KEYS:
        bits = done * 0
        for i in gl.static_range(PAGES):
            bits += is_page(pages, ids[i]).to(gl.int32) << i
        known.index(stage).store(gl.full([1], bits, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.expect(full.index(stage), PAGES * view.block_type.nbytes)
    for i in gl.static_range(PAGES):
        tma.async_copy_global_to_shared(view, [ids[i], 0, h, 0], full.index(stage), boxes.index(stage).slice(i * PAGE_SIZE, PAGE_SIZE, 1))
