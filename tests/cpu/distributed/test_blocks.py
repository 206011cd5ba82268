"""Blocks see together what a band lets queries see, each pair once; the pairs of the paper model are those of the mask."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from flashtile.band import Band
from flashtile.distributed import SequenceShards, Workload
from flashtile.distributed.blocks import blocks_of

sides = st.none() | st.integers(0, 30)
lengths = st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25)), min_size=1, max_size=3)


@given(lengths, sides, sides, st.integers(1, 4), st.booleans())
def test_blocks_of_all_ranks_are_the_mask(
    lengths: list[tuple[int, int]], left: int | None, right: int | None, ranks: int, zigzag: bool
) -> None:
    band = Band(left, right)
    q_shards, k_shards = (SequenceShards(tuple(n), ranks, True, zigzag) for n in zip(*lengths))
    # (rows of all queries, rows of all keys): how often each pair is seen, and how often it should be
    seen = torch.zeros(q_shards.total, k_shards.total, dtype=torch.int32)
    for rank in range(ranks):
        for holder in range(ranks):
            q_rows, k_rows = torch.tensor(q_shards.rows(rank)), torch.tensor(k_shards.rows(holder))
            local = torch.zeros(len(q_rows), len(k_rows), dtype=torch.int32)
            for block in blocks_of(q_shards.parts(rank), k_shards.parts(holder), [n_k - n_q for n_q, n_k in lengths], band):
                q_row, k_row = block.q_row, block.k_row
                for num_q, num_k in zip(block.q_lengths, block.k_lengths):
                    local[q_row : q_row + num_q, k_row : k_row + num_k] += block.band.dense(num_q, num_k).int()
                    q_row, k_row = q_row + num_q, k_row + num_k
            if local.numel():
                seen[q_rows[:, None], k_rows[None]] += local
    expected = torch.block_diag(  # type: ignore[no-untyped-call]
        *(band.dense(n_q, n_k).int().view(n_q, n_k) for n_q, n_k in lengths)
    )
    assert torch.equal(seen, expected)
    work = Workload(ranks, 1, 1, q_shards.seqlens, k_shards.seqlens, band=band)
    assert work.pairs == int(expected.sum())


@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), st.integers(1, 5), st.booleans())
def test_shards_are_the_whole(seqlens: list[int], ranks: int, zigzag: bool) -> None:
    shards = SequenceShards.of_packed(seqlens, ranks, zigzag=zigzag)
    whole = torch.arange(sum(seqlens))
    cut = [shards.shard(whole, rank) for rank in range(ranks)]
    assert [len(rows) for rows in cut] == [shards.num_rows(rank) for rank in range(ranks)]
    assert torch.equal(shards.unshard(cut), whole)
    begins = torch.tensor([0, *seqlens]).cumsum(0)
    for rank, rows in enumerate(cut):
        sequence = torch.bucketize(rows, begins[1:], right=True)
        assert torch.equal(shards.positions(rank), rows - begins[sequence])


def test_zigzag_shares_a_causal_mask_evenly() -> None:
    ranks, shards = 4, SequenceShards.dense(64, 4)
    pairs = [
        sum(
            int(block.band.dense(block.num_q, block.num_k).sum())
            for holder in range(ranks)
            for block in blocks_of(shards.parts(rank), shards.parts(holder), [0], Band(None, 0))
        )
        for rank in range(ranks)
    ]
    assert len(set(pairs)) == 1
    assert sum(pairs) == 64 * 65 // 2


def test_a_causal_ring_makes_one_call_a_step() -> None:
    shards = SequenceShards.dense(64, 4)
    for rank in range(4):
        calls = [blocks_of(shards.parts(rank), shards.parts(holder), [0], Band(None, 0)) for holder in range(4)]
        assert all(len(blocks) == 1 for blocks in calls)
