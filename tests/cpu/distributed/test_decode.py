"""decode over a cache that lies on several ranks is decode over the whole cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flashtile.testing.distributed_caches import CacheCase, check_append, check_decode
from flashtile.testing.ranks import Ranks

LENGTHS = (0, 5, 17, 40, 100)  # none, on the first rank, over two, over all, more than there is room for
CASES = [
    CacheCase("contiguous", LENGTHS, 16),
    CacheCase("contiguous pages", LENGTHS, 16, page_size=4),
    CacheCase("pages that go round", LENGTHS, 16, page_size=4, interleave=4),
    CacheCase("runs that go round", LENGTHS, 16, interleave=2, softcap=5.0),
    CacheCase("several queries", LENGTHS, 16, seqlen_q=3),
    CacheCase("several queries, round", LENGTHS, 16, seqlen_q=5, page_size=2, interleave=2),
    CacheCase("several queries, not causal", LENGTHS, 16, seqlen_q=3, causal=False),
    CacheCase("window", LENGTHS, 16, window=(6, 0)),
    CacheCase("window to the right", LENGTHS, 16, seqlen_q=4, causal=False, window=(None, 1), interleave=4),
    CacheCase("window, several queries, round", LENGTHS, 16, seqlen_q=3, window=(9, 0), page_size=4, interleave=4),
    CacheCase("both windows", LENGTHS, 16, seqlen_q=3, causal=False, window=(7, 2)),
    CacheCase("ragged queries", LENGTHS, 16, seqlens_q=(1, 3, 0, 2, 4), spare_rows=2, sinks=True),
    CacheCase("ragged, window, round", LENGTHS, 16, seqlens_q=(1, 3, 0, 2, 4), spare_rows=1, window=(5, 0), interleave=2, sinks=True),
    CacheCase("sinks", LENGTHS, 16, sinks=True),
    CacheCase("alibi", LENGTHS, 16, alibi=True, sinks=True),
    CacheCase("alibi, several queries", LENGTHS, 16, seqlen_q=3, alibi=True),
    CacheCase("left padding", LENGTHS, 16, leftpad=True),
    CacheCase("left padding, several queries, round", LENGTHS, 16, seqlen_q=2, leftpad=True, page_size=4, interleave=4),
    CacheCase("bfloat16", LENGTHS, 16, dtype="bfloat16", seqlen_q=2, head_dim_v=32),
    CacheCase("heads shared out", LENGTHS, 16, num_heads_q=12, num_heads_kv=3, slow_link=True, seqlen_q=2),
    CacheCase("own heads", LENGTHS, 16, num_heads_q=12, num_heads_kv=3, own_heads=True),
    CacheCase("no sequence", (), 16),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_is_decode_of_the_whole(ranks_of: Callable[[int], Ranks], size: int, case: CacheCase) -> None:
    found = ranks_of(size).run(check_decode, case)
    if not case.own_heads:
        assert all(bits == found[0] for bits in found)  # each rank has merged the same parts in the same order


@pytest.mark.parametrize("interleave", [None, 4, 8])
@pytest.mark.parametrize("page_size", [0, 4])
@pytest.mark.parametrize("size", [2, 3])
def test_appends_go_to_the_rank_that_holds_the_position(
    ranks_of: Callable[[int], Ranks], size: int, page_size: int, interleave: int | None
) -> None:
    case = CacheCase("append", (0, 5, 14, 16 * size - 3), 16, interleave, page_size=page_size)
    held = ranks_of(size).run(check_append, case, 3, 4)
    assert [sum(counts) for counts in zip(*held)] == [min(n + 12, 16 * size) for n in case.seqlens_k]


def test_what_goes_round_grows_evenly(ranks_of: Callable[[int], Ranks]) -> None:
    case = CacheCase("append", (0,), 16, 4, page_size=4)
    assert ranks_of(2).run(check_append, case, 8, 2) == [[8], [8]]
