"""Which work a program does: its sequence, key head and rows, and its share of the keys.

Either a grid of programs has one for each split of each unit (sequence, key head, row block), or some number of programs
share all units evenly (stream-K, Osama et al. 2023): the key tiles of all units, sequence by sequence, head by head, row
block by row block, form one line, of which each program walks a stretch. What happens where follows from the lengths on
the device alone, so that every program works it out for itself.

A unit takes UNIT_COST positions on the line before its first tile: the time that a program spends on beginning and ending
one. Nothing happens there.

Functions on the line make no vector of their own: they take one (``n``), in whatever layout the caller's language wants.
"""

import triton
import triton.language as tl

from flashtile.kernels.tile.band import keys_of

_SEQUENCES_AT_ONCE = (32, 128, 512)


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
def behind_padding(lengths, b, first, last):
    """Sequence b's keys [first, last) without those of its left padding, if it has any."""
    if lengths.leftpad_k is not None:
        first = tl.maximum(first, tl.minimum(tl.load(lengths.leftpad_k + b), last))
    return first, last


@triton.jit
def key_room(tokens, b):
    """(first key of sequence b within its view of k, the keys that it has room for), of a TokensView."""
    if tokens.cu_seqlens_k is not None:
        start = tl.minimum(tl.maximum(tl.load(tokens.cu_seqlens_k + b), 0), tokens.total_k)
        end = tl.minimum(tl.maximum(tl.load(tokens.cu_seqlens_k + b + 1), start), tokens.total_k)
        return start, end - start
    else:
        return b * 0, tokens.seqlen_k


@triton.jit
def stored_keys(tokens, b):
    """(first key of sequence b within its view of k, its number of keys), of a TokensView."""
    start, seqlen_k = key_room(tokens, b)
    if tokens.seqused_k is not None:
        seqlen_k = tl.minimum(tl.maximum(tl.load(tokens.seqused_k + b), 0), seqlen_k)
    return start, seqlen_k


@triton.jit
def owned_keys(tokens, batch):
    """Rows of a packed k that belong to a sequence: those beyond are nobody's."""
    return tl.minimum(tl.maximum(tl.load(tokens.cu_seqlens_k + batch), 0), tokens.total_k)


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


def sequences_at_once(batch: int) -> int:
    """Sequences whose lengths the functions below look at in one vector: few sizes, so that few kernels are compiled."""
    return next((size for size in _SEQUENCES_AT_ONCE if size >= batch), _SEQUENCES_AT_ONCE[-1])


