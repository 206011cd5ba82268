"""What goes wrong is said on every rank, and nobody hangs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flashtile.testing.distributed_faults import die, disagree
from flashtile.testing.ranks import RankFailed, Ranks


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("heads", "k: expected the same on every rank"),
        ("rows", "k: expected (batch, 4"),
        ("mask", "causal: expected the same on every rank, got True on rank 0, False on rank 1"),
        ("world size", "shards: expected as many ranks as the group has"),
        ("capacity", "capacity: expected the same on every rank, got 4 on rank 0, 3 on rank 1"),
        ("decode world size", "shards: expected as many ranks as the group has"),
        ("kind of call", "on every rank"),
    ],
)
@pytest.mark.parametrize("size", [2, 3])
def test_calls_that_differ_begin_nowhere(ranks_of: Callable[[int], Ranks], size: int, what: str, named: str) -> None:
    with pytest.raises(RankFailed) as failed:
        ranks_of(size).run(disagree, what)
    for error in failed.value.errors:
        assert error is not None, "a rank has not noticed"
        assert error[0] in ("ArgumentError", "ShapeError")
        assert named in error[1]


@pytest.mark.parametrize("where", ["check", "ring", "ulysses"])
def test_a_rank_that_dies_is_noticed(where: str) -> None:
    with Ranks(3 if where == "ring" else 2, timeout=5.0) as ranks, pytest.raises(RankFailed) as failed:
        ranks.run(die, where)
    *others, dead = failed.value.errors
    assert dead == ("EOFError", "the process has died")
    assert others == [None] * len(others), failed.value
