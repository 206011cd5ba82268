"""What every kernel is handed: one call's tensors and run-time numbers, already validated."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class DecodeCall(NamedTuple):
    """Tensors of one decode call (``b`` sequences, ``hq`` query heads, ``hk`` key heads).

    q            (b, seqlen_q, hq, d), or (total_q, hq, d) where cu_seqlens_q is given
    k_cache      (b, capacity, hk, d), or (pages, page_size, hk, d) where page_table is given
    v_cache      the same with dv
    seqlens_k    (b,) int32, on the device, clamped there to [0, capacity]
    page_table   (b, max_pages) int32 or None; ids outside [0, pages) are masked
    cu_seqlens_q (b + 1,) int32 or None
    sinks        (hq,) float32 or None
    alibi_slopes (hq,) or (b, hq) float32 or None
    out          like q with dv, written
    lse          float32 (b, hq, seqlen_q), or (hq, total_q) where packed; written; None if not wanted
    scale        multiplies q.k
    softcap      0.0 where off
    k_scale      (), (1,), (1, 1), (hk,) or (b, hk) float32, any strides: a quantised key over what is stored; None for 1
    v_scale      the same for values
    leftpad_k    (b,) int32 or None: the first keys of each sequence, which no query sees; clamped on the device to [0, seqlens_k]
    """

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    seqlens_k: torch.Tensor
    page_table: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    sinks: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    out: torch.Tensor
    lse: torch.Tensor | None
    scale: float
    softcap: float
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    leftpad_k: torch.Tensor | None = None


DecodeRunner = Callable[[DecodeCall], None]
"""What a kernel module's ``bind(problem, plan, device)`` returns: runs a call of that problem, on its device's current stream."""


class Dropout(NamedTuple):
    """Which entries of the softmax a call drops, each with probability ``p`` in (0, 1); ``seed`` (2,) int64 on q's device."""

    p: float
    seed: torch.Tensor


class ForwardCall(NamedTuple):
    """Tensors of one forward call (``b`` sequences, ``hq`` query heads, ``hk`` key heads).

    q            (b, seqlen_q, hq, d), or (total_q, hq, d) where cu_seqlens_q is given
    k            (b, seqlen_k, hk, d), or (total_k, hk, d) where cu_seqlens_k is given, or (pages, page_size, hk, d) where
                 page_table is given
    v            the same with dv
    cu_seqlens_q (b + 1,) int32 or None
    cu_seqlens_k (b + 1,) int32 or None
    seqused_k    (b,) int32 or None: how many of each sequence's keys count, clamped on the device to what there are
    page_table   (b, max_pages) int32 or None; ids outside [0, pages) are masked
    max_seqlen_q the most queries of one sequence
    sinks        (hq,) float32 or None
    alibi_slopes (hq,) or (b, hq) float32 or None
    out          like q with dv, written
    lse          float32 (b, hq, seqlen_q), or (hq, total_q) where q is packed; written; None if not wanted
    scale        multiplies q.k
    softcap      0.0 where off
    dropout      None where nothing is dropped; lse is that of the whole softmax
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    seqused_k: torch.Tensor | None
    page_table: torch.Tensor | None
    max_seqlen_q: int
    sinks: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    out: torch.Tensor
    lse: torch.Tensor | None
    scale: float
    softcap: float
    dropout: Dropout | None = None


ForwardRunner = Callable[[ForwardCall], None]


class BackwardCall(NamedTuple):
    """Tensors of one backward call: those of the forward call, what it returned, and the gradients.

    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, sinks, alibi_slopes, scale, softcap and dropout are as in a
    ForwardCall; keys lie in no pages.

    out          as the forward call wrote it
    lse          float32, as the forward call wrote it
    dout         like out
    dlse         float32, like lse, or None where no gradient flows through lse
    dq, dk, dv   like q, k and v, written; rows and keys that belong to no sequence, or that nobody sees, get 0
    dsinks       (hq,) float32, written; None where there are no sinks or nobody wants it
    max_seqlen_k the most keys of one sequence
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor | None
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dsinks: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    seqused_k: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    sinks: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    scale: float
    softcap: float
    dropout: Dropout | None = None


BackwardRunner = Callable[[BackwardCall], None]


class AppendCall(NamedTuple):
    """Tensors of one append (``b`` sequences, ``hq`` query heads, ``hk`` key heads).

    k                (b, seqlen_new, hk, d), or (total_new, hk, d) where cu_seqlens_k_new is given
    v                the same with dv
    k_cache          (b, capacity, hk, d), or (pages, page_size, hk, d) where page_table is given; written
    v_cache          the same with dv; written
    seqlens          (b,) int32: the keys of each sequence so far, clamped on the device to [0, capacity]
    page_table       (b, max_pages) int32 or None; keys on pages outside [0, pages) are not written
    cu_seqlens_k_new (b + 1,) int32 or None
    q                (b, seqlen_q, hq, d), or (total_q, hq, d) where cu_seqlens_q is given; None where it is not turned
    cu_seqlens_q     (b + 1,) int32 or None
    cos, sin         (positions, pairs), contiguous; None where nothing is turned
    positions        (b,) int32: where each sequence's first new token stands; None for seqlens
    new_seqlens      (b,) int32, written: the keys of each sequence from now on
    turned_q         like q, written; None where q is not turned
    interleaved      pairs are neighbours, elements 2 i and 2 i + 1; else i and i + pairs
    queries_advance  query i stands at position i from the first; else all at the first
    k_scale          float32 of one element, (hk,) or (b, hk): what is stored in a quantised cache is k over it; None for 1, or where
                     k comes as it is stored
    v_scale          the same for values
    """

    k: torch.Tensor
    v: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    seqlens: torch.Tensor
    page_table: torch.Tensor | None
    cu_seqlens_k_new: torch.Tensor | None
    q: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    positions: torch.Tensor | None
    new_seqlens: torch.Tensor
    turned_q: torch.Tensor | None
    interleaved: bool
    queries_advance: bool
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    @property
    def out(self) -> torch.Tensor:
        """The first result, as calls of every operation have one."""
        return self.new_seqlens

    @property
    def lse(self) -> torch.Tensor | None:
        """The second result, where there is one."""
        return self.turned_q
