"""DTensors in, DTensors out: what of their placements is for the ring, and what each rank does by itself."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch

from flashtile.distributed.sequence_shards import SequenceShards
from flashtile.errors import ArgumentError, ShapeError, UnsupportedError, message

Local = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "SequenceShards | None", Any], tuple[torch.Tensor, torch.Tensor]]
"""q, k and v of this rank, how their positions are cut (None: not at all), and the group over which they are, to out and lse."""


def is_dtensor(x: object) -> bool:
    """Whether x is a DTensor; torch's module for them is not imported for it."""
    return hasattr(x, "placements") and hasattr(x, "to_local")


def attention_of_dtensors(q: Any, k: Any, v: Any, replicated: bool, attend: Local) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse as DTensors, placed like q (batch, seqlen, heads, dim).

    Batch and heads may be cut over any dimensions of the mesh, which needs no transfers; positions over one. They are cut as DTensors
    are, in order and evenly: under a causal mask the ranks with late positions have more to do. ``replicated`` says that there are
    tensors beside q, k and v that have all heads.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    for name, x in (("k", k), ("v", v)):
        if not is_dtensor(x) or x.device_mesh != q.device_mesh or tuple(x.placements) != tuple(q.placements):
            got = getattr(x, "placements", type(x).__name__)
            raise ArgumentError(message(name, f"a DTensor on q's mesh, placed {tuple(q.placements)}", got, "Use redistribute(...)."))
    allowed = (Replicate(), Shard(0), Shard(1), Shard(2))
    along = [dim for dim, placement in enumerate(q.placements) if placement == Shard(1)]
    if q.ndim != 4 or len(along) > 1 or any(placement not in allowed for placement in q.placements):
        fix = "Cut positions over one dimension of the mesh, and batch or heads over the others."
        raise ArgumentError(message("q", "(batch, seqlen, heads, dim), placed Replicate or Shard(0..2)", q.placements, fix))
    mesh = q.device_mesh
    if Shard(2) in q.placements:
        ways = [mesh.size(dim) for dim, placement in enumerate(q.placements) if placement == Shard(2)]
        if any(x.shape[2] % prod(ways) for x in (q, k)) or replicated:
            why = "each rank needs whole groups of heads, and no sinks or slopes of all heads"
            raise UnsupportedError("These DTensors cannot be cut by heads.", {"Shard(2)": [why]})
    shards, group = None, None
    if along:
        size = mesh.size(along[0])
        if any(x.shape[1] % size for x in (q, k)):
            fix = "Pad it, or pass plain tensors with SequenceShards, which take any length."
            raise ShapeError(message("q", f"a multiple of {size} positions", q.shape[1], fix))
        shards, group = SequenceShards.dense(q.shape[1], size, zigzag=False), mesh.get_group(along[0])
        if k.shape[1] != q.shape[1]:
            raise ShapeError(message("k", f"q's {q.shape[1]} positions", k.shape[1], "Pass plain tensors with SequenceShards."))
    out, lse = attend(q.to_local(), k.to_local(), v.to_local(), shards, group)
    swapped = {Shard(1): Shard(2), Shard(2): Shard(1)}
    of_lse = [swapped.get(placement, placement) for placement in q.placements]
    return DTensor.from_local(out, mesh, q.placements), DTensor.from_local(lse, mesh, of_lse)
