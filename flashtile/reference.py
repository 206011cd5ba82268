"""The obvious attention: differentiable, dense, in float64 by default. The oracle of every test."""

from __future__ import annotations

from typing import Any

import torch

from flashtile.band import Band
from flashtile.dropout import keep_mask, scale_of

_BYTES_AT_ONCE = 2 << 30
_FULL = Band()


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    band: Band = _FULL,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    keep: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as the formula says it, every score in memory.

    q (b, seqlen_q, hq, d), k (b, seqlen_k, hk, d), v (b, seqlen_k, hk, dv); sinks (hq,); alibi_slopes (hq,) or
    (b, hq); key_mask (b, seqlen_k) bool, False where a key is invisible to all; keep (b, hq, seqlen_q, seqlen_k) bool, False where
    dropout, which is off where it is None, takes an entry of the softmax. Inputs are cast to ``dtype`` first.
    Returns out (b, seqlen_q, hq, dv) and lse (b, hq, seqlen_q), natural log, both in ``dtype``. A row that sees no
    key gives out 0 and lse -inf (or the sink).
    """
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    batch, seqlen_q, heads_q, head_dim = q.shape
    seqlen_k, heads_kv = k.shape[1], k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale

    group = heads_q // heads_kv
    grouped = q.reshape(batch, seqlen_q, heads_kv, group, head_dim)
    # scores (b, hq, seqlen_q, seqlen_k)
    scores = torch.einsum("bqhgd,bkhd->bhgqk", grouped, k).flatten(1, 2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(dtype).expand(batch, heads_q)
        scores = scores - slopes[:, :, None, None] * _distance(seqlen_q, seqlen_k, q.device).abs()
    visible = band.dense(seqlen_q, seqlen_k, device=q.device)[None, None]
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    scores = scores.masked_fill(~visible, float("-inf"))

    # One more column: the sink, which takes part in the denominator and has no value.
    sink = q.new_full((heads_q,), float("-inf")) if sinks is None else sinks.to(dtype)
    logits = torch.cat([scores, sink[None, :, None, None].expand(batch, -1, seqlen_q, 1)], dim=-1)
    largest = logits.detach().amax(dim=-1, keepdim=True)
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    weights = torch.exp(logits - largest)
    total = weights.sum(dim=-1, keepdim=True)
    nothing = total == 0.0
    total = total + nothing
    lse = (largest + torch.log(total)).masked_fill(nothing, float("-inf")).squeeze(-1)
    shares = weights[..., :-1] / total
    if keep is not None:
        shares = torch.where(keep, shares * scale_of(dropout_p), 0.0)
    shares = shares.reshape(batch, heads_kv, group, seqlen_q, seqlen_k)
    out = torch.einsum("bhgqk,bkhd->bqhgd", shares, v).flatten(2, 3)
    return out, lse


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    page_table: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``flashtile.attention`` and ``flashtile.attention_varlen`` as a loop over sequences around ``attention``.

    Takes the arguments of either, and any mixture: q is packed where ``cu_seqlens_q`` is given, k and v where
    ``cu_seqlens_k`` is, and they are pages where ``page_table`` is. ``max_seqlen_q`` and ``max_seqlen_k`` are what a planner
    needs to know; they change no result here or there. ``k_scale`` and ``v_scale``, of one element, (hk,) or (b, hk), multiply what
    k and v hold. Of each sequence's keys the first ``leftpad_k`` (b,) are invisible. ``seed`` (2,) int64 says which entries
    ``dropout_p`` drops: it is what ``flashtile.attention`` draws from torch's generator.
    Returns out (like q, with the value's head_dim) and lse (b, hq, seqlen_q) or (hq, total_q), both in ``dtype``.
    """
    heads_q = q.shape[-2]
    if cu_seqlens_q is None:
        batch = q.shape[0]
        starts = [i * q.shape[1] for i in range(batch + 1)]
    else:
        batch = cu_seqlens_q.shape[0] - 1
        starts = [_clamped(start, 0, q.shape[0]) for start in cu_seqlens_q.tolist()]
    rows = q.flatten(0, 1) if cu_seqlens_q is None else q
    out = q.new_zeros((rows.shape[0], heads_q, v.shape[-1]), dtype=dtype)
    lse = q.new_full((heads_q, rows.shape[0]), float("-inf"), dtype=dtype)
    band = Band.of(causal, window)
    heads = torch.arange(heads_q, device=q.device)
    for i in range(batch):
        here = slice(starts[i], max(starts[i], starts[i + 1]))
        k_i, v_i, key_mask = _keys_of(i, k, v, cu_seqlens_k, page_table, seqused_k)
        if leftpad_k is not None:
            key_mask = _behind(int(leftpad_k[i]), k_i, key_mask)
        k_i, v_i = _scaled(k_i, k_scale, i, batch, dtype), _scaled(v_i, v_scale, i, batch, dtype)
        slopes = alibi_slopes[i] if alibi_slopes is not None and alibi_slopes.ndim == 2 else alibi_slopes
        for kv_heads, q_heads in _head_slices(heads_q, k_i, here.stop - here.start):
            keep: torch.Tensor | None = None
            if dropout_p and seed is not None:
                streams = i * heads_q + heads[None, q_heads]
                keep = keep_mask(dropout_p, seed, streams, range(here.stop - here.start), range(k_i.shape[1]))
            out_i, lse_i = attention(
                rows[None, here, q_heads], k_i[:, :, kv_heads], v_i[:, :, kv_heads],
                band=band, softcap=softcap, scale=scale, key_mask=key_mask, dtype=dtype, dropout_p=dropout_p, keep=keep,
                sinks=None if sinks is None else sinks[q_heads], alibi_slopes=None if slopes is None else slopes[q_heads],
            )  # fmt: skip
            out[here, q_heads], lse[q_heads, here] = out_i[0], lse_i[0]
    if cu_seqlens_q is None:
        return out.view(*q.shape[:-1], v.shape[-1]), lse.view(heads_q, batch, q.shape[1]).transpose(0, 1)
    return out, lse


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int | None = None,
    **features: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``flashtile.attention_varlen``: ``forward`` with the arguments that it requires; the rest are ``forward``'s."""
    return forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **features)


def decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seqlens_k: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    causal: bool = True,
    **features: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``flashtile.decode``, the same loop: a cache whose lengths are on the device. Features are ``forward``'s."""
    return forward(q, k_cache, v_cache, cu_seqlens_q, seqused_k=seqlens_k, causal=causal, **features)


def _distance(seqlen_q: int, seqlen_k: int, device: torch.device) -> torch.Tensor:
    """k - q - offset as a matrix (seqlen_q, seqlen_k): 0 on the diagonal that ends at the last query and key."""
    q = torch.arange(seqlen_q, device=device)[:, None]
    return torch.arange(seqlen_k, device=device)[None, :] - q - (seqlen_k - seqlen_q)


def _keys_of(
    i: int,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    page_table: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Sequence i's keys and values, (1, seqlen_k, hk, d) and dv, and which of them lie on a page that exists."""
    if cu_seqlens_k is not None:
        start = _clamped(int(cu_seqlens_k[i]), 0, k.shape[0])
        room = _clamped(int(cu_seqlens_k[i + 1]), start, k.shape[0]) - start
    else:
        start, room = 0, k.shape[1] if page_table is None else page_table.shape[1] * k.shape[1]
    seqlen_k = room if seqused_k is None else _clamped(int(seqused_k[i]), 0, room)
    if page_table is None:
        tensors = (k, v) if cu_seqlens_k is not None else (k[i], v[i])
        k_i, v_i = (tensor[None, start : start + seqlen_k] for tensor in tensors)
        return k_i, v_i, None
    num_pages, page_size = k.shape[:2]
    ids = page_table[i, : -(-seqlen_k // page_size)].long()
    exists = (ids >= 0) & (ids < num_pages)
    key_mask = exists.repeat_interleave(page_size)[:seqlen_k]

    def gather(pages: torch.Tensor) -> torch.Tensor:
        pages = pages.double() if pages.itemsize == 1 else pages  # torch gathers no float8
        found = pages.new_zeros((len(ids), *pages.shape[1:]))
        found[exists] = pages[ids[exists]]
        return found.flatten(0, 1)[None, :seqlen_k]

    return gather(k), gather(v), key_mask[None]


def _behind(padding: int, k: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Which keys of k (1, seqlen_k, hk, d) are visible where the first ``padding`` are not."""
    behind = (torch.arange(k.shape[1], device=k.device) >= padding)[None]
    return behind if key_mask is None else key_mask & behind


def _scaled(keys: torch.Tensor, scale: torch.Tensor | None, i: int, batch: int, dtype: torch.dtype) -> torch.Tensor:
    """Sequence i's keys or values (1, seqlen_k, hk, d), times their scale."""
    if scale is None:
        return keys
    by_head = scale.to(dtype).expand(batch, keys.shape[2])
    return keys.to(dtype) * by_head[i, :, None]


def _clamped(value: int, least: int, most: int) -> int:
    return min(max(value, least), most)


def _head_slices(heads_q: int, k: torch.Tensor, seqlen_q: int) -> list[tuple[slice, slice]]:
    """Ranges of key heads, with their query heads, that bound how much is cast and scored at once."""
    heads_kv, group = k.shape[2], heads_q // k.shape[2]
    bytes_a_head = 8 * k.shape[1] * (2 * k.shape[3] + 4 * group * seqlen_q)
    step = max(1, min(heads_kv, _BYTES_AT_ONCE // max(1, bytes_a_head)))
    return [(slice(h, h + step), slice(h * group, (h + step) * group)) for h in range(0, heads_kv, step)]
