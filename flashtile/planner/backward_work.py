"""What a backward problem asks for, counted: the forward's counts, of the problem itself and as its keys see it."""

from __future__ import annotations

from flashtile.planner.backward_tiles import Owner, PassTile
from flashtile.planner.forward_work import mean_keys, row_tiles
from flashtile.problem import Problem


def seen_by(problem: Problem, owner: Owner) -> Problem:
    """The problem whose queries are what a pass owns: itself, or with keys and queries exchanged and the band transposed.

    Packed keys are taken to fill their sequences as much as the packed queries do.
    """
    if owner == "queries":
        return problem
    total = problem.batch * problem.seqlen_k
    if problem.ragged_k and problem.total_q < problem.batch * problem.seqlen_q:
        total = -(-total * problem.total_q // (problem.batch * problem.seqlen_q))
    return problem.with_(
        seqlen_q=problem.seqlen_k,
        total_q=total,
        seqlen_k=problem.seqlen_q,
        num_heads_q=problem.num_heads_kv,
        band=problem.band.transposed(),
        ragged_q=problem.ragged_k,
        ragged_k=problem.ragged_q,
    )


def typical_keys(problem: Problem) -> float:
    """Keys that a query sees on average, in packed sequences that fill what the longest would as their total says."""
    filled = problem.total_q / max(1, problem.batch * problem.seqlen_q) if problem.ragged_q else 1.0
    return min(1.0, filled) * mean_keys(problem)


def owned_tiles(problem: Problem, tile: PassTile) -> int:
    """Tiles of what a pass owns, over all sequences and the heads of it: a program each."""
    return row_tiles(seen_by(problem, tile.owner), tile.owned)
