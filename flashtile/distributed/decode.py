"""decode, decode_with_lse and append_kv over a cache whose keys lie on several ranks."""

from __future__ import annotations

from typing import Any

import torch

from flashtile import api
from flashtile.band import Band
from flashtile.distributed.agreement import agree
from flashtile.distributed.cache_shards import CacheShards
from flashtile.distributed.exchange import Partials, explain_exchange, merged
from flashtile.distributed.groups import Members, members_of
from flashtile.distributed.links import NVLINK, Link
from flashtile.distributed.local_decode import Asked, Cache, Queries, decode_here
from flashtile.errors import ArgumentError, AttentionError, UnsupportedError, message
from flashtile.problem import Problem


def decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seqlens_k: torch.Tensor,
    shards: CacheShards | None = None,
    *,
    group: Any = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    allow_tf32: bool = False,
    own_heads: bool = False,
    link: Link = NVLINK,
    check: bool = True,
) -> torch.Tensor:
    """`flashtile.decode` over a cache that is cut over the ranks of a group by position, exact, for inference.

    Every rank calls it with the same queries and lengths, and its own part of the cache. Each computes float32 partial results over its
    keys; one small exchange brings them together (`explain_exchange` says which, and why), and they are merged in rank order: all
    ranks get the same bits, and the same each time.

    Args:
        q: the queries, the same on all ranks, as `flashtile.decode` has them; so are ``cu_seqlens_q``, ``max_seqlen_q``, ``sinks``,
            ``softcap``, ``scale``, ``allow_tf32`` and the scales of a quantised cache.
        k_cache: this rank's keys: (batch, capacity, num_heads_kv, head_dim), or pages with ``page_table`` (batch, max_pages), this
            rank's own; v_cache like it. The capacity is the same on all ranks.
        seqlens_k: (batch,) int32: the keys of each whole sequence, wherever they lie, the new ones included. Clamped on the device to what
            all ranks hold together.
        shards: which positions this rank's keys are; contiguous shards where None.
        group: a ProcessGroup or a DeviceMesh of one dimension; all processes where None.
        causal, window, leftpad_k: of the whole sequences, as `flashtile.decode` has them.
        alibi_slopes: with contiguous shards and causal alone.
        own_heads: each rank gets its share of the heads of out alone, the one that a projection cut by heads reads:
            (*q.shape[:-2], num_heads_q / num_ranks, head_dim_v).
        link: what the choice of the exchange counts with.
        check: True has all ranks compare first what they are about to do: one small gather, for which the host waits. False in a loop
            that has run once, and where a CUDA graph is captured.

    Returns:
        out: (*q.shape[:-1], head_dim_v) of q's dtype, on every rank.

    Raises:
        ArgumentError, ShapeError, DtypeError: an argument is wrong, here or on another rank, or ranks make different calls: on all
            ranks, unless ``check`` is off.
        UnsupportedError: ALiBi over keys that go round, or no kernel can run it.
        CommunicationError: another rank has died, or did not come within the group's timeout.
    """
    return _decode(
        q, k_cache, v_cache, seqlens_k, shards, group, page_table, cu_seqlens_q, max_seqlen_q, causal, window, softcap, scale, sinks,
        alibi_slopes, k_scale, v_scale, leftpad_k, allow_tf32, own_heads, link, check, False,
    )[0]  # fmt: skip


