"""Which keys a query sees: the one place with mask arithmetic on the device (Band in flashtile/band.py is its oracle)."""

import triton
import triton.language as tl


@triton.jit
def visible_keys(band, position, first, last):
    """[lowest, highest] key that a query at key position ``position`` (its own index plus seqlen_k - seqlen_q) sees in [first, last)."""
    lowest = position * 0 + first
    highest = position * 0 + last - 1
    if band.left is not None:
        lowest = tl.maximum(lowest, position - band.left)
    if band.right is not None:
        highest = tl.minimum(highest, position + band.right)
    return lowest, highest


@triton.jit
def keys_of(band, first_position, last_position, seqlen_k):
    """[first, last) keys that any query between two positions may see."""
    first = seqlen_k * 0
    last = seqlen_k
    if band.left is not None:
        first = tl.maximum(first, tl.minimum(first_position - band.left, seqlen_k))
    if band.right is not None:
        last = tl.maximum(first, tl.minimum(last, last_position + band.right + 1))
    return first, last


@triton.jit
def whole_tiles(band, first_position, last_position, first, last, BLOCK_N: tl.constexpr):
    """[start, end) of the tiles of BLOCK_N keys, counted from key 0, that every query between two positions sees whole.

    ``first`` and ``last`` are what ``keys_of`` gives for them. Both bounds lie among the tiles that [first, last) touches.
    """
    lowest, _ = visible_keys(band, last_position, first, last)
    _, highest = visible_keys(band, first_position, first, last)
    first_tile = first // BLOCK_N
    last_tile = tl.maximum(tl.cdiv(last, BLOCK_N), first_tile)
    start = tl.minimum(tl.cdiv(lowest, BLOCK_N), last_tile)
    return start, tl.minimum(tl.maximum((highest + 1) // BLOCK_N, start), last_tile)
