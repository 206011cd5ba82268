"""Head-parallel attention: an all-to-all turns shards of positions into shards of heads, and another one back.

After Jacobs et al. (DeepSpeed Ulysses, 2023). Each rank then attends as one process does, so whatever `flashtile.attention` knows
works unchanged; the heads of keys have to be a multiple of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any

import torch

from flashtile.api import attention_varlen_with_lse, attention_with_lse
from flashtile.distributed.groups import Members
from flashtile.distributed.scores import Scores
from flashtile.distributed.sequence_shards import SequenceShards, inverse_order, order
from flashtile.distributed.transport import exchange


def ulysses_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    members: Members,
    q_shards: SequenceShards,
    k_shards: SequenceShards,
    scores: Scores,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of this rank's rows, differentiable."""
    own = slice(members.rank * q.shape[-2] // members.size, (members.rank + 1) * q.shape[-2] // members.size)
    q, k, v = to_heads(q, members, q_shards), to_heads(k, members, k_shards), to_heads(v, members, k_shards)
    sinks = None if sinks is None else sinks[own]
    alibi_slopes = None if alibi_slopes is None else alibi_slopes[..., own].contiguous()
    features: dict[str, Any] = {
        "window": (scores.band.left, scores.band.right), "softcap": scores.softcap, "scale": scores.scale, "sinks": sinks,
        "alibi_slopes": alibi_slopes, "allow_tf32": scores.allow_tf32, "deterministic": scores.deterministic,
    }  # fmt: skip
    if q_shards.packed:
        out, lse = attention_varlen_with_lse(
            q, k, v, _starts(q_shards, q.device), _starts(k_shards, q.device), max(q_shards.seqlens, default=0),
            max(k_shards.seqlens, default=0), **features,
        )  # fmt: skip
    else:
        out, lse = attention_with_lse(q, k, v, **features)
    lse_rows = to_rows(lse.transpose(-1, -2).unsqueeze(-1), members, q_shards)
    return to_rows(out, members, q_shards), lse_rows.squeeze(-1).transpose(-1, -2).contiguous()


def to_heads(x: torch.Tensor, members: Members, shards: SequenceShards) -> torch.Tensor:
    """This rank's rows of all heads, ([b,] rows, heads, dim), to all rows of its heads, ([b,] total, heads / num_ranks, dim)."""
    moved: torch.Tensor = _ToHeads.apply(x, members, shards)  # type: ignore[no-untyped-call]
    return moved


def to_rows(x: torch.Tensor, members: Members, shards: SequenceShards) -> torch.Tensor:
    """`to_heads` undone."""
    moved: torch.Tensor = _ToRows.apply(x, members, shards)  # type: ignore[no-untyped-call]
    return moved


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, members: Members, shards: SequenceShards) -> torch.Tensor:
        ctx.where = members, shards
        return _heads_of(x, members, shards)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _rows_of(grad, *ctx.where), None, None


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, members: Members, shards: SequenceShards) -> torch.Tensor:
        ctx.where = members, shards
        return _rows_of(x, members, shards)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _heads_of(grad, *ctx.where), None, None


def _heads_of(x: torch.Tensor, members: Members, shards: SequenceShards) -> torch.Tensor:
    *batch, rows, heads, dim = x.shape
    part = (heads // members.size, dim)
    # (num_ranks, [b,] rows, heads / num_ranks, dim)
    pieces = x.reshape(*batch, rows, members.size, *part).movedim(-3, 0).contiguous()
    counts = [prod(batch) * shards.num_rows(rank) * prod(part) for rank in range(members.size)]
    came = exchange(pieces.view(-1), [pieces[0].numel()] * members.size, counts, members, "the all-to-all to heads")
    by_rank = [piece.view(*batch, shards.num_rows(rank), *part) for rank, piece in enumerate(torch.split(came, counts))]
    return torch.cat(by_rank, dim=shards.dim).index_select(shards.dim, inverse_order(shards, str(x.device)))


def _rows_of(x: torch.Tensor, members: Members, shards: SequenceShards) -> torch.Tensor:
    *batch, _, heads, dim = x.shape
    counts = [shards.num_rows(rank) for rank in range(members.size)]
    by_rank: Sequence[torch.Tensor] = torch.split(x.index_select(shards.dim, order(shards, str(x.device))), counts, dim=shards.dim)
    pieces = torch.cat([piece.reshape(-1) for piece in by_rank])
    rows = counts[members.rank]
    size = prod(batch) * rows * heads * dim
    came = exchange(pieces, [piece.numel() for piece in by_rank], [size] * members.size, members, "the all-to-all to rows")
    # ([b,] rows, num_ranks, heads / num_ranks, dim)
    return came.view(members.size, *batch, rows, heads, dim).movedim(0, -3).flatten(-3, -2)


def _starts(shards: SequenceShards, device: torch.device) -> torch.Tensor:
    return torch.tensor(list(accumulate(shards.seqlens, initial=0)), dtype=torch.int32, device=device)
