"""Pairwise covers: few combinations of many axes in which every two values of two axes meet at least once."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

_TRIES = 8  # rows built for each row that is kept

Pair = tuple[int, int, int, int]  # (axis, its value's index, later axis, its value's index)


def pairwise(axes: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Rows (one value an axis) that cover every pair of values of every two axes; the same for the same seed.

    Greedy: each row starts from a pair that is still missing and takes, axis by axis in random order, the value that
    meets most of what it still lacks. The cover is small, not the smallest.
    """
    rng = random.Random(seed)
    names = list(axes)
    sizes = [len(axes[name]) for name in names]
    missing: dict[Pair, None] = {
        (a, i, b, j): None for a, b in combinations(range(len(names)), 2) for i in range(sizes[a]) for j in range(sizes[b])
    }
    rows: list[dict[str, Any]] = []
    while missing:
        tried = [_row(rng, sizes, missing) for _ in range(_TRIES)]
        best = max(tried, key=lambda row: sum(pair in missing for pair in _pairs(row)))
        for pair in _pairs(best):
            missing.pop(pair, None)
        rows.append({name: axes[name][value] for name, value in zip(names, best, strict=True)})
    return rows


def _row(rng: random.Random, sizes: list[int], missing: dict[Pair, None]) -> list[int]:
    a, i, b, j = rng.choice(list(missing))
    chosen = {a: i, b: j}
    for axis in rng.sample(range(len(sizes)), len(sizes)):
        if axis not in chosen:
            gains = [sum(_pair(axis, value, *other) in missing for other in chosen.items()) for value in range(sizes[axis])]
            chosen[axis] = rng.choice([value for value, gain in enumerate(gains) if gain == max(gains)])
    return [chosen[axis] for axis in range(len(sizes))]


def _pair(a: int, i: int, b: int, j: int) -> Pair:
    return (a, i, b, j) if a < b else (b, j, a, i)


def _pairs(row: list[int]) -> list[Pair]:
    return [(a, row[a], b, row[b]) for a, b in combinations(range(len(row)), 2)]
