"""The key of a forward call."""

from __future__ import annotations

import torch

from flashtile.arguments.counts import MOST_TOKENS
from flashtile.facts.features import Key, out_has_a_key, vector_facts, window_facts
from flashtile.planner.plans import ForwardPlan
from flashtile.rounding import alignment_of, length_bucket, query_bucket


def forward_key(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    page_table: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    softcap: float,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    out: torch.Tensor | None,
    block_m: int | None,
    plan: ForwardPlan | None,
    allow_tf32: bool,
    lse: bool,
    dropout: bool = False,
) -> Key | None:
    """The key of one call, in 2 to 4 us of host time; None where the call is wrong or so rare that it is checked each time.

    None too where autograd has to follow the call, or autocast may have to cast its tensors: it is made again as one that has a key.
    """
    try:
        dtype, device = q.dtype, q.device
        if (
            k.dtype is not dtype or v.dtype is not dtype or k.device != device or v.device != device
            or causal.__class__ is not bool or allow_tf32.__class__ is not bool
            or ((q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled())
            or (dtype is torch.float32 and torch.is_autocast_enabled(device.type))
        ):  # fmt: skip
            return None

        if cu_seqlens_q is None:
            batch, seqlen_q, heads_q, head_dim_q = q.shape
            batch_k, seqlen_k, heads_kv, head_dim = k.shape
            batch_v, seqlen_v, heads_v, head_dim_v = v.shape
            if (
                batch_k != batch or batch_v != batch or seqlen_v != seqlen_k or heads_v != heads_kv
                or cu_seqlens_k is not None or page_table is not None or seqused_k is not None
                or max_seqlen_q is not None or max_seqlen_k is not None
            ):  # fmt: skip
                return None
            lengths: Key = (batch, query_bucket(seqlen_q), length_bucket(seqlen_k))
        else:
            total_q, heads_q, head_dim_q = q.shape
            *stored, heads_kv, head_dim = k.shape
            *stored_v, heads_v, head_dim_v = v.shape
            packed = _packed_facts(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, page_table, seqused_k, total_q, stored, device)
            if packed is None or stored_v != stored or heads_v != heads_kv:
                return None
            lengths = packed

        if window is not None:
            window = window_facts(window)
        chosen: Key | None = None
        if block_m is not None or plan is not None:
            if (block_m is not None and block_m.__class__ is not int) or (plan is not None and plan.__class__ is not ForwardPlan):
                return None
            chosen = (block_m, plan)
        per_head: Key | None = None
        if sinks is not None or alibi_slopes is not None:
            if _needs_gradient(sinks) or _needs_gradient(alibi_slopes):
                return None
            per_head = (vector_facts(sinks, device), vector_facts(alibi_slopes, device))
        if out is not None and (out.dtype is not dtype or _needs_gradient(out) or not out_has_a_key(out, q.shape, head_dim_v, device)):
            return None

        alignment = alignment_of(q, k, v, out)
        if not alignment:
            return None
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        # Not tensors, ranks that cannot be, layouts without strides: the checks of Problem.forward say what is wrong.
        return None
    return (
        lengths, dtype, device, heads_q, heads_kv, head_dim_q, head_dim, head_dim_v, alignment,
        causal, window, softcap != 0.0, per_head, chosen, allow_tf32, lse, dropout,
    )  # fmt: skip


def _packed_facts(
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    page_table: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    total_q: int,
    stored: list[int],
    device: torch.device,
) -> Key | None:
    """Lengths of packed queries, and of keys that are packed or lie in pages; ``stored`` are k's dimensions before the heads."""
    starts = cu_seqlens_q.shape
    if (
        cu_seqlens_q.dtype is not torch.int32 or cu_seqlens_q.device != device or not cu_seqlens_q.is_contiguous()
        or max_seqlen_q.__class__ is not int or not 0 <= max_seqlen_q <= total_q
    ):  # fmt: skip
        return None
    used: torch.Size | None = None
    if seqused_k is not None:
        if seqused_k.dtype is not torch.int32 or seqused_k.device != device or not seqused_k.is_contiguous():
            return None
        used = seqused_k.shape

    pages: Key | None = None
    if page_table is None:
        if (
            cu_seqlens_k is None or cu_seqlens_k.dtype is not torch.int32 or cu_seqlens_k.device != device
            or cu_seqlens_k.shape != starts or not cu_seqlens_k.is_contiguous()
        ):  # fmt: skip
            return None
        [room] = stored
    else:
        if (
            cu_seqlens_k is not None or used is None
            or page_table.dtype is not torch.int32 or page_table.device != device or page_table.stride(-1) != 1
        ):  # fmt: skip
            return None
        num_pages, page_size = stored
        if num_pages > MOST_TOKENS:
            return None
        table_rows, max_pages = page_table.shape
        room = max_pages * page_size
        pages = (num_pages > 0, page_size, table_rows)

    if max_seqlen_k is not None:
        if max_seqlen_k.__class__ is not int or not 0 <= max_seqlen_k <= room <= MOST_TOKENS:
            return None
        room = max_seqlen_k or min(room, 1)
    return starts, query_bucket(max_seqlen_q), query_bucket(total_q), length_bucket(room), used, pages


def _needs_gradient(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