@triton.jit
def unit_tiles(lengths, band, b, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(row blocks, first tile, tiles) of sequence b: the tiles of BLOCK_N keys, counted from key 0, that any of its queries may see.

    ``b`` is a scalar or a vector. A sequence whose queries see no key has one tile, so that somebody writes its rows; one
    without queries has no row blocks. Without packed queries, row blocks are a scalar whatever ``b`` is.
    """
    _, seqlen_q = sequence_rows(lengths, b)
    seqlen_k = sequence_keys(lengths, b)
    first, last = keys_of(band, seqlen_k - seqlen_q, seqlen_k - 1, seqlen_k)
    first, last = behind_padding(lengths, b, first, last)
    first_tile = first // BLOCK_N
    tiles = tl.maximum(tl.cdiv(last - first_tile * BLOCK_N, BLOCK_N), 1)
    return tl.cdiv(seqlen_q * GROUP, BLOCK_M), first_tile, tiles


@triton.jit
def line_length(
    lengths, band, batch, num_heads_kv, n,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT_COST: tl.constexpr, ONE_STEP: tl.constexpr,
):  # fmt: skip
    """How many tiles the units of the whole batch have: the length of the line that programs share.

    ``n`` is the vector 0, 1, ... of ``sequences_at_once`` sequences, ONE_STEP where that is all of the batch.
    """
    total = batch * 0
    if ONE_STEP:
        total += tl.sum(_tiles_of(lengths, band, batch, num_heads_kv, n, GROUP, BLOCK_M, BLOCK_N, UNIT_COST), 0)
    else:
        for base in tl.range(0, batch, n.shape[0], num_stages=1):
            total += tl.sum(_tiles_of(lengths, band, batch, num_heads_kv, base + n, GROUP, BLOCK_M, BLOCK_N, UNIT_COST), 0)
    return total


@triton.jit
def unit_at(
    lengths, band, batch, num_heads_kv, n, position,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT_COST: tl.constexpr, ONE_STEP: tl.constexpr,
):  # fmt: skip
    """The unit that holds a position of the line, 0 <= position < line_length (any other gives some unit that exists).

    A unit is a tuple of scalars (b, h, row block, start, row blocks, first tile, tiles): its sequence, key head and row
    block; its positions [start, start + tiles) on the line, of which the first is tile ``first tile`` of the keys; and
    how many row blocks its sequence has.
    """
    b = batch * 0
    start = batch * 0
    if ONE_STEP:
        b, start, _ = _sequences_before(
            lengths, band, batch, num_heads_kv, n, position, b, start, batch * 0, GROUP, BLOCK_M, BLOCK_N, UNIT_COST
        )
    else:
        seen = batch * 0
        for base in tl.range(0, batch, n.shape[0], num_stages=1):
            b, start, seen = _sequences_before(
                lengths, band, batch, num_heads_kv, base + n, position, b, start, seen, GROUP, BLOCK_M, BLOCK_N, UNIT_COST
            )
    b = tl.minimum(b, batch - 1)
    row_blocks, first_tile, tiles = unit_tiles(lengths, band, b, GROUP, BLOCK_M, BLOCK_N)
    index = (position - start) // (tiles + UNIT_COST)
    blocks = tl.maximum(row_blocks, 1)
    return b, index // blocks, index % blocks, start + index * (tiles + UNIT_COST) + UNIT_COST, row_blocks, first_tile, tiles


@triton.jit
def unit_span(
    lengths, band, batch, num_heads_kv, n, b, h, row_block,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT_COST: tl.constexpr, ONE_STEP: tl.constexpr,
):  # fmt: skip
    """[start, end) of a unit's tiles on the line; empty if its sequence has no such row block."""
    before = batch * 0
    if ONE_STEP:
        before += tl.sum(tl.where(n < b, _tiles_of(lengths, band, batch, num_heads_kv, n, GROUP, BLOCK_M, BLOCK_N, UNIT_COST), 0), 0)
    else:
        for base in tl.range(0, b, n.shape[0], num_stages=1):
            tiles = _tiles_of(lengths, band, batch, num_heads_kv, base + n, GROUP, BLOCK_M, BLOCK_N, UNIT_COST)
            before += tl.sum(tl.where(base + n < b, tiles, 0), 0)
    row_blocks, _, tiles = unit_tiles(lengths, band, b, GROUP, BLOCK_M, BLOCK_N)
    start = before + (h * row_blocks + row_block) * (tiles + UNIT_COST) + UNIT_COST
    return start, tl.where(row_block < row_blocks, start + tiles, start)


@triton.jit
def next_unit(
    lengths, band, batch, num_heads_kv, b, h, row_block, start, row_blocks, first_tile, tiles,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT_COST: tl.constexpr,
):  # fmt: skip
    """The unit behind this one, as ``unit_at`` gives it; behind the last one, no unit to be used."""
    start += tiles + UNIT_COST
    row_block += 1
    if row_block == row_blocks:
        row_block = row_block * 0
        h += 1
        if h == num_heads_kv:
            h = h * 0
            row_blocks = row_blocks * 0
            while (row_blocks == 0) & (b < batch - 1):
                b += 1
                row_blocks, first_tile, tiles = unit_tiles(lengths, band, b, GROUP, BLOCK_M, BLOCK_N)
    return b, h, row_block, start, row_blocks, first_tile, tiles


@triton.jit
def share(total, program, num_programs):
    """[start, end): the program's even share of the line. A line shorter than the programs are many is left to the first of them."""
    busy = _busy(total, num_programs)
    # program * total // busy without leaving 32 bits: programs are fewer than 2^16
    each, rest = total // busy, (total % busy).to(tl.uint32)
    start = program * each + (program.to(tl.uint32) * rest // busy.to(tl.uint32)).to(tl.int32)
    end = (program + 1) * each + ((program + 1).to(tl.uint32) * rest // busy.to(tl.uint32)).to(tl.int32)
    return tl.minimum(start, total), tl.minimum(end, total)


@triton.jit
def holder(total, position, num_programs):
    """The program whose share holds a position of the line: the last whose share starts there or before."""
    return (((position.to(tl.int64) + 1) * _busy(total, num_programs) - 1) // tl.maximum(total, 1)).to(tl.int32)


@triton.jit
def slot_of(program, program_start, unit_start):
    """Where a program leaves its part of a unit that it does not hold whole.

    Only its first unit and its last can be such: the first, which it may have entered midway, has slot 2 * program.
    """
    return 2 * program + (unit_start > program_start).to(tl.int32)


@triton.jit
def _busy(total, num_programs):
    """Programs that have a share: no more than there are positions."""
    return tl.maximum(tl.minimum(total, num_programs), 1)


@triton.jit
def _tiles_of(
    lengths, band, batch, num_heads_kv, b, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT_COST: tl.constexpr
):
    """Positions of all units of each sequence of a vector; 0 beyond the batch."""
    row_blocks, _, tiles = unit_tiles(lengths, band, tl.minimum(b, batch - 1), GROUP, BLOCK_M, BLOCK_N)
    return tl.where(b < batch, (tiles + UNIT_COST) * row_blocks * num_heads_kv, 0)


@triton.jit
def _sequences_before(
    lengths, band, batch, num_heads_kv, b, position, count, start, seen,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT_COST: tl.constexpr,
):  # fmt: skip
    """Of a vector of sequences, adds those that end at or before ``position``: their number, their tiles; and the tiles of all.

    ``seen`` are the tiles of all sequences before the vector. Sequences without units end where they start, so that they
    count as passed if what follows them holds the position.
    """
    tiles = _tiles_of(lengths, band, batch, num_heads_kv, b, GROUP, BLOCK_M, BLOCK_N, UNIT_COST)
    passed = seen + tl.cumsum(tiles, 0) <= position
    return count + tl.sum(passed.to(tl.int32), 0), start + tl.sum(tl.where(passed, tiles, 0), 0), seen + tl.sum(tiles, 0)
