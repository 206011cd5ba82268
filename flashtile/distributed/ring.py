"""Ring attention: queries stay, keys and values travel round the ring while attention over those that are here is computed.

After Liu, Zaharia, Abbeel (Ring Attention with Blockwise Transformers, 2023); the order of chunks that gives every rank as much to do
under a causal mask is `SequenceShards.zigzag`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from flashtile.distributed.blocks import Block, blocks_of
from flashtile.distributed.groups import Members
from flashtile.distributed.ring_steps import Gradients, Results, Rows, attend, differentiate, nothing_seen, of_key_heads
from flashtile.distributed.scores import Scores
from flashtile.distributed.sequence_shards import SequenceShards
from flashtile.distributed.transport import Flight


class Ring(NamedTuple):
    """Who takes part, and how queries and keys lie over the ranks."""

    members: Members
    q_shards: SequenceShards
    k_shards: SequenceShards

    def holder(self, step: int) -> int:
        """Whose keys are here at a step; at step 0 this rank's own."""
        return (self.members.rank - step) % self.members.size

    def blocks(self, step: int, scores: Scores) -> list[Block]:
        """The calls of a step."""
        offsets = [n_k - n_q for n_q, n_k in zip(self.q_shards.seqlens, self.k_shards.seqlens)]
        return blocks_of(self.q_shards.parts(self.members.rank), self.k_shards.parts(self.holder(step)), offsets, scores.band)

    def rooms(self, k: torch.Tensor, v: torch.Tensor, step: int, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for the keys and values of ``step``, or for their gradients."""
        rows = self.k_shards.num_rows(self.holder(step))
        shapes = ((*x.shape[:-3], rows, *x.shape[-2:]) for x in (k, v))
        of_k, of_v = (x.new_empty(shape, dtype=dtype or x.dtype) for x, shape in zip((k, v), shapes))
        return of_k, of_v


def ring_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ring: Ring, scores: Scores) -> Results:
    """out, float32, and lse of this rank's queries over everyone's keys. Nothing follows a gradient."""
    results: Results | None = None
    keys = (k.contiguous(), v.contiguous())
    for step in range(ring.members.size):
        flight, rooms = None, keys
        if step + 1 < ring.members.size:
            rooms = ring.rooms(k, v, step + 1)
            flight = Flight(keys, rooms, ring.members, f"step {step + 1} of ring attention")
        for block in ring.blocks(step, scores):
            results = attend(q, *keys, block, scores, results)
        if flight is not None:
            flight.land()
        keys = rooms
    return nothing_seen(q, v) if results is None else results


def ring_backward(rows: Rows, k: torch.Tensor, v: torch.Tensor, ring: Ring, scores: Scores) -> Gradients:
    """float32 gradients of this rank's q, k and v.

    Sums of dk and dv travel a step behind their keys: what the ranks before have added arrives while this rank computes its own
    share, and after a whole round they are home. Of what this rank's own keys need, half of the heads are computed while the first keys
    arrive, and the other half while the sums come home: so both transfers hide behind something.
    """
    own = Gradients(*(torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format) for x in (rows.q, k, v)))
    keys, sums, last = (k.contiguous(), v.contiguous()), (own.dk, own.dv), ring.members.size - 1
    half = k.shape[-2] // 2
    for step in range(ring.members.size):
        flights, rooms, before = [], keys, None
        if step < last:
            rooms = ring.rooms(k, v, step + 1)
            flights.append(Flight(keys, rooms, ring.members, f"step {step + 1} of ring attention's backward pass"))
        if step == 0:
            _differentiate_own(rows, k, v, ring, scores, own, 0, half)
        else:
            if step > 1:
                before = ring.rooms(k, v, step, torch.float32)
                flights.append(Flight(sums, before, ring.members, f"the gradients of step {step} of ring attention"))
            sums = torch.zeros_like(keys[0], dtype=torch.float32), torch.zeros_like(keys[1], dtype=torch.float32)
            for block in ring.blocks(step, scores):
                differentiate(rows, *keys, block, scores, Gradients(own.dq, *sums))
        for flight in flights:
            flight.land()
        if before is not None:
            _add(sums, before)
        keys = rooms
    home = ring.rooms(k, v, 0, torch.float32) if last else None
    homeward = None if home is None else Flight(sums, home, ring.members, "the last step of ring attention's gradients")
    _differentiate_own(rows, k, v, ring, scores, own, half, k.shape[-2] - half)
    if homeward is not None and home is not None:
        homeward.land()
        _add((own.dk, own.dv), home)
    return own


def _differentiate_own(
    rows: Rows, k: torch.Tensor, v: torch.Tensor, ring: Ring, scores: Scores, own: Gradients, first: int, count: int
) -> None:
    """Adds the gradients of ``count`` key heads, and of the query heads that share them, over this rank's own keys."""
    if not count:
        return
    part, k, v, sums = of_key_heads(rows, k, v, own, first, count)
    for block in ring.blocks(0, scores):
        differentiate(part, k, v, block, scores, sums)


def _add(totals: tuple[torch.Tensor, torch.Tensor], parts: tuple[torch.Tensor, torch.Tensor]) -> None:
    for total, part in zip(totals, parts):
        total += part


class RingAttention(torch.autograd.Function):
    """out and lse of this rank's queries, with gradients for q, k, v and sinks."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, ring: Ring, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = ring_with_sinks(q, k, v, sinks, ring, scores)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.ring, ctx.scores = ring, scores
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        # Other ranks take part whether or not a gradient flows here: so it is computed in any case.
        dout = torch.zeros_like(out) if dout is None else dout
        sums = ring_backward(Rows(q, out, lse, dout, dlse), k, v, ctx.ring, ctx.scores)
        dsinks = _sinks_gradient(sinks, out, lse, dout, dlse) if sinks is not None and ctx.needs_input_grad[3] else None
        return sums.dq.to(q.dtype), sums.dk.to(k.dtype), sums.dv.to(v.dtype), dsinks, None, None


def ring_with_sinks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, ring: Ring, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """out in q's dtype and lse; a sink joins the denominator once, after all keys."""
    out, lse = ring_forward(q, k, v, ring, scores)
    if sinks is not None:
        whole = torch.logaddexp(lse, sinks[:, None])
        out *= torch.exp(lse - whole).transpose(-1, -2).unsqueeze(-1)
        lse = whole
    return out.to(q.dtype), lse


def _sinks_gradient(
    sinks: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None
) -> torch.Tensor:
    """(heads,) this rank's share: a sink takes ``exp(sink - lse)`` of each row's softmax, and has the value 0."""
    delta = (out.float() * dout.float()).sum(dim=-1).transpose(-1, -2)  # ([b,] heads, rows)
    of_score = torch.exp(sinks[:, None] - lse) * ((0.0 if dlse is None else dlse) - delta)
    return of_score.sum(dim=[dim for dim in range(of_score.ndim) if dim != of_score.ndim - 2])
