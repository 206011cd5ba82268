"""What is known of tiles ahead of their use: the keys that rows may see, a split's tiles, the line's next tile and its place."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.kernels.gluon.ring import place_of
from flashtile.kernels.tile.band import keys_of
from flashtile.kernels.tile.schedule import behind_padding, next_unit, sequence_keys, sequence_rows, split_keys


@gluon.jit
def visible_to_rows(lengths, band, b, row_block, seqlen_q, seqlen_k, GROUP: gl.constexpr, BLOCK_M: gl.constexpr):
    """[first, last) keys that any row of the block may see."""
    offset = seqlen_k - seqlen_q
    first_position = row_block * BLOCK_M // GROUP
    last_position = gl.minimum((row_block * BLOCK_M + BLOCK_M - 1) // GROUP, seqlen_q - 1)
    first, last = keys_of(band, first_position + offset, last_position + offset, seqlen_k)
    return behind_padding(lengths, b, first, last)


@gluon.jit
def unit_of_split(num_heads_kv, row_blocks):
    """(sequence, key head, row block, split, splits) of a program on the grid of splits; the last splits come first."""
    program, num_splits = gl.program_id(0), gl.num_programs(1)
    unit = program // row_blocks
    return unit // num_heads_kv, unit % num_heads_kv, program % row_blocks, num_splits - 1 - gl.program_id(1), num_splits


@gluon.jit
def tiles_of_split(
    lengths, band, b, row_block, seqlen_q, seqlen_k, split, num_splits, min_keys_per_split,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SPLIT: gl.constexpr, IN_TURN: gl.constexpr,
):  # fmt: skip
    """(first, last, key, step, count): what the rows may see, and the split's tiles, ``step`` keys apart from ``key`` on.

    IN_TURN: the splits take the tiles in turn.
    """
    first, last = visible_to_rows(lengths, band, b, row_block, seqlen_q, seqlen_k, GROUP, BLOCK_M)
    if IN_TURN:
        first_tile = first // BLOCK_N
        key = (first_tile + split) * BLOCK_N
        step = num_splits * BLOCK_N
        count = gl.cdiv(gl.maximum(gl.cdiv(last, BLOCK_N) - first_tile - split, 0), num_splits)
    else:
        key, end = split_keys(first, last, split, num_splits, min_keys_per_split, BLOCK_N)
        step = split * 0 + BLOCK_N
        count = gl.where(end > key, gl.cdiv(end - key, BLOCK_N), 0)
    if not SPLIT:
        # somebody writes the rows of a sequence that sees no key
        count = gl.maximum(count, 1)
    if row_block * BLOCK_M >= seqlen_q * GROUP:
        count = count * 0
    return first, last, key, step, count


@gluon.jit
def next_tile(
    lengths, band, batch, num_heads_kv, unit, position,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, UNIT_COST: gl.constexpr,
):  # fmt: skip
    """The next tile's unit and position on the line."""
    b, h, row_block, start, row_blocks, first_tile, tiles = unit
    position += 1
    if position == start + tiles:
        b, h, row_block, start, row_blocks, first_tile, tiles = next_unit(
            lengths, band, batch, num_heads_kv, b, h, row_block, start, row_blocks, first_tile, tiles, GROUP, BLOCK_M, BLOCK_N, UNIT_COST
        )
        position = start
    return (b, h, row_block, start, row_blocks, first_tile, tiles), position


@gluon.jit
def place_ahead(
    lengths, band, pages, unit, position,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Where a tile of the line lies, as ``place_of`` has it."""
    b, _, row_block, start, _, first_tile, _ = unit
    first, last = b, b
    if PAGE_SIZE > 0:
        _, seqlen_q = sequence_rows(lengths, b)
        first, last = visible_to_rows(lengths, band, b, row_block, seqlen_q, sequence_keys(lengths, b), GROUP, BLOCK_M)
    return place_of(pages, b, (first_tile + position - start) * BLOCK_N, first, last, BLOCK_N, PAGE_SIZE, NUM_WARPS)
