"""Which keys a query sees: the one place with mask arithmetic on the device (Band in flashtile/band.py is its oracle)."""

import triton
import triton.language as tl


@triton.jit
def visible(band, position, key):
    """Whether a query at key position ``position`` (its own index plus seqlen_k - seqlen_q) sees ``key``; broadcasts."""
    seen = (key >= 0) & (position == position)
    if band.left is not None:
        seen = seen & (key - position >= -band.left)
    if band.right is not None:
        seen = seen & (key - position <= band.right)
    return seen


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
