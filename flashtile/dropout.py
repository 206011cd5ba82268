"""Which entries of the softmax are dropped: Philox-4x32-10, so that every kernel on every device drops the same ones.

An entry has the coordinates (sequence, query head, query, key); queries and keys are counted within their sequence, from 0. Four
entries share one evaluation, those whose queries and keys differ in bit 3 alone (a thread holds all four of them whichever way a matrix
instruction lays a tile out):

    key      the 64 bits of seed[0], the low word first
    counter  (query without its bit 3, key without its bit 3, sequence * query heads + query head, the low 32 bits of seed[1])
    word     2 * bit 3 of the query + bit 3 of the key

and an entry is kept where its word, as an unsigned number, is at least p * 2^32. The rest of the softmax is scaled by 1 / (1 - p).
Source: Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (2011).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_COUNTERS_AT_ONCE = 1 << 15  # which stay in a core's caches, and keep memory small
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def draw_seed(device: torch.device) -> torch.Tensor:
    """A seed, (2,) int64 on ``device``, from torch's generator of that device: nothing waits for it, and a CUDA graph may hold it."""
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)


def threshold_of(dropout_p: float) -> int:
    """The least word, of 32 bits, that keeps its entry."""
    return min(int(dropout_p * 2.0**32), _WORD)


def scale_of(dropout_p: float) -> float:
    """What an entry that is kept is multiplied by."""
    return 1.0 / (1.0 - dropout_p)


def philox(counter: Sequence[torch.Tensor], key: tuple[int, int]) -> list[torch.Tensor]:
    """The four words of each counter: int64 tensors that broadcast to one shape, each element below 2^32, as ``key`` is."""
    # Written in place: fresh memory for each of a hundred steps would take longer than the arithmetic.
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in counter))  # type: ignore[no-untyped-call]
    c0, c1, c2, c3 = (tensor.expand(shape).clone(memory_format=torch.contiguous_format) for tensor in counter)
    first, second = torch.empty_like(c0), torch.empty_like(c0)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # Products of 64 bits wrap around as int64, which keeps their bits. Of c1 and c3 the low words alone count.
        torch.mul(c0, _MULTIPLIERS[0], out=first)
        torch.mul(c2, _MULTIPLIERS[1], out=second)
        torch.bitwise_right_shift(second, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        torch.bitwise_right_shift(first, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        c1, second, c3, first = second, c1, first, c3
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return [c0, c1.bitwise_and_(_WORD), c2, c3.bitwise_and_(_WORD)]


def keep_mask(dropout_p: float, seed: torch.Tensor, streams: torch.Tensor, queries: range, keys: range) -> torch.Tensor:
    """Which entries are kept, bool (*streams.shape, queries, keys).

    ``seed`` is (2,) int64; ``streams`` int64 of any shape: sequence * query heads + query head; ``queries`` and ``keys`` are ranges
    of step 1 within their sequence.
    """
    first, offset = (int(number) for number in seed.tolist())
    device, shape = streams.device, streams.shape
    # whole blocks of 16, of which eight counters serve one
    row_blocks, column_blocks = _blocks_of(queries), _blocks_of(keys)
    columns = torch.arange(8 * column_blocks.start, 8 * column_blocks.stop, device=device)
    streams, offset_word = streams[..., None, None] & _WORD, torch.full((), offset & _WORD, dtype=torch.int64, device=device)
    kept = torch.empty((*shape, len(row_blocks), 2, 8, len(column_blocks), 2, 8), dtype=torch.bool, device=device)
    step = max(1, _COUNTERS_AT_ONCE // max(1, 64 * streams.numel() * len(column_blocks)))
    for start in range(0, len(row_blocks), step):
        blocks = row_blocks[start : start + step]
        rows = torch.arange(8 * blocks.start, 8 * blocks.stop, device=device)[:, None]
        words = philox((rows, columns, streams, offset_word), (first & _WORD, first >> 32 & _WORD))
        for i, word in enumerate(words):
            part = kept[..., start : start + len(blocks), i // 2, :, :, i % 2, :]
            part.copy_(word.view(part.shape) >= threshold_of(dropout_p))
    kept = kept.view(*shape, 16 * len(row_blocks), 16 * len(column_blocks))
    skipped_rows, skipped_columns = queries.start % 16, keys.start % 16
    return kept[..., skipped_rows : skipped_rows + len(queries), skipped_columns : skipped_columns + len(keys)]


def _blocks_of(positions: range) -> range:
    """Blocks of 16 that hold them."""
    return range(positions.start // 16, -(-positions.stop // 16))
