"""In which order a grid's programs take row blocks, where each has one (query head, row block) to itself.

Query heads, sequence by sequence, are taken in sections of so many heads that the keys of a section stay in the L2 cache
while its row blocks read them again and again. Within a section all heads have the same row block before the next one's
turn comes; heads of one key head are neighbours. Under a causal mask the last row block sees the most keys, and comes first, so
that no long one is left over when the others are done.
"""

import triton
import triton.language as tl


@triton.jit
def row_block_of(program, num_heads, batch, row_blocks, heads_at_once, LAST_FIRST: tl.constexpr):
    """(sequence, query head, row block) of a program of batch * num_heads * row_blocks."""
    section = program // (heads_at_once * row_blocks)
    first_head = section * heads_at_once
    width = tl.minimum(heads_at_once, batch * num_heads - first_head)
    at = program - first_head * row_blocks
    head = first_head + at % width
    row_block = row_blocks - 1 - at // width if LAST_FIRST else at // width
    return head // num_heads, head % num_heads, row_block
