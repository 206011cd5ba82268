"""One block of a ring's step: attention of a slice of the queries over a slice of the keys, and its gradients."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from flashtile import ops
from flashtile.api import attention_varlen_with_lse, attention_with_lse
from flashtile.distributed.blocks import Block
from flashtile.distributed.folding import fold_in
from flashtile.distributed.scores import Scores


class Results(NamedTuple):
    """Of all rows of this rank: out, float32 as it is folded, and lse."""

    out: torch.Tensor
    lse: torch.Tensor


class Gradients(NamedTuple):
    """float32 sums of this rank's queries and of the keys that are here."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


class Rows(NamedTuple):
    """What autograd knows of this rank's queries: lse and dlse are ([b,] heads, rows), the rest ([b,] rows, heads, dim)."""

    q: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor | None


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: Block, scores: Scores, results: Results | None) -> Results:
    """Folds one block into the results, which begin with it where they are None. q, k and v are all rows that are here."""
    whole, num_rows = q, q.shape[-3]
    q, k, v = _queries(q, block), _keys(k, block), _keys(v, block)
    features: dict[str, Any] = {
        "window": (block.band.left, block.band.right), "softcap": scores.softcap, "scale": scores.scale, "allow_tf32": scores.allow_tf32,
    }  # fmt: skip
    if len(block.q_lengths) > 1:
        part, lse = attention_varlen_with_lse(
            q, k, v, _starts(block.q_lengths, q.device), _starts(block.k_lengths, q.device), max(block.q_lengths), max(block.k_lengths),
            **features,
        )  # fmt: skip
    else:
        part, lse = attention_with_lse(_batched(q), _batched(k), _batched(v), **features)
        part, lse = (part[0], lse[0]) if q.ndim == 3 else (part, lse)
    if results is None and block.num_q == num_rows:
        return Results(part.float(), lse)
    results = nothing_seen(whole, v) if results is None else results
    fold_in(_queries(results.out, block), _of_heads(results.lse, block), part, lse)
    return results


def nothing_seen(q: torch.Tensor, v: torch.Tensor) -> Results:
    """Results of queries that have seen no key yet."""
    *batch, rows, heads, _ = q.shape
    out = q.new_zeros((*batch, rows, heads, v.shape[-1]), dtype=torch.float32)
    return Results(out, q.new_full((*batch, heads, rows), -torch.inf, dtype=torch.float32))


def differentiate(rows: Rows, k: torch.Tensor, v: torch.Tensor, block: Block, scores: Scores, sums: Gradients) -> None:
    """Adds one block's gradients to the sums; the results and their lse are those over all keys, so each block's share is exact."""
    q, out, dout = _queries(rows.q, block), _queries(rows.out, block), _queries(rows.dout, block)
    lse = _of_heads(rows.lse, block).contiguous()
    dlse = None if rows.dlse is None else _of_heads(rows.dlse, block)
    tensors, lengths = (q, _keys(k, block), _keys(v, block), out, lse, dout, dlse), (None, None, None, None)
    if len(block.q_lengths) > 1:
        lengths = (  # type: ignore[assignment]
            _starts(block.q_lengths, q.device), _starts(block.k_lengths, q.device), max(block.q_lengths), max(block.k_lengths)
        )  # fmt: skip
    else:
        tensors = tuple(None if x is None else _batched(x, 4 if i not in (4, 6) else 3) for i, x in enumerate(tensors))  # type: ignore[assignment]
    dq, dk, dv, _ = ops.backward.backward(
        *tensors, *lengths, None, False, (block.band.left, block.band.right), scores.softcap, scores.scale, None, None,
        scores.allow_tf32, scores.deterministic, False,
    )  # fmt: skip
    for total, part in ((_queries(sums.dq, block), dq), (_keys(sums.dk, block), dk), (_keys(sums.dv, block), dv)):
        total += part[0] if part.ndim > total.ndim else part


def of_key_heads(
    rows: Rows, k: torch.Tensor, v: torch.Tensor, sums: Gradients, first: int, count: int
) -> tuple[Rows, torch.Tensor, torch.Tensor, Gradients]:
    """Views of ``count`` key heads from ``first``, and of the query heads that share them."""
    group = rows.q.shape[-2] // k.shape[-2]

    def queries(x: torch.Tensor) -> torch.Tensor:
        return x.narrow(-2, first * group, count * group)

    dlse = None if rows.dlse is None else queries(rows.dlse)
    part = Rows(queries(rows.q), queries(rows.out), queries(rows.lse), queries(rows.dout), dlse)
    grads = Gradients(queries(sums.dq), sums.dk.narrow(-2, first, count), sums.dv.narrow(-2, first, count))
    return part, k.narrow(-2, first, count), v.narrow(-2, first, count), grads


def _queries(x: torch.Tensor, block: Block) -> torch.Tensor:
    return x.narrow(-3, block.q_row, block.num_q)


def _keys(x: torch.Tensor, block: Block) -> torch.Tensor:
    return x.narrow(-3, block.k_row, block.num_k)


def _of_heads(x: torch.Tensor, block: Block) -> torch.Tensor:
    """([b,] heads, rows) of the block's queries."""
    return x.narrow(-1, block.q_row, block.num_q)


def _batched(x: torch.Tensor, rank: int = 4) -> torch.Tensor:
    """One packed sequence as a batch of one."""
    return x if x.ndim == rank else x[None]


@lru_cache(maxsize=256)
def _starts(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(sequences + 1,) int32: where each begins."""
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)
