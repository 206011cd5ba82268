"""A client's keys and queries as calls of `decode`, `attention` and `attention_varlen`, which each client makes in its own terms.

Shapes are q (batch, seqlen_q, heads_q, head_dim), k and v (batch, seqlen_k, heads_kv, ...), with any strides of which the last is 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashtile import ops
from flashtile.api import attention, attention_varlen, decode
from flashtile.flash_attn.cache import DECODE_ROWS
from flashtile.flash_attn.conventions import readable


class Scores(NamedTuple):
    """How scores are made, for every way: arguments of all three calls."""

    causal: bool
    window: tuple[int | None, int | None] | None
    softcap: float
    scale: float
    sinks: torch.Tensor | None


def rows_before_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of (batch, heads, rows, ...) tensors: views, unless their layout, head dim or autocast asks for copies."""
    query, key, value = ops.cast_by_autocast(query, key, value) or (query, key, value)
    return readable(query.transpose(1, 2)), readable(key.transpose(1, 2)), readable(value.transpose(1, 2))


def is_inference(dropout: float, *tensors: torch.Tensor | None) -> bool:
    """Whether `decode` may be called: it has no dropout, and no gradient flows through it."""
    return dropout == 0.0 and not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors))


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, dropout: float) -> torch.Tensor:
    """Every sequence has all its keys. Few queries over more keys go to `decode`."""
    rows = q.shape[1] * (q.shape[2] // max(1, k.shape[2]))
    if rows <= DECODE_ROWS and q.shape[1] < k.shape[1] and is_inference(dropout, q, k, v, scores.sinks):
        lengths = torch.full((q.shape[0],), k.shape[1], dtype=torch.int32, device=q.device)
        return decode(q, k, v, lengths, **scores._asdict())
    return attention(q, k, v, dropout_p=dropout, **scores._asdict())


def spanned(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: torch.Tensor, scores: Scores, dropout: float) -> torch.Tensor:
    """Packed sequences of each a span of its row's keys; ``spans`` (4, sequences + 1) int32 as `key_spans` describes them."""
    starts_q, rows, places, lengths = spans.unbind()
    packed_k, packed_v, pitch = _as_one_line(k, v)
    starts_k = torch.add(places, rows, alpha=pitch)
    packed = q.reshape(-1, *q.shape[2:])
    out = attention_varlen(
        packed,
        packed_k,
        packed_v,
        starts_q,
        starts_k,
        q.shape[1],
        k.shape[1],
        seqused_k=lengths[:-1],
        dropout_p=dropout,
        **scores._asdict(),
    )
    return out.view(*q.shape[:-1], out.shape[-1])


def chosen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor, scores: Scores) -> torch.Tensor:
    """One query for each row, and the keys that it sees, (batch, 2 + seqlen_k) int32 as `key_spans` describes them.

    The band is in the choice already. Each key is a page, so that none is moved.
    """
    line_k, line_v, pitch = _as_one_line(k, v)
    counts, row, places = chosen[:, 0], chosen[:, 1:2], chosen[:, 2:]
    pages = torch.add(places, row, alpha=pitch)
    everything = scores._replace(causal=False, window=None)
    return decode(q, line_k[:, None], line_v[:, None], counts.contiguous(), page_table=pages, **everything._asdict())


def _as_one_line(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(batch, keys, heads, dim) as (line, heads, dim), and how far apart on the line rows of the batch start.

    A cache that has heads before keys is a line too: from one row of the batch to the next it is as far as all heads' keys, and
    places beyond a row's own keys are never read. A gradient has to find its way back, so tensors that need one are reshaped.
    """
    batch, keys = k.shape[:2]
    if not (torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)):
        pitch = _pitch(k)
        if pitch is not None and pitch == _pitch(v):
            return _line(k, pitch), _line(v, pitch), pitch
    return k.reshape(batch * keys, *k.shape[2:]), v.reshape(batch * keys, *v.shape[2:]), keys


def _pitch(x: torch.Tensor) -> int | None:
    """From one row of the batch to the next, in keys; None where it is no whole number of them."""
    if x.shape[0] <= 1:
        return x.shape[1]
    per_row, per_key = x.stride(0), x.stride(1)
    return None if per_key <= 0 or per_row % per_key else per_row // per_key


def _line(x: torch.Tensor, pitch: int) -> torch.Tensor:
    length = max(x.shape[0] - 1, 0) * pitch + x.shape[1]
    return x.as_strided((length, *x.shape[2:]), x.stride()[1:])
