"""The paper model: bytes that are sent, what hides them, and what it then chooses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import distributed_paper
from flashtile.band import Band
from flashtile.distributed import NETWORK_400G, NVLINK, Link, SequenceShards, Workload, choose, explain_exchange
from flashtile.distributed.choose import ring, ulysses
from flashtile.errors import ArgumentError, UnsupportedError
from flashtile.planner.device import Device

H200 = Device.named("h200")
LONG = Workload(8, 32, 8, (131072,), band=Band(None, 0))


def test_bytes_of_a_ring() -> None:
    """Each rank passes on everyone's keys but the last it gets: 7 shards of 16384 x 8 heads x 256 elements x 2 bytes."""
    shard = 131072 // 8 * 8 * 256 * 2
    assert ring(LONG, NVLINK, H200).bytes_sent == 7 * shard
    training = Workload(8, 32, 8, (131072,), training=True)
    # backward again, and float32 sums of gradients, which begin at the second rank and end at home
    assert ring(training, NVLINK, H200).bytes_sent == 2 * 7 * shard + 7 * 2 * shard


def test_bytes_of_an_all_to_all() -> None:
    """Seven eighths of this rank's q, k, v and out."""
    rows = 131072 // 8
    assert ulysses(LONG, NVLINK, H200).bytes_sent == pytest.approx(7 / 8 * rows * (2 * 8 + 2 * 32) * 128 * 2)


def test_a_long_ring_hides_its_transfers_and_a_short_one_does_not() -> None:
    long, short = (ring(Workload(8, 32, 8, (n,)), NETWORK_400G, H200) for n in (1 << 20, 1 << 13))
    assert long.overlap == 1.0 and long.speedup > 7.5
    assert short.overlap < 0.2 and short.speedup < 2.0


def test_two_gpus_of_a_host_are_nearly_twice_one() -> None:
    forward = ring(Workload(2, 16, 16, (131072,)), NVLINK, H200)
    training = ring(Workload(2, 16, 16, (65536,), training=True), NVLINK, H200)
    assert forward.speedup > 1.85 and training.speedup > 1.8


def test_order_matters_under_a_causal_mask() -> None:
    even, odd = (ring(Workload(8, 32, 8, (1 << 20,), zigzag=zigzag), NVLINK, H200) for zigzag in (True, False))
    assert odd.compute_s / even.compute_s == pytest.approx(15 / 8, rel=0.02)  # folds aside, the last of 8 shards has 15 of 64 halves


def test_choice_says_why() -> None:
    choice = choose(Workload(16, 32, 8, (131072,)))
    assert choice.method == "ring"
    assert choice.reasons["ulysses"] == ["8 key heads cannot be shared evenly by 16 ranks"]
    assert any("not possible" in line for line in choice.lines()) and any("ring (chosen)" in line for line in choice.lines())
    few = choose(Workload(8, 64, 64, (8192,)), Link("slow", 5e9, 5e-6))
    assert few.method == "ulysses" or few.estimates[0].total_s <= few.estimates[1].total_s
    assert choose(Workload(8, 32, 8, (4096,), alibi=True)).method == "ulysses"
    assert choose(Workload(3, 32, 8, (4096,), alibi=True)).method == ""


def test_exchange_of_partials_is_chosen_by_bytes() -> None:
    one = explain_exchange(1, 32, 128, 2)
    assert (one.kind, one.gather_bytes) == ("gather", 32 * 129 * 4)
    many = explain_exchange(4096, 32, 128, 8)
    assert many.kind == "scatter" and many.scatter_bytes < many.gather_bytes / 5
    assert explain_exchange(4096, 30, 128, 8).kind == "gather"
    assert explain_exchange(1, 32, 128, 8, own_heads=True).kind == "scatter"
    assert any("fewer bytes" in line for line in many.lines())
    with pytest.raises(UnsupportedError, match="evenly"):
        explain_exchange(1, 30, 128, 8, own_heads=True)


def test_the_page_shows_what_the_model_says() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "several-gpus.md").read_text(encoding="utf-8")
    expected = f"<!-- paper -->\n{distributed_paper.table()}\n<!-- end -->"
    assert expected in text, f"docs/several-gpus.md should read:\n{expected}"


def test_ranks_that_cannot_be_are_named() -> None:
    with pytest.raises(ArgumentError, match="num_ranks: expected a positive count, got 0"):
        explain_exchange(1, 8, 64, 0)
    with pytest.raises(ArgumentError, match="rank: expected 0 to 1, got 5"):
        SequenceShards.dense(8, 2).shard(torch.zeros(1, 8, 2, 8), 5)
