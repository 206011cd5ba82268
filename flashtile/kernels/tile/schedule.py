"""Which work a program does: its sequence, key head and rows, and its share of the keys."""

import triton
import triton.language as tl


@triton.jit
def sequence_rows(lengths, b):
    """(first token of sequence b within its view, its number of queries): zero and seqlen_q unless packed."""
    if lengths.cu_seqlens_q is not None:
        start = tl.minimum(tl.maximum(tl.load(lengths.cu_seqlens_q + b), 0), lengths.total_q)
        end = tl.minimum(tl.maximum(tl.load(lengths.cu_seqlens_q + b + 1), start), lengths.total_q)
        return start, end - start
    else:
        return b * 0, lengths.seqlen_q


@triton.jit
def owned_rows(lengths, batch):
    """Tokens of q that belong to a sequence: a packed q may be longer than its last entry of cu_seqlens_q says."""
    if lengths.cu_seqlens_q is not None:
        return tl.minimum(tl.maximum(tl.load(lengths.cu_seqlens_q + batch), 0), lengths.total_q)
    else:
        return lengths.total_q


@triton.jit
def sequence_keys(lengths, b):
    """Sequence b's number of keys, clamped to the cache's capacity."""
    return tl.minimum(tl.maximum(tl.load(lengths.seqlens_k + b), 0), lengths.capacity)


@triton.jit
def split_keys(first, last, split, num_splits, min_keys_per_split, BLOCK_N: tl.constexpr):
    """[start, end): the split's share of [first, last), cut at multiples of BLOCK_N counted from key 0.

    Every sequence spreads over all splits as long as each gets min_keys_per_split, so that shorter ones than were
    planned for still run in parallel; keys are covered whatever the plan assumed.
    """
    first = first // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.maximum(last - first, 0), num_splits)
    share = tl.maximum(tl.cdiv(share, BLOCK_N) * BLOCK_N, min_keys_per_split)
    # 64-bit: the share times the split's number may leave 32 bits where the share is a large minimum
    start = tl.minimum(first + split.to(tl.int64) * share, last).to(tl.int32)
    end = tl.minimum(start.to(tl.int64) + share, last).to(tl.int32)
    return start, end
