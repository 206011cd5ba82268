"""What each rank of a test does where a rank makes another call, or dies."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

import flashtile
from flashtile import distributed as parallel
from flashtile.distributed import CacheShards, SequenceShards


def disagree(what: str) -> None:
    """Rank 1 makes a call that does not go with the others'; nobody may hang."""
    rank, size = dist.get_rank(), dist.get_world_size()
    odd = rank == 1
    q, k = torch.randn(1, 4, 4, 16), torch.randn(1, 4, 2, 16)
    lengths = torch.tensor([6], dtype=torch.int32)
    if what == "heads":
        parallel.attention(q, k[:, :, :1] if odd else k, k[:, :, :1] if odd else k, causal=True)
    elif what == "rows":
        parallel.attention(q, k[:, :3] if odd else k, k[:, :3] if odd else k, causal=True)
    elif what == "mask":
        parallel.attention(q, k, k, causal=not odd)
    elif what == "world size":
        parallel.attention(q, k, k, SequenceShards.dense(4 * size, size + 1), causal=True)
    elif what == "capacity":
        parallel.decode(q[:, :1], k[:, :3] if odd else k, k[:, :3] if odd else k, lengths)
    elif what == "decode world size":
        parallel.decode(q[:, :1], k, k, lengths, CacheShards(size + 1))
    elif what == "kind of call":
        parallel.decode(q[:, :1], k, k, lengths) if odd else parallel.attention(q, k, k)
    else:
        raise ValueError(what)


def die(where: str) -> str:
    """The last rank dies; what the others see of it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == size - 1:
        os._exit(1)
    q = torch.randn(1, 8, 4, 16)
    try:
        parallel.attention(q, q, q, causal=True, check=where == "check", method="ring" if where != "ulysses" else "ulysses")
    except flashtile.CommunicationError as error:
        return str(error)
    raise AssertionError("nothing was noticed")
