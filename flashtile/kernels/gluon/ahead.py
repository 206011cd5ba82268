"""What is asked for ahead of its use: the keys that rows may see, and the next tile of the line with its place in memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.kernels.gluon.ring import place_of
from flashtile.kernels.tile.band import keys_of
from flashtile.kernels.tile.schedule import next_unit, sequence_keys, sequence_rows


@gluon.jit
def visible_to_rows(band, row_block, seqlen_q, seqlen_k, GROUP: gl.constexpr, BLOCK_M: gl.constexpr):
    """[first, last) keys that any row of the block may see."""
    offset = seqlen_k - seqlen_q
    first_position = row_block * BLOCK_M // GROUP
    last_position = gl.minimum((row_block * BLOCK_M + BLOCK_M - 1) // GROUP, seqlen_q - 1)
    return keys_of(band, first_position + offset, last_position + offset, seqlen_k)


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
        first, last = visible_to_rows(band, row_block, seqlen_q, sequence_keys(lengths, b), GROUP, BLOCK_M)
    return place_of(pages, b, (first_tile + position - start) * BLOCK_N, first, last, BLOCK_N, PAGE_SIZE, NUM_WARPS)
