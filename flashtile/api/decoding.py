"""decode and decode_with_lse: a few new queries over a key-value cache.

Exact attention after FlashAttention (Dao, Fu, Ermon, Rudra, Re: FlashAttention, 2022): the softmax is computed online
(Milakov and Gimelshein: Online normalizer calculation for softmax, 2018), so no score matrix is stored. Decode steps
also cut the keys and fold the partial results (Dao, Haziza, Massa, Sizov: Flash-Decoding, 2023).
"""

from __future__ import annotations

import torch

from flashtile import ops
from flashtile.api.traced import copied, text_of
from flashtile.ops.tracing import is_traced
from flashtile.planner.plans import DecodePlan


def decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seqlens_k: torch.Tensor,
    *,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    block_m: int | None = None,
    num_splits: int | None = None,
    plan: DecodePlan | None = None,
    allow_tf32: bool = False,
    after_append: bool = False,
) -> torch.Tensor:
    """Attention of a few new queries over a key-value cache, exact, for inference.

    Scores are ``s = (q . k) * scale``; then ``s = softcap * tanh(s / softcap)`` if softcap is on; then
    ``s -= slope * |k - q - offset|`` with ALiBi, where ``offset = seqlen_k - seqlen_q`` of the sequence. Query ``q`` sees
    key ``k`` iff ``-left <= k - q - offset <= right``: the last query stands on the last key. Scores, softmax and sums
    are float32. A query that sees no key gives 0.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim), or with ``cu_seqlens_q`` packed (total_q, num_heads_q, head_dim);
            float16, bfloat16 or float32; head_dim a multiple of 8 up to 256. Any strides with a contiguous last dimension.
        k_cache: (batch, capacity, num_heads_kv, head_dim), or with ``page_table`` (num_pages, page_size, num_heads_kv,
            head_dim); q's device, and q's dtype, or beside a 16-bit q float8_e4m3fn or int8. num_heads_q is a multiple of
            num_heads_kv. A cache in
            (batch, num_heads_kv, capacity, head_dim) order is passed as ``cache.transpose(1, 2)``; nothing is copied.
        v_cache: like k_cache, dtype included, with a last dimension (head_dim_v) of its own.
        seqlens_k: (batch,) int32: the keys of each sequence, the new ones included. Clamped on the device to what the
            cache holds: ``capacity``, or ``max_pages * page_size``.
        page_table: (batch, max_pages) int32: the pages of each sequence in order. Entries past a sequence's end are
            never read; an id outside the cache makes its keys invisible.
        cu_seqlens_q: (batch + 1,) int32: where each sequence's queries start in a packed q; the first is 0. Rows of q
            beyond the last entry belong to nobody: out 0, lse -inf.
        max_seqlen_q: the most queries of one sequence; needed with cu_seqlens_q, since the device is not read for it.
        max_seqlen_k: the longest sequence, in keys, as a hint for the plan; by default the capacity. Changes no result.
        causal: hides the keys after a query's own position (the same as a right window of 0).
        window: (left, right) in keys, None on a side for unbounded.
        softcap: 0.0 is off.
        scale: by default ``head_dim ** -0.5``.
        sinks: (num_heads_q,) float32: a logit per head, in natural-log units, that joins the softmax's denominator once.
        alibi_slopes: (num_heads_q,) or (batch, num_heads_q) float32.
        k_scale: what a key of a quantised cache is, over what is stored: float32 of one element, (num_heads_kv,), or
            (batch, num_heads_kv), on the device. Any number; 1 where None.
        v_scale: the same for values.
        leftpad_k: (batch,) int32: the keys at the beginning of each sequence that no query sees, though seqlens_k counts them. Clamped
            on the device to [0, seqlens_k].
        out: where to write, (*q.shape[:-1], head_dim_v); allocated where None. Returned.
        out_dtype: q's dtype (default, or out's) or float32 for partial results that `merge` folds.
        block_m: the query tile, 1, 8, 16, 32, 64 or 128 rows of (query, head of a group); the planner's choice where None.
        num_splits: how many programs share a sequence's keys; the planner's choice where None.
        plan: a whole plan, obeyed as it is.
        allow_tf32: lets float32 products run in TF32.
        after_append: a hint that changes no result: `append_kv` is what this stream was given last. Then the kernel takes its place on
            the GPU while that one ends, and waits there, unless the planner finds it better off later.

    Returns:
        out: (*q.shape[:-1], head_dim_v). A batch of 0, no query and a sequence of no keys are valid.

    Raises:
        ShapeError, DtypeError, ArgumentError: an argument is wrong; the message names it and what would work. Values
            that live on the device are not read: `flashtile.checked` does that on request.
        UnsupportedError: no kernel can run the problem, or not with the plan asked for; with each kernel's reasons.
        ToolchainError: a kernel cannot be compiled or launched on this machine.

    No gradient flows through decode. Work goes to the current stream of q's device, which need not be the current device.
    """
    run = _decode_traced if is_traced(q, k_cache, v_cache) else ops.decode.decode
    return run(
        q, k_cache, v_cache, seqlens_k, page_table, cu_seqlens_q, max_seqlen_q, max_seqlen_k, causal, window, softcap, scale,
        sinks, alibi_slopes, k_scale, v_scale, leftpad_k, out, out_dtype, block_m, num_splits, plan, allow_tf32, after_append, False,
    )[0]  # fmt: skip


def decode_with_lse(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seqlens_k: torch.Tensor,
    *,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    block_m: int | None = None,
    num_splits: int | None = None,
    plan: DecodePlan | None = None,
    allow_tf32: bool = False,
    after_append: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`decode`, and the logarithm of each softmax's denominator.

    Arguments and errors are those of `decode`.

    Returns:
        out: (*q.shape[:-1], head_dim_v).
        lse: float32, natural logarithm, the sink included if there is one; (batch, num_heads_q, seqlen_q), or
            (num_heads_q, total_q) where q is packed. -inf (or the sink) where a query sees no key.
    """
    run = _decode_traced if is_traced(q, k_cache, v_cache) else ops.decode.decode
    return run(  # type: ignore[return-value]
        q, k_cache, v_cache, seqlens_k, page_table, cu_seqlens_q, max_seqlen_q, max_seqlen_k, causal, window, softcap, scale,
        sinks, alibi_slopes, k_scale, v_scale, leftpad_k, out, out_dtype, block_m, num_splits, plan, allow_tf32, after_append, True,
    )  # fmt: skip


def _decode_traced(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seqlens_k: torch.Tensor,
    page_table: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    softcap: float,
    scale: float | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    leftpad_k: torch.Tensor | None,
    out: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    block_m: int | None,
    num_splits: int | None,
    plan: DecodePlan | None,
    allow_tf32: bool,
    after_append: bool,
    want_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Under torch.compile the whole call is one operator; a given ``out`` is copied into, which its graph may fuse."""
    left, right = (None, None) if window is None else window
    if out is not None and out_dtype is None:
        out_dtype = out.dtype
    result, lse = torch.ops.flashtile.decode(
        q, k_cache, v_cache, seqlens_k, page_table, cu_seqlens_q, max_seqlen_q, max_seqlen_k, causal, left, right, softcap, scale,
        sinks, alibi_slopes, k_scale, v_scale, leftpad_k, out_dtype, block_m, num_splits, text_of(plan, DecodePlan), allow_tf32,
        after_append, want_lse,
    )  # fmt: skip
    return (result if out is None else copied(result, out)), lse
