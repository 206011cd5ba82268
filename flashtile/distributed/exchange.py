"""How partial results of decode come together: everyone's to everyone, or the heads shared out. Chosen by bytes, which it can say."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from flashtile.distributed.folding import folded
from flashtile.distributed.groups import Members
from flashtile.distributed.links import NVLINK, Link
from flashtile.distributed.transport import exchange, gather
from flashtile.errors import ArgumentError, UnsupportedError, message

_FLOAT = 4


@dataclass(frozen=True)
class Exchange:
    """``kind`` is "gather" (each rank merges all heads) or "scatter" (each merges its share of them); bytes are received by one rank."""

    kind: str
    gather_bytes: int
    scatter_bytes: int
    gather_s: float
    scatter_s: float
    reason: str

    def lines(self) -> list[str]:
        """The choice in words and numbers."""
        return [
            f"exchange: {self.kind}: {self.reason}",
            f"gather: {self.gather_bytes / 1e3:.4g} kB, {self.gather_s * 1e6:.4g} us",
            f"scatter: {self.scatter_bytes / 1e3:.4g} kB, {self.scatter_s * 1e6:.4g} us",
        ]


@lru_cache(maxsize=1024)
def explain_exchange(
    rows: int, heads: int, head_dim_v: int, num_ranks: int, *, out_bytes: int = 2, own_heads: bool = False, link: Link = NVLINK
) -> Exchange:
    """The exchange of float32 partial results of ``rows`` queries, and why.

    A gather moves ``num_ranks - 1`` partial results to each rank in one collective. A scatter moves to each the others' partial results
    of its share of the heads, ``1 / num_ranks`` as much, and then (unless ``own_heads``, where each rank keeps its share) the merged
    shares in the result's dtype: fewer bytes, and further collectives.
    """
    if num_ranks < 1:
        raise ArgumentError(message("num_ranks", "a positive count", num_ranks, "It is the size of the group."))
    partial = rows * heads * (head_dim_v + 1) * _FLOAT
    gather_bytes = (num_ranks - 1) * partial
    away = (num_ranks - 1) / num_ranks
    scatter_bytes = int(away * (partial + (0 if own_heads else rows * heads * (head_dim_v * out_bytes + _FLOAT))))
    gathering = (num_ranks - 1).bit_length()  # steps of a gather among so many
    gather_s = link.seconds(gather_bytes, gathering)
    scatter_s = link.seconds(scatter_bytes, 1 if own_heads else 1 + 2 * gathering)
    even = heads % num_ranks == 0
    if own_heads and not even:
        raise UnsupportedError(f"{heads} heads cannot be shared evenly by {num_ranks} ranks.", {"scatter": ["own_heads needs whole heads"]})
    if num_ranks == 1:
        kind, reason = "gather", "there is one rank"
    elif own_heads:
        kind, reason = "scatter", "each rank keeps its share of the heads"
    elif not even:
        kind, reason = "gather", f"{heads} heads cannot be shared evenly by {num_ranks} ranks"
    elif gather_s <= scatter_s:
        kind, reason = "gather", "so few bytes that more collectives would take longer than they save"
    else:
        kind, reason = (
            "scatter",
            f"it moves {gather_bytes / max(1, scatter_bytes):.1f}x fewer bytes, which outweighs that it takes more steps",
        )
    return Exchange(kind, gather_bytes, scatter_bytes, gather_s, scatter_s, reason)


class Partials:
    """Room for one rank's partial results, float32 and laid out to be sent in one piece: out first, then lse."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        """``shape`` is that of out, (batch, seqlen_q, heads, dim) or (total_q, heads, dim)."""
        lse_shape = (*shape[:-3], shape[-2], shape[-3])
        num_out, num_lse = prod(shape), prod(lse_shape)
        self.memory = torch.empty(num_out + num_lse, dtype=torch.float32, device=device)
        self.out, self.lse = self.memory[:num_out].view(shape), self.memory[num_out:].view(lse_shape)


def merged(
    mine: Partials, members: Members, how: Exchange, dtype: torch.dtype, own_heads: bool, want_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Everyone's partial results as one: out in ``dtype``, and lse where wanted (else empty), of all heads or this rank's share."""
    if members.size == 1:
        return mine.out.to(dtype), mine.lse
    if how.kind == "gather":
        everyones = gather(mine.memory, members, "the gather of partial results")
        num_out = mine.out.numel()
        parts = everyones[:, :num_out].view(members.size, *mine.out.shape)
        lses = everyones[:, num_out:].view(members.size, *mine.lse.shape)
        return folded(parts, lses).to(dtype), lses.logsumexp(dim=0) if want_lse else mine.lse.new_empty(0)
    out, lse = _own_heads(mine, members, want_lse or not own_heads)
    out = out.to(dtype)
    if own_heads:
        return out, lse
    # (num_ranks, ..., rows, heads / num_ranks, dim) to (..., rows, heads, dim), and the same of lse
    out = gather(out.contiguous(), members, "the gather of merged heads").movedim(0, -3).flatten(-3, -2)
    if want_lse:
        lse = gather(lse.contiguous(), members, "the gather of merged heads' lse").movedim(0, -3).flatten(-3, -2)
    return out, lse


def _own_heads(mine: Partials, members: Members, want_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's share of the heads, merged: out (..., rows, heads / num_ranks, dim) float32, and lse."""
    *batch, rows, heads, dim = mine.out.shape
    share = heads // members.size
    outs = mine.out.view(*batch, rows, members.size, share, dim).movedim(-3, 0).flatten(1)
    lses = mine.lse.view(*batch, members.size, share, rows).movedim(-3, 0).flatten(1)
    pieces = torch.cat([outs, lses], dim=1)
    counts = [pieces.shape[1]] * members.size
    came = exchange(pieces.view(-1), counts, counts, members, "the exchange of partial results").view(members.size, -1)
    parts = came[:, : outs.shape[1]].view(members.size, *batch, rows, share, dim)
    part_lses = came[:, outs.shape[1] :].view(members.size, *batch, share, rows)
    return folded(parts, part_lses), part_lses.logsumexp(dim=0) if want_lse else mine.lse.new_empty(0)
