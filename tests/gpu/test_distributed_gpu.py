"""Attention over two GPUs by NCCL: the tests of Gloo's processes, on heads that Hopper's kernels take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flashtile.testing.distributed_caches import CacheCase, check_append, check_decode, replay_decode
from flashtile.testing.distributed_sequences import SequenceCase, check_attention
from flashtile.testing.ranks import Ranks

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
LENGTHS = (0, 100, 700, 2000, 9000)
HEADS: dict[str, Any] = {"num_heads_q": 8, "num_heads_kv": 2, "head_dim": 128, "head_dim_v": 128, "dtype": "bfloat16"}
CACHES = [
    CacheCase("contiguous", LENGTHS, 1024, **HEADS),
    CacheCase("pages that go round", LENGTHS, 1024, page_size=64, interleave=64, **HEADS),
    CacheCase("small pages, several queries", LENGTHS, 1024, page_size=16, interleave=16, seqlen_q=4, **HEADS),
    CacheCase("several queries", LENGTHS, 1024, seqlen_q=4, sinks=True, **HEADS),
    CacheCase("window", LENGTHS, 1024, seqlen_q=2, window=(300, 0), **HEADS),
    CacheCase("ragged queries", LENGTHS, 1024, seqlens_q=(1, 3, 0, 2, 4), spare_rows=2, **HEADS),
    CacheCase("alibi", LENGTHS, 1024, alibi=True, **HEADS),
    CacheCase("heads shared out", LENGTHS, 1024, slow_link=True, **HEADS),
    CacheCase("own heads", LENGTHS, 1024, own_heads=True, **HEADS),
    CacheCase("float32", LENGTHS, 1024, seqlen_q=2),
]
SEQUENCES = [
    SequenceCase("causal", (1024,), lse_gradient=False, **HEADS),
    SequenceCase("causal, any length", (1013,), **HEADS),
    SequenceCase("full", (900,), causal=False, **HEADS),
    SequenceCase("window", (1500,), window=(400, 0), **HEADS),
    SequenceCase("packed", (300, 0, 700, 64), packed=True, **HEADS),
    SequenceCase("sinks, softcap", (512,), sinks=True, softcap=5.0, **HEADS),
    SequenceCase("heads by all-to-all", (1024,), method="ulysses", **HEADS),
    SequenceCase("packed, heads by all-to-all", (300, 700, 64), packed=True, method="ulysses", alibi=True, **HEADS),
    SequenceCase("float32", (200,)),
]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2, "nccl", timeout=60.0) as started:
        yield started


@pytest.mark.parametrize("case", CACHES, ids=lambda case: case.name)
def test_decode_is_decode_of_the_whole(ranks: Ranks, case: CacheCase) -> None:
    found = ranks.run(check_decode, case)
    assert case.own_heads or found[0] == found[1]


@pytest.mark.parametrize("case", SEQUENCES, ids=lambda case: case.name)
def test_attention_is_attention_of_the_whole(ranks: Ranks, case: SequenceCase) -> None:
    assert ranks.run(check_attention, case) == ranks.run(check_attention, case)  # the same bits each time


@pytest.mark.parametrize("interleave", [None, 64])
def test_appends_go_to_the_rank_that_holds_the_position(ranks: Ranks, interleave: int | None) -> None:
    case = CacheCase("append", (0, 100, 1020, 2040), 1024, interleave, page_size=64, head_dim=128)
    held = ranks.run(check_append, case, 3, 4)
    assert [sum(counts) for counts in zip(*held)] == [min(n + 12, 2048) for n in case.seqlens_k]


def test_decode_in_a_graph_replays_with_other_lengths(ranks: Ranks) -> None:
    ranks.run(replay_decode)