def decode_with_lse(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seqlens_k: torch.Tensor,
    shards: CacheShards | None = None,
    *,
    group: Any = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    allow_tf32: bool = False,
    own_heads: bool = False,
    link: Link = NVLINK,
    check: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`decode`, and the logarithm of each softmax's denominator: float32 (batch, heads, seqlen_q), or packed (heads, total_q)."""
    return _decode(
        q, k_cache, v_cache, seqlens_k, shards, group, page_table, cu_seqlens_q, max_seqlen_q, causal, window, softcap, scale, sinks,
        alibi_slopes, k_scale, v_scale, leftpad_k, allow_tf32, own_heads, link, check, True,
    )  # fmt: skip


def append_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seqlens_k: torch.Tensor,
    shards: CacheShards | None = None,
    *,
    group: Any = None,
    page_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Writes new keys and values behind those that are there, each on the rank that holds its position. Nothing is sent.

    Args:
        k_cache, v_cache, page_table, seqlens_k, shards, group: as `decode` has them; ``seqlens_k`` counts the whole sequences' keys so far.
            Pages for this rank's share of the new keys are in its table.
        k, v: (batch, seqlen_new, num_heads_kv, head_dim or head_dim_v) of the caches' dtype, the same on all ranks, and already
            turned by their positions where the model turns them.

    Returns:
        seqlens_k: (batch,) int32: the whole sequences' keys from now on, at most what all ranks hold together; new keys beyond that are
            dropped.
    """
    members = members_of(group)
    shards = CacheShards(members.size) if shards is None else shards
    _check_shards(shards, members, k_cache, page_table)
    if k.ndim != 4 or k.shape[0] != seqlens_k.shape[0]:
        raise ArgumentError(
            message("k", f"(batch {seqlens_k.shape[0]}, seqlen_new, heads, head_dim)", f"shape {tuple(k.shape)}", "As lengths are.")
        )
    cache = Cache(k_cache, v_cache, page_table, None, None, shards, members.rank)
    room = cache.capacity * members.size
    batch, new = k.shape[:2]
    sequence = torch.arange(batch, device=k.device).repeat_interleave(new, output_size=batch * new)
    seqlens = seqlens_k.clamp(0, room)
    position = (seqlens[:, None] + torch.arange(new, device=k.device, dtype=torch.int32)).flatten()
    key, page_size = cache.held_before(position).long(), max(1, k_cache.shape[1])
    held = shards.is_held(position, members.rank, cache.capacity)
    page = sequence if page_table is None else page_table[sequence, (key // page_size).clamp(max=max(0, page_table.shape[1] - 1))]
    # each token is a sequence of one page: the one that it lies on, or none
    api.append_kv(
        k_cache, v_cache, k.reshape(batch * new, 1, *k.shape[2:]), v.reshape(batch * new, 1, *v.shape[2:]), (key % page_size).int(),
        page_table=torch.where(held, page, -1).int()[:, None],
    )  # fmt: skip
    return (seqlens + new).clamp(max=room).int()


def _decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seqlens_k: torch.Tensor,
    shards: CacheShards | None,
    group: Any,
    page_table: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int | None,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    softcap: float,
    scale: float | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    leftpad_k: torch.Tensor | None,
    allow_tf32: bool,
    own_heads: bool,
    link: Link,
    check: bool,
    want_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    members = members_of(group)
    shards = CacheShards(members.size) if shards is None else shards
    complaint: AttentionError | None = None
    if check:
        try:
            _check_shards(shards, members, k_cache, page_table)
            _check_scores(shards, causal, window, alibi_slopes, own_heads, q, members)
            Problem.decode(
                q, k_cache, v_cache, seqlens_k, page_table=page_table, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
                causal=causal, window=window, softcap=softcap, scale=scale, sinks=sinks, alibi_slopes=alibi_slopes, k_scale=k_scale,
                v_scale=v_scale, leftpad_k=leftpad_k, out_dtype=torch.float32, allow_tf32=allow_tf32,
            )  # fmt: skip
        except AttentionError as error:
            complaint = error
        pages = None if page_table is None else page_table.shape[1] * k_cache.shape[1]
        facts = {
            "q": (tuple(q.shape), str(q.dtype)), "k_cache": (*k_cache.shape[-2:], str(k_cache.dtype)),
            "v_cache": (*v_cache.shape[-2:], str(v_cache.dtype)), "capacity": k_cache.shape[1] if pages is None else pages,
            "seqlens_k": tuple(seqlens_k.shape), "shards": shards, "ragged": cu_seqlens_q is not None, "max_seqlen_q": max_seqlen_q,
            "causal": causal, "window": window, "softcap": softcap, "scale": scale, "sinks": sinks is not None,
            "alibi_slopes": alibi_slopes is not None, "leftpad_k": leftpad_k is not None, "own_heads": own_heads, "lse": want_lse,
            "link": link,
        }  # fmt: skip
        agree(facts, complaint, members, q.device)
    longest = q.shape[1] if cu_seqlens_q is None else max_seqlen_q
    queries = Queries(q.detach(), cu_seqlens_q, longest or 0)
    asked = Asked(
        seqlens_k, Band.of(causal, window), leftpad_k, alibi_slopes, {"softcap": softcap, "scale": scale, "allow_tf32": allow_tf32}
    )
    mine = Partials((*q.shape[:-1], v_cache.shape[-1]), q.device)
    cache = Cache(k_cache, v_cache, page_table, k_scale, v_scale, shards, members.rank)
    decode_here(queries, cache, asked, sinks if members.rank == 0 else None, mine)
    rows = mine.lse.numel() // max(1, q.shape[-2])
    how = explain_exchange(rows, q.shape[-2], v_cache.shape[-1], members.size, out_bytes=q.element_size(), own_heads=own_heads, link=link)
    return merged(mine, members, how, q.dtype, own_heads, want_lse)


def _check_shards(shards: CacheShards, members: Members, k_cache: torch.Tensor, page_table: torch.Tensor | None) -> None:
    if shards.num_ranks != members.size:
        fix = "Make the shards for the group that decodes."
        raise ArgumentError(message("shards", f"as many ranks as the group has, {members.size}", shards.num_ranks, fix))
    shards.check_capacity(k_cache.shape[1] * (1 if page_table is None else page_table.shape[1]))


def _check_scores(
    shards: CacheShards,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    alibi_slopes: torch.Tensor | None,
    own_heads: bool,
    q: torch.Tensor,
    members: Members,
) -> None:
    if own_heads and q.shape[-2] % members.size:
        why = f"{q.shape[-2]} heads cannot be shared evenly by {members.size} ranks"
        raise UnsupportedError("own_heads needs whole heads.", {"scatter": [why]})
    if alibi_slopes is None:
        return
    if shards.interleave is not None and members.size > 1:
        raise UnsupportedError("ALiBi needs contiguous shards.", {"decode": ["between keys that go round, distances jump"]})
    if Band.of(causal, window).right != 0:
        raise UnsupportedError("ALiBi needs causal=True over several ranks.", {"decode": ["a shard counts distances to the left"]})
