"""What a forward problem asks for, counted: tiles of rows, key tiles that they walk, pairs of query and key that see each other.

Sequences count as if all were as long as the longest, and packed queries by their total. All counts are exact and take the
same time whatever the lengths are.
"""

from __future__ import annotations

from typing import NamedTuple

from flashtile.band import Band
from flashtile.problem import Problem


def row_tiles(problem: Problem, block_m: int) -> int:
    """Tiles of query rows over all sequences and query heads.

    Packed queries of unlike lengths count as one tile a sequence plus what all of their rows would fill.
    """
    even = problem.batch * -(-problem.seqlen_q // block_m)
    if problem.ragged_q:
        even = min(even, problem.batch + -(-problem.total_q // block_m))
    return problem.num_heads_q * even


def visible_pairs(problem: Problem) -> int:
    """Pairs (query, key) of one sequence and head that see each other."""
    return _keys_below(problem, 1, _above(problem.band, problem, 1), 1) - _keys_below(problem, 1, _below(problem.band, problem), 1)


def mean_keys(problem: Problem) -> float:
    """Keys that a query sees on average."""
    return visible_pairs(problem) / problem.seqlen_q if problem.seqlen_q else 0.0


def walked_tiles(problem: Problem, block_m: int, block_n: int) -> int:
    """Key tiles of ``block_n`` that all row tiles of one sequence and head walk: from the first key that any row sees to the last."""
    ends = _keys_below(problem, block_m, _above(problem.band, problem, block_m), block_n)
    # a started tile is walked from its first key: rounding down is rounding up one tile less a key earlier
    starts = _keys_below(problem, block_m, _below(problem.band, problem) - block_n + 1, block_n)
    return ends - starts


class TileKinds(NamedTuple):
    """Key tiles of all row tiles of one sequence and head, and how many of them only some rows see whole."""

    walked: int
    masked: int


def tile_kinds(problem: Problem, block_m: int, block_n: int) -> TileKinds:
    """``walked_tiles``, and those of them that need a mask; counted one row tile after the other."""
    band, seqlen_q, seqlen_k = problem.band, problem.seqlen_q, problem.seqlen_k
    offset = seqlen_k - seqlen_q
    walked = whole = 0
    for row in range(0, seqlen_q, block_m):
        top, bottom = row + offset, min(row + block_m, seqlen_q) - 1 + offset
        first = 0 if band.left is None else max(0, top - band.left)
        last = seqlen_k if band.right is None else max(0, min(seqlen_k, bottom + band.right + 1))
        all_first = 0 if band.left is None else max(0, bottom - band.left)
        all_last = seqlen_k if band.right is None else max(0, min(seqlen_k, top + band.right + 1))
        if last > first:
            walked += -(-last // block_n) - first // block_n
            whole += max(0, all_last // block_n - -(-all_first // block_n))
    return TileKinds(walked, walked - whole)


_NEVER = -(2**62)
_ALWAYS = 2**62


def _above(band: Band, problem: Problem, block_m: int) -> int:
    """One more than the last key that the last row of the first tile sees, before it is clamped to the keys that there are."""
    return _ALWAYS if band.right is None else block_m + problem.seqlen_k - problem.seqlen_q + band.right


def _below(band: Band, problem: Problem) -> int:
    """The first key that the first row sees, before it is clamped."""
    return _NEVER if band.left is None else problem.seqlen_k - problem.seqlen_q - band.left


def _keys_below(problem: Problem, block_m: int, first: int, block_n: int) -> int:
    """Sum over row tiles i of ceil(x / block_n), where x = first + i * block_m is clamped to [0, seqlen_k]."""
    count, most = -(-problem.seqlen_q // block_m), problem.seqlen_k
    none = min(count, max(0, -first // block_m + 1))  # tiles whose x is 0 or less
    unclamped = min(count, max(none, -(-(most - first) // block_m)))  # tiles before x reaches seqlen_k
    middle = unclamped - none
    sloped = _floor_sum(middle, block_n, block_m, first + none * block_m + block_n - 1) if middle else 0
    return sloped + (count - unclamped) * -(-most // block_n)


def _floor_sum(count: int, divisor: int, step: int, start: int) -> int:
    """Sum of floor((start + i * step) / divisor) for i in [0, count); all arguments are at least 0. Euclid's steps."""
    total = 0
    while True:
        total += count * (count - 1) // 2 * (step // divisor) + count * (start // divisor)
        step, start = step % divisor, start % divisor
        reached = count * step + start
        if reached < divisor:
            return total
        count, start = divmod(reached, divisor)
        divisor, step = step, divisor
