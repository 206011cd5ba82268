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


def philox(counter: Sequence[torch.Tensor], key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The four words of each counter: int64 tensors that broadcast to one shape, each element below 2^32, as ``key`` is."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # products of 64 bits wrap around as int64, which keeps their bits
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (second >> 32 & _WORD) ^ c1 ^ k0, second & _WORD
        c2, c3 = (first >> 32 & _WORD) ^ c3 ^ k1, first & _WORD
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return c0, c1, c2, c3


def keep_mask(dropout_p: float, seed: torch.Tensor, streams: torch.Tensor, queries: range, keys: range) -> torch.Tensor:
    """Which entries are kept, bool (*streams.shape, queries, keys).

    ``seed`` is (2,) int64; ``streams`` int64 of any shape: sequence * query heads + query head; ``queries`` and ``keys`` are ranges
    of step 1 within their sequence.
    """
    first, offset = (int(number) for number in seed.tolist())
    streams, device = streams[..., None, None] & _WORD, streams.device
    # whole blocks of 16, of which eight counters serve one
    rows = torch.arange(queries.start // 16 * 8, -(-queries.stop // 16) * 8, device=device)[:, None]
    columns = torch.arange(keys.start // 16 * 8, -(-keys.stop // 16) * 8, device=device)
    nothing = torch.zeros((), dtype=torch.int64, device=device)
    words = philox((rows, columns, streams, nothing + (offset & _WORD)), (first & _WORD, first >> 32 & _WORD))
    kept = torch.stack([word >= threshold_of(dropout_p) for word in words])
    # (bit 3 of query, of key, *streams, query // 16, query % 8, key // 16, key % 8)
    kept = kept.view(2, 2, *streams.shape[:-2], rows.shape[0] // 8, 8, columns.shape[0] // 8, 8)
    kept = kept.movedim((0, 1), (-5, -2)).flatten(-6, -4).flatten(-3, -1)
    skipped_rows, skipped_columns = queries.start % 16, keys.start % 16
    return kept[..., skipped_rows : skipped_rows + len(queries), skipped_columns : skipped_columns + len(keys)]
