"""Which rows a program takes, in what order, and what its producer tells its consumers about them.

Tiles of rows (sequence, query head, row block) have numbers. A program begins with the one of its own number, and takes
the next that nobody has from a counter, so that tiles of unlike lengths balance. Of packed queries the tiles of all sequences
form one line: a sequence without queries has none, and who looks for a tile only walks forward.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.kernels.gluon.forward_memory import NOTE, ROWS
from flashtile.kernels.tile.band import keys_of
from flashtile.kernels.tile.order import row_block_of
from flashtile.kernels.tile.schedule import sequence_rows

_LANES = gl.constexpr(32)  # of the producer, each of which looks at one sequence
_NOBODY = gl.constexpr(-1)


@gluon.jit
def tile_numbered(
    t, tokens, batch, num_heads, heads_at_once, walk, BLOCK_M: gl.constexpr, LAST_FIRST: gl.constexpr
):  # fmt: skip
    """Tile number ``t`` as (b, h, row block), b = -1 behind the last one; and how far the walk has come.

    ``walk`` is a sequence of packed queries and the number of its first tile, at or before ``t``. ``heads_at_once`` is at most the
    heads of a sequence where queries are packed, else of the batch.
    """
    b, start = walk
    if tokens.cu_seqlens_q is not None:
        b, start = _sequence_of(t, tokens, batch, num_heads, b, start, BLOCK_M)
        there = b < batch
        _, seqlen_q = sequence_rows(tokens, gl.minimum(b, batch - 1))
        row_blocks = gl.maximum(gl.cdiv(seqlen_q, BLOCK_M), 1)
        _, h, row_block = row_block_of(gl.where(there, t - start, 0), num_heads, 1, row_blocks, heads_at_once, LAST_FIRST)
        return gl.where(there, b, _NOBODY), h, row_block, (b, start)
    else:
        row_blocks = gl.cdiv(tokens.seqlen_q, BLOCK_M)
        there = t < batch * num_heads * row_blocks
        in_batch, h, row_block = row_block_of(gl.where(there, t, 0), num_heads, batch, row_blocks, heads_at_once, LAST_FIRST)
        return gl.where(there, in_batch, _NOBODY), h, row_block, (b, start)


@gluon.jit
def _sequence_of(t, tokens, batch, num_heads, b, start, BLOCK_M: gl.constexpr):
    """The sequence of packed queries that holds tile ``t``, ``batch`` if none does, and the number of its first tile."""
    lane = gl.arange(0, _LANES, gl.BlockedLayout([1], [_LANES], [1], [0]))
    ahead = batch > b
    while ahead:
        _, seqlen_q = sequence_rows(tokens, gl.minimum(b + lane, batch - 1))
        tiles = gl.where(b + lane < batch, gl.cdiv(seqlen_q, BLOCK_M) * num_heads, 0)
        passed = start + gl.associative_scan(tiles, 0, _add) <= t
        start += gl.sum(gl.where(passed, tiles, 0), 0)
        num_passed = gl.sum(passed.to(gl.int32), 0)
        b += num_passed
        ahead = (num_passed == _LANES) & (b < batch)
    return gl.minimum(b, batch), start


@gluon.jit
def _add(x, y):
    return x + y


@gluon.jit
def blocks_of_rows(band, row, seqlen_q, seqlen_k, NUM_ROWS: gl.constexpr, BLOCK_N: gl.constexpr):
    """[low, high) blocks of BLOCK_N keys that any of NUM_ROWS rows may see, never none: of no key, the block is masked whole."""
    offset = seqlen_k - seqlen_q
    last_row = gl.minimum(row + NUM_ROWS, seqlen_q) - 1
    first, last = keys_of(band, row + offset, last_row + offset, seqlen_k)
    low = first // BLOCK_N
    return low, gl.maximum(gl.cdiv(last, BLOCK_N), low + 1)


@gluon.jit
def whole_blocks(band, row, seqlen_q, seqlen_k, BLOCK_N: gl.constexpr):
    """[low, high): blocks of which each of a warpgroup's rows sees every key."""
    offset = seqlen_k - seqlen_q
    low = seqlen_k * 0
    high = seqlen_k
    if band.left is not None:
        low = gl.cdiv(gl.maximum(gl.minimum(row + ROWS, seqlen_q) - 1 + offset - band.left, 0), BLOCK_N)
    if band.right is not None:
        high = gl.maximum(gl.minimum(high - 1, row + offset + band.right) + 1, 0)
    return low, high // BLOCK_N


@gluon.jit
def keys_of_sequence(band, seqlen_q, seqlen_k):
    """[first, last) keys that any query of the sequence sees; there may be anything outside."""
    return keys_of(band, seqlen_k - seqlen_q, seqlen_k - 1, seqlen_k)


@gluon.jit
def write_note(note, b, h, row, row_start, seqlen_q, seqlen_k, turn, negated):
    """The producer's note to a consumer about a tile.

    Its sequence (-1: there are no more tiles), head and rows, the turn of its first block in the ring, and whether q is to
    be negated: what is the same for all tiles would be kept in registers from the start.
    """
    i = gl.arange(0, NOTE, gl.BlockedLayout([1], [32], [1], [0]))
    numbers = gl.where(i == 0, b, gl.where(i == 1, h, gl.where(i == 2, row, row_start)))
    others = gl.where(i == 4, seqlen_q, gl.where(i == 5, seqlen_k, gl.where(i == 6, turn, negated)))
    note.store(gl.where(i < 4, numbers, others))


@gluon.jit
def read_note(notes, tiles_done, C: gl.constexpr):
    """(b, h, row, row_start, seqlen_q, seqlen_k, turn, negated) of consumer C's rows of the tile.

    The last note stays until the next but one is written. So it is read again at a tile's end, which leaves its numbers'
    registers to the main loop.
    """
    # every thread has all numbers
    numbers = notes.index(2 * C + (tiles_done & 1)).load(gl.BlockedLayout([NOTE], [32], [4], [0]))
    row = _number(numbers, 2) + C * ROWS
    return (
        _number(numbers, 0), _number(numbers, 1), row, _number(numbers, 3),
        _number(numbers, 4), _number(numbers, 5), _number(numbers, 6), _number(numbers, 7),
    )  # fmt: skip


@gluon.jit
def _number(numbers, I: gl.constexpr):
    i = gl.arange(0, NOTE, numbers.type.layout)
    return gl.sum(gl.where(i == I, numbers, 0), 0)
