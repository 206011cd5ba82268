"""attention and attention_with_lse over sequences whose positions lie on several ranks: prefill and training."""

from __future__ import annotations

from typing import Any

import torch

from flashtile import api
from flashtile.arguments import check_scores
from flashtile.band import Band
from flashtile.distributed.agreement import agree
from flashtile.distributed.choose import Workload, choose
from flashtile.distributed.dtensors import attention_of_dtensors, is_dtensor
from flashtile.distributed.groups import Members, members_of
from flashtile.distributed.links import Link
from flashtile.distributed.ring import Ring, RingAttention, ring_with_sinks
from flashtile.distributed.scores import Scores
from flashtile.distributed.sequence_shards import SequenceShards
from flashtile.distributed.ulysses import ulysses_attention
from flashtile.errors import ArgumentError, AttentionError, DtypeError, ShapeError, UnsupportedError, message
from flashtile.planner.device import Device

METHODS = ("auto", "ring", "ulysses")


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shards: SequenceShards | None = None,
    k_shards: SequenceShards | None = None,
    *,
    group: Any = None,
    method: str = "auto",
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    allow_tf32: bool = False,
    deterministic: bool | None = None,
    link: Link | None = None,
    check: bool = True,
) -> torch.Tensor:
    """`flashtile.attention` and `flashtile.attention_varlen` of sequences cut over the ranks of a group, exact, with gradients.

    Every rank calls it with its rows, and gets its rows of the result. The mask is that of the whole sequences.

    Args:
        q: (batch, rows, num_heads_q, head_dim), or where ``shards.packed`` (rows, num_heads_q, head_dim): the rows that
            ``shards.shard(whole, rank)`` gives. Or a DTensor (batch, seqlen, num_heads_q, head_dim) that is cut by Shard(1), and by
            Shard(0) and Shard(2) over other dimensions of its mesh, beside k and v like it, without shards and group: then the results
            are DTensors, placed as q is.
        k: the same with num_heads_kv; v: with a last dimension of its own. Their rows are those of ``k_shards``.
        shards: how the sequences lie over the ranks. None: one length for all, ``rows`` on each rank, in zig-zag order.
        k_shards: how the keys do, where they are other sequences than the queries; ``shards`` where None.
        group: a ProcessGroup or a DeviceMesh of one dimension; all processes where None.
        method: "ring", "ulysses" or "auto", which asks `choose`.
        causal, window, softcap, scale, sinks, allow_tf32, deterministic: `flashtile.attention` has them. Gradients of sinks are this
            rank's share, as those of any weight are: sum them over the ranks.
        alibi_slopes: by "ulysses" alone, since the distances of a block of the ring are not those of the whole.
        link: what "auto" counts with; NVLink where None.
        check: True has all ranks compare first what they are about to do: one small gather, for which the host waits. False in a loop
            that has run once, and where a CUDA graph is captured.

    Returns:
        out: (*q.shape[:-1], head_dim_v) of q's dtype.

    Raises:
        ArgumentError, ShapeError, DtypeError: an argument is wrong, here or on another rank, or ranks make different calls: on all
            ranks, unless ``check`` is off.
        UnsupportedError: the method cannot run this, with the reason.
        CommunicationError: another rank has died, or did not come within the group's timeout.

    The same bits come out of the same call each time; gradients too where ``deterministic`` is True.
    """
    found: tuple[torch.Tensor, torch.Tensor] = attention_with_lse(
        q, k, v, shards, k_shards, group=group, method=method, causal=causal, window=window, softcap=softcap, scale=scale, sinks=sinks,
        alibi_slopes=alibi_slopes, allow_tf32=allow_tf32, deterministic=deterministic, link=link, check=check,
    )  # fmt: skip
    return found[0]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shards: SequenceShards | None = None,
    k_shards: SequenceShards | None = None,
    *,
    group: Any = None,
    method: str = "auto",
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    allow_tf32: bool = False,
    deterministic: bool | None = None,
    link: Link | None = None,
    check: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention`, and the logarithm of each softmax's denominator: (batch, num_heads_q, rows), or packed (num_heads_q, rows)."""
    if is_dtensor(q):
        if shards is not None or k_shards is not None or group is not None:
            raise ArgumentError(message("shards", "None beside DTensors", "shards or a group", "DTensors know how they are cut."))
        features: dict[str, Any] = {
            "causal": causal, "window": window, "softcap": softcap, "scale": scale, "sinks": sinks, "alibi_slopes": alibi_slopes,
            "allow_tf32": allow_tf32, "deterministic": deterministic,
        }  # fmt: skip

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shards: SequenceShards | None, group: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if shards is None:
                return api.attention_with_lse(q, k, v, **features)
            found: tuple[torch.Tensor, torch.Tensor] = attention_with_lse(
                q, k, v, shards, group=group, method=method, link=link, check=check, **features
            )
            return found

        return attention_of_dtensors(q, k, v, sinks is not None or alibi_slopes is not None, attend)
    members = members_of(group)
    shards = _default(q, members) if shards is None else shards
    k_shards = shards if k_shards is None else k_shards
    complaint: AttentionError | None = None
    try:
        _check(q, k, v, shards, k_shards, members, method, causal, softcap, scale, sinks, alibi_slopes, allow_tf32)
        band = Band.of(causal, window)
        method = _method(method, q, k, v, shards, k_shards, band, alibi_slopes, members, link)
    except AttentionError as error:
        complaint = error
    if check:
        tensors = {name: _facts_of(x) for name, x in (("q", q), ("k", k), ("v", v), ("sinks", sinks), ("alibi_slopes", alibi_slopes))}
        needs = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks))
        agree(
            {**tensors, "shards": shards, "k_shards": k_shards, "method": method, "causal": causal, "window": window, "softcap": softcap,
             "scale": scale, "allow_tf32": allow_tf32, "deterministic": deterministic, "requires_grad": needs},
            complaint, members, q.device,
        )  # fmt: skip
    if complaint is not None:
        raise complaint
    scores = Scores(band, softcap, scale, allow_tf32, deterministic)
    if method == "ulysses":
        return ulysses_attention(q, k, v, sinks, alibi_slopes, members, shards, k_shards, scores)
    ring = Ring(members, shards, k_shards)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks)):
        found: tuple[torch.Tensor, torch.Tensor] = RingAttention.apply(q, k, v, sinks, ring, scores)  # type: ignore[no-untyped-call]
        return found
    with torch.no_grad():
        return ring_with_sinks(q, k, v, sinks, ring, scores)


def _default(q: torch.Tensor, members: Members) -> SequenceShards:
    if q.ndim != 4:
        raise ShapeError(
            message("q", "(batch, rows, heads, head_dim) without shards", f"shape {tuple(q.shape)}", "Pass SequenceShards.of_packed(...).")
        )
    return SequenceShards.dense(q.shape[1] * members.size, members.size)


def _facts_of(x: torch.Tensor | None) -> object:
    """What has to be the same on all ranks of a tensor; how many rows there are follows from the shards, and may differ."""
    if x is None:
        return None
    return (tuple(x.shape) if x.ndim < 3 else (*x.shape[:-3], *x.shape[-2:])), str(x.dtype), x.device.type


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shards: SequenceShards,
    k_shards: SequenceShards,
    members: Members,
    method: str,
    causal: bool,
    softcap: float,
    scale: float | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    allow_tf32: bool,
) -> None:
    """What only this layer knows; the rest is for `flashtile.attention` to say, in the first block."""
    if method not in METHODS:
        raise ArgumentError(message("method", f"one of {', '.join(METHODS)}", repr(method), "auto chooses."))
    for name, cut in (("shards", shards), ("k_shards", k_shards)):
        if cut.num_ranks != members.size:
            fix = "Make the shards for the group that attends."
            raise ArgumentError(message(name, f"as many ranks as the group has, {members.size}", cut.num_ranks, fix))
    if shards.packed != k_shards.packed or len(shards.seqlens) != len(k_shards.seqlens):
        got = f"{len(k_shards.seqlens)} of the keys beside {len(shards.seqlens)}"
        raise ArgumentError(message("k_shards", "sequences as the queries have them, packed or not", got, "Give each sequence its keys."))
    rank = 3 if shards.packed else 4
    for name, x, cut in (("q", q, shards), ("k", k, k_shards), ("v", v, k_shards)):
        rows = cut.num_rows(members.rank)
        if x.ndim != rank or x.shape[-3] != rows:
            form = f"({'' if shards.packed else 'batch, '}{rows}, heads, head_dim), the rows of rank {members.rank}"
            raise ShapeError(message(name, form, f"shape {tuple(x.shape)}", "Cut it with shards.shard(whole, rank)."))
        if x.dtype != q.dtype or x.device != q.device:
            raise DtypeError(message(name, f"{q.dtype} on {q.device}, as q is", f"{x.dtype} on {x.device}", "Move and cast it first."))
    if k.shape[:-1] != v.shape[:-1] or k.shape[-1] != q.shape[-1] or k.shape[:-3] != q.shape[:-3]:
        got = f"shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        raise ShapeError(message("k and v", "q's batch and head_dim, and as many heads each", got, "Only v's last dimension may differ."))
    if not k.shape[-2] or q.shape[-2] % k.shape[-2]:
        raise ShapeError(message("q", f"a multiple of {k.shape[-2]} heads", q.shape[-2], "Every key head serves as many query heads."))
    batch = len(shards.seqlens) if shards.packed else q.shape[0]
    check_scores(q.shape[-2], batch, causal, softcap, scale, sinks, alibi_slopes, allow_tf32)


def _method(
    method: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shards: SequenceShards,
    k_shards: SequenceShards,
    band: Band,
    alibi_slopes: torch.Tensor | None,
    members: Members,
    link: Link | None,
) -> str:
    """The method that runs; UnsupportedError where none can, or not the one that was asked for."""
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    work = Workload(
        num_ranks=members.size, num_heads_q=q.shape[-2], num_heads_kv=k.shape[-2], seqlens_q=shards.seqlens, seqlens_k=k_shards.seqlens,
        batch=1 if shards.packed else q.shape[0], head_dim=q.shape[-1], head_dim_v=v.shape[-1], dtype_bytes=q.element_size(), band=band,
        zigzag=shards.zigzag, training=training, alibi=alibi_slopes is not None,
    )  # fmt: skip
    choice = choose(work, link, Device.of(q.device))
    if method == "auto":
        if not choice.method:
            raise UnsupportedError("No method can run this.", choice.reasons)
        return choice.method
    if choice.reasons.get(method):
        raise UnsupportedError(f"{method} cannot run this.", {method: choice.reasons[method]})
    return method
