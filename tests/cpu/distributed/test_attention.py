"""Ring attention and head-parallel attention are attention of the whole, with its gradients, for every mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from flashtile.testing.distributed_sequences import SequenceCase, check_attention
from flashtile.testing.ranks import Ranks

CASES = [
    SequenceCase("causal", (24,)),
    SequenceCase("a length that nothing divides", (29,), head_dim_v=24),
    SequenceCase("in order", (29,), zigzag=False),
    SequenceCase("full", (26,), causal=False),
    SequenceCase("window", (37,), window=(5, 0)),
    SequenceCase("both windows", (37,), causal=False, window=(9, 4)),
    SequenceCase("window to the right", (23,), causal=False, window=(None, 7)),
    SequenceCase("wide window", (23,), window=(14, 0), zigzag=False),
    SequenceCase("more keys", (13,), seqlens_k=(31,)),
    SequenceCase("fewer keys", (31,), seqlens_k=(13,), window=(20, 0)),
    SequenceCase("fewer tokens than ranks", (2,)),
    SequenceCase("packed", (7, 0, 24, 3), packed=True),
    SequenceCase("packed, full, other keys", (7, 5, 12), seqlens_k=(9, 2, 17), packed=True, causal=False),
    SequenceCase("packed, window", (7, 19, 12), packed=True, window=(6, 0)),
    SequenceCase("packed, one", (21,), packed=True),
    SequenceCase("sinks", (24,), sinks=True),
    SequenceCase("packed, sinks, softcap", (11, 20), packed=True, sinks=True, softcap=3.0),
    SequenceCase("bfloat16", (64,), dtype="bfloat16", lse_gradient=False),
]  # fmt: skip
HEADS = {2: (4, 2), 3: (6, 3), 4: (8, 4)}  # of queries and keys, that so many ranks can share
ULYSSES = [
    SequenceCase("causal", (24,)),
    SequenceCase("window, in order", (29,), window=(9, 0), zigzag=False, head_dim_v=24),
    SequenceCase("packed", (7, 0, 24, 3), packed=True),
    SequenceCase("more keys", (13,), seqlens_k=(31,)),
    SequenceCase("everything else", (26,), causal=False, softcap=4.0, sinks=True, alibi=True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ring_is_attention_of_the_whole(ranks_of: Callable[[int], Ranks], size: int, case: SequenceCase) -> None:
    ranks_of(size).run(check_attention, case)


@pytest.mark.parametrize("case", ULYSSES, ids=lambda case: case.name)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ulysses_is_attention_of_the_whole(ranks_of: Callable[[int], Ranks], size: int, case: SequenceCase) -> None:
    heads_q, heads_kv = HEADS[size]
    ranks_of(size).run(check_attention, replace(case, method="ulysses", num_heads_q=heads_q, num_heads_kv=heads_kv))


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_the_same_bits_each_time(ranks_of: Callable[[int], Ranks], method: str) -> None:
    case = SequenceCase("again", (53,), window=(30, 0), method=method)
    first, second = (ranks_of(2).run(check_attention, case) for _ in range(2))
    assert first == second
