"""Which entries of the softmax are dropped (flashtile/dropout.py says which, and is the oracle).

Four entries whose queries and keys differ in bit 3 alone share one evaluation of Philox: a thread holds all four whichever way a matrix
instruction lays the tile out, so that they need not be passed between threads.
"""

import triton
import triton.language as tl


@triton.jit
def kept(dropout, stream, query, key, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """[QUERIES, KEYS] whether the entries from (query, key) on are kept; both are multiples of 16 within their sequence.

    ``stream`` is the sequence times the number of query heads, plus the query head.
    """
    # (QUERIES / 2,), (KEYS / 2,)
    row = query // 2 + tl.arange(0, QUERIES // 2)
    column = key // 2 + tl.arange(0, KEYS // 2)
    first, second, third, fourth = _words(dropout, stream, row[:, None], column[None, :])
    return _blocks_of_16(first, second, third, fourth, QUERIES, KEYS)


@triton.jit
def kept_transposed(dropout, stream, query, key, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """``kept`` as [KEYS, QUERIES]."""
    # (QUERIES / 2,), (KEYS / 2,)
    row = query // 2 + tl.arange(0, QUERIES // 2)
    column = key // 2 + tl.arange(0, KEYS // 2)
    first, second, third, fourth = _words(dropout, stream, row[None, :], column[:, None])
    return _blocks_of_16(first, third, second, fourth, KEYS, QUERIES)


@triton.jit
def _words(dropout, stream, row, column):
    """Whether the four entries of each counter are kept; ``row`` and ``column`` broadcast to a tile."""
    zero = row * 0 + column * 0
    offset = tl.load(dropout.seed + 1).to(tl.uint32)
    first, second, third, fourth = tl.philox(
        tl.load(dropout.seed), (zero + row).to(tl.uint32), (zero + column).to(tl.uint32), (zero + stream).to(tl.uint32),
        zero.to(tl.uint32) + offset,
    )  # fmt: skip
    return first >= dropout.threshold, second >= dropout.threshold, third >= dropout.threshold, fourth >= dropout.threshold


@triton.jit
def _blocks_of_16(first, second, third, fourth, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of four tiles of half the rows and columns: rows r and r + 8 of 16 are (first, third), columns (first, second)."""
    # [ROWS / 2, COLUMNS / 2, bit 3 of the column, bit 3 of the row]
    tile = tl.join(tl.join(first, second), tl.join(third, fourth))
    tile = tl.reshape(tile, [ROWS // 16, 8, COLUMNS // 16, 8, 2, 2])
    return tl.reshape(tl.permute(tile, (0, 5, 1, 2, 4, 3)), [ROWS, COLUMNS])
