"""attention and attention_varlen: prefill and training.

Exact attention after FlashAttention (Dao, Fu, Ermon, Rudra, Re: FlashAttention, 2022; Dao: FlashAttention-2, 2023; on Hopper
Shah, Bikshandi, Zhang, Thakkar, Ramani, Dao: FlashAttention-3, 2024): a program holds rows of queries and walks their keys; the
softmax is computed online (Milakov and Gimelshein: Online normalizer calculation for softmax, 2018), so no score matrix is stored.
"""

from __future__ import annotations

import torch

from flashtile import ops
from flashtile.api.traced import copied, text_of
from flashtile.arguments import check_no_out, needs_gradient
from flashtile.dropout import draw_seed
from flashtile.ops.tracing import is_traced
from flashtile.planner.plans import ForwardPlan


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    out: torch.Tensor | None = None,
    block_m: int | None = None,
    plan: ForwardPlan | None = None,
    allow_tf32: bool = False,
    deterministic: bool | None = None,
) -> torch.Tensor:
    """Attention of sequences of one length, exact.

    Scores are ``s = (q . k) * scale``; then ``s = softcap * tanh(s / softcap)`` if softcap is on; then
    ``s -= slope * |k - q - offset|`` with ALiBi, where ``offset = seqlen_k - seqlen_q``. Query ``q`` sees key ``k`` iff
    ``-left <= k - q - offset <= right``: the last query stands on the last key. Scores, softmax and sums are float32. A query
    that sees no key gives 0.

    Gradients flow to q, k, v and sinks, once (they have no gradient in turn). Within ``torch.autocast``, q, k and v are cast to its
    dtype where one of them is float32 or their dtypes differ.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim); float16, bfloat16 or float32; head_dim a multiple of 8 up to 256. Any
            strides with a contiguous last dimension.
        k: (batch, seqlen_k, num_heads_kv, head_dim); q's dtype and device. num_heads_q is a multiple of num_heads_kv.
            seqlen_k may be more or less than seqlen_q. Heads before keys are passed as ``k.transpose(1, 2)``; nothing is copied.
        v: like k, with a last dimension (head_dim_v) of its own.
        causal: hides the keys after a query's own position (the same as a right window of 0).
        window: (left, right) in keys, None on a side for unbounded.
        softcap: 0.0 is off.
        scale: by default ``head_dim ** -0.5``.
        sinks: (num_heads_q,) float32: a logit per head, in natural-log units, that joins the softmax's denominator once.
        alibi_slopes: (num_heads_q,) or (batch, num_heads_q) float32; no gradient.
        dropout_p: the share of the softmax's entries that is dropped at random, from 0.0 (none) to less than 1; the rest is scaled by
            ``1 / (1 - dropout_p)``, and lse is that of the whole. Which ones follows from a seed that each call draws from torch's
            generator of q's device (``torch.manual_seed``) and from sequence, head, query and key: no kernel, plan or device changes it.
        out: where to write, (batch, seqlen_q, num_heads_q, head_dim_v) of q's dtype; allocated where None. Returned. Only in
            calls that need no gradient.
        block_m: the query tile, in rows of one query head; the planner's choice where None.
        plan: a whole plan, obeyed as it is.
        allow_tf32: lets float32 products run in TF32.
        deterministic: True has gradients come out the same to the last bit each time; False lets q's be summed in any order, where
            that is faster. None follows ``torch.are_deterministic_algorithms_enabled()`` when gradients are computed. The results
            of the call itself never vary.

    Returns:
        out: (batch, seqlen_q, num_heads_q, head_dim_v) of q's dtype. A batch of 0, no query and no key are valid.

    Raises:
        ShapeError, DtypeError, ArgumentError: an argument is wrong; the message names it and what would work.
        UnsupportedError: no kernel can run the problem, or not with the plan asked for, with each kernel's reasons; or a gradient
            is needed where there is none: of slopes, or of keys in pages.
        ToolchainError: a kernel cannot be compiled or launched on this machine.

    Work goes to the current stream of q's device, which need not be the current device.
    """
    run = _traced if is_traced(q, k, v) else ops.forward.forward
    return run(
        q, k, v, None, None, None, None, None, None, causal, window, softcap, scale, sinks, alibi_slopes, out, block_m, plan,
        allow_tf32, deterministic, False, dropout_p,
    )[0]  # fmt: skip


def attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    out: torch.Tensor | None = None,
    block_m: int | None = None,
    plan: ForwardPlan | None = None,
    allow_tf32: bool = False,
    deterministic: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention`, and the logarithm of each softmax's denominator.

    Arguments and errors are those of `attention`.

    Returns:
        out: (batch, seqlen_q, num_heads_q, head_dim_v).
        lse: (batch, num_heads_q, seqlen_q) float32, natural logarithm, the sink included if there is one. -inf (or the sink)
            where a query sees no key.
    """
    run = _traced if is_traced(q, k, v) else ops.forward.forward
    return run(  # type: ignore[return-value]
        q, k, v, None, None, None, None, None, None, causal, window, softcap, scale, sinks, alibi_slopes, out, block_m, plan,
        allow_tf32, deterministic, True, dropout_p,
    )  # fmt: skip


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
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
    dropout_p: float = 0.0,
    out: torch.Tensor | None = None,
    block_m: int | None = None,
    plan: ForwardPlan | None = None,
    allow_tf32: bool = False,
    deterministic: bool | None = None,
) -> torch.Tensor:
    """Attention of packed sequences of unlike lengths, exact; their keys are packed too, or lie in a paged cache.

    Scores, masks and sinks are those of `attention`, each sequence with lengths of its own: ``offset`` is its number of keys
    less its number of queries.

    Args:
        q: (total_q, num_heads_q, head_dim), sequence after sequence; float16, bfloat16 or float32; head_dim a multiple of 8 up
            to 256. Any strides with a contiguous last dimension.
        k: (total_k, num_heads_kv, head_dim) packed, or with ``page_table`` (num_pages, page_size, num_heads_kv, head_dim);
            q's dtype and device. num_heads_q is a multiple of num_heads_kv.
        v: like k, with a last dimension (head_dim_v) of its own.
        cu_seqlens_q: (batch + 1,) int32: where each sequence's queries start; the first is 0. Rows of q beyond the last entry
            belong to nobody: out 0, lse -inf.
        cu_seqlens_k: (batch + 1,) int32: where each sequence's keys start; None with ``page_table``.
        max_seqlen_q: the most queries of one sequence; the device is not read for it. Rows of a longer sequence may not be written.
        max_seqlen_k: the most keys of one sequence, as a hint for the plan; by default all there is room for. Changes no result,
            but has to be right where a gradient is needed: keys beyond it may be left without one. Then it saves time, too.
        page_table: (batch, max_pages) int32: the pages of each sequence in order. Entries past a sequence's end are never
            read; an id outside the cache makes its keys invisible. Pages have no gradient.
        seqused_k: (batch,) int32: how many of its keys each sequence uses, the first ones; needed with ``page_table``. Clamped
            on the device to what there are.
        alibi_slopes: (num_heads_q,) or (batch, num_heads_q) float32.
        out: where to write, (total_q, num_heads_q, head_dim_v) of q's dtype; allocated where None. Returned. Only in calls that
            need no gradient.
        dropout_p: as for `attention`, but not of keys in pages.
        causal, window, softcap, scale, sinks, block_m, plan, allow_tf32, deterministic: as for `attention`.

    Returns:
        out: (total_q, num_heads_q, head_dim_v) of q's dtype. A batch of 0, no query, and sequences of no query or no key are
            valid.

    Raises:
        What `attention` raises. Values that live on the device are not read: `flashtile.checked` does that on request.
    """
    run = _traced if is_traced(q, k, v) else ops.forward.forward
    return run(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, page_table, seqused_k, causal, window, softcap, scale,
        sinks, alibi_slopes, out, block_m, plan, allow_tf32, deterministic, False, dropout_p,
    )[0]  # fmt: skip


def attention_varlen_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
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
    dropout_p: float = 0.0,
    out: torch.Tensor | None = None,
    block_m: int | None = None,
    plan: ForwardPlan | None = None,
    allow_tf32: bool = False,
    deterministic: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_varlen`, and the logarithm of each softmax's denominator.

    Arguments and errors are those of `attention_varlen`.

    Returns:
        out: (total_q, num_heads_q, head_dim_v).
        lse: (num_heads_q, total_q) float32, natural logarithm, the sink included if there is one. -inf (or the sink) where a
            query sees no key; -inf in rows that belong to nobody.
    """
    run = _traced if is_traced(q, k, v) else ops.forward.forward
    return run(  # type: ignore[return-value]
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, page_table, seqused_k, causal, window, softcap, scale,
        sinks, alibi_slopes, out, block_m, plan, allow_tf32, deterministic, True, dropout_p,
    )  # fmt: skip


def _traced(
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
    scale: float | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    out: torch.Tensor | None,
    block_m: int | None,
    plan: ForwardPlan | None,
    allow_tf32: bool,
    deterministic: bool | None,
    want_lse: bool,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Under torch.compile the whole call is one operator; a given ``out`` is copied into, which its graph may fuse."""
    left, right = (None, None) if window is None else window
    q, k, v = ops.cast_by_autocast(q, k, v) or (q, k, v)
    differentiable = needs_gradient(q, k, v, sinks, alibi_slopes, out)
    if differentiable:
        check_no_out(out)
    seed = draw_seed(q.device) if dropout_p else None
    result, lse = torch.ops.flashtile.forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, page_table, seqused_k, causal, left, right, softcap, scale,
        sinks, alibi_slopes, block_m, text_of(plan, ForwardPlan), allow_tf32, deterministic, want_lse or differentiable,
        dropout_p, seed,
    )  # fmt: skip
    return (result if out is None else copied(result, out)), lse
