"""What a forward problem asks for, counted exactly: tiles of rows, pairs of query and key that see each other."""

from __future__ import annotations

from flashtile.problem import Problem


def row_tiles(problem: Problem, block_m: int) -> int:
    """Tiles of query rows over all sequences and query heads.

    Packed queries of unlike lengths count as one tile a sequence plus what all of their rows would fill.
    """
    even = problem.batch * -(-problem.seqlen_q // block_m)
    packed = problem.batch + -(-problem.total_q // block_m)
    return problem.num_heads_q * (min(even, packed) if problem.ragged_q else even)
