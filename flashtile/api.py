"""The public functions: decode, decode_with_lse, merge and warmup.

Exact attention after FlashAttention (Dao, Fu, Ermon, Rudra, Re: FlashAttention, 2022): the softmax is computed online
(Milakov and Gimelshein: Online normalizer calculation for softmax, 2018), so no score matrix is stored. Decode steps
also cut the keys and fold the partial results (Dao, Haziza, Massa, Sizov: Flash-Decoding, 2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from flashtile import ops
from flashtile.errors import ArgumentError, DtypeError, ShapeError, message
from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem


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
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    block_m: int | None = None,
    num_splits: int | None = None,
    plan: DecodePlan | None = None,
    allow_tf32: bool = False,
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
            head_dim); q's dtype and device. num_heads_q is a multiple of num_heads_kv. A cache in
            (batch, num_heads_kv, capacity, head_dim) order is passed as ``cache.transpose(1, 2)``; nothing is copied.
        v_cache: like k_cache, with a last dimension (head_dim_v) of its own.
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
        out: where to write, (*q.shape[:-1], head_dim_v); allocated where None. Returned.
        out_dtype: q's dtype (default, or out's) or float32 for partial results that `merge` folds.
        block_m: the query tile, 1, 8, 16, 32, 64 or 128 rows of (query, head of a group); the planner's choice where None.
        num_splits: how many programs share a sequence's keys; the planner's choice where None.
        plan: a whole plan, obeyed as it is.
        allow_tf32: lets float32 products run in TF32.

    Returns:
        out: (*q.shape[:-1], head_dim_v). A batch of 0, no query and a sequence of no keys are valid.

    Raises:
        ShapeError, DtypeError, ArgumentError: an argument is wrong; the message names it and what would work. Values
            that live on the device are not read: `flashtile.checked` does that on request.
        UnsupportedError: no kernel can run the problem, or not with the plan asked for; with each kernel's reasons.
        ToolchainError: a kernel cannot be compiled or launched on this machine.

    No gradient flows through decode. Work goes to the current stream of q's device, which need not be the current device.
    """
    run = _decode_traced if torch.compiler.is_compiling() else ops.decode
    return run(
        q, k_cache, v_cache, seqlens_k, page_table, cu_seqlens_q, max_seqlen_q, max_seqlen_k, causal, window, softcap, scale,
        sinks, alibi_slopes, out, out_dtype, block_m, num_splits, plan, allow_tf32, False,
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
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    block_m: int | None = None,
    num_splits: int | None = None,
    plan: DecodePlan | None = None,
    allow_tf32: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`decode`, and the logarithm of each softmax's denominator.

    Arguments and errors are those of `decode`.

    Returns:
        out: (*q.shape[:-1], head_dim_v).
        lse: float32, natural logarithm, the sink included if there is one; (batch, num_heads_q, seqlen_q), or
            (num_heads_q, total_q) where q is packed. -inf (or the sink) where a query sees no key.
    """
    run = _decode_traced if torch.compiler.is_compiling() else ops.decode
    return run(  # type: ignore[return-value]
        q, k_cache, v_cache, seqlens_k, page_table, cu_seqlens_q, max_seqlen_q, max_seqlen_k, causal, window, softcap, scale,
        sinks, alibi_slopes, out, out_dtype, block_m, num_splits, plan, allow_tf32, True,
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
    out: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    block_m: int | None,
    num_splits: int | None,
    plan: DecodePlan | None,
    allow_tf32: bool,
    want_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Under torch.compile the whole call is one operator; a given ``out`` is copied into, which its graph may fuse."""
    left, right = (None, None) if window is None else window
    if out is not None and out_dtype is None:
        out_dtype = out.dtype
    result, lse = torch.ops.flashtile.decode(
        q, k_cache, v_cache, seqlens_k, page_table, cu_seqlens_q, max_seqlen_q, max_seqlen_k, causal, left, right, softcap, scale,
        sinks, alibi_slopes, out_dtype, block_m, num_splits, None if plan is None else _text_of(plan), allow_tf32, want_lse,
    )  # fmt: skip
    if out is None:
        return result, lse
    if out.shape != result.shape:
        raise ShapeError(message("out", f"shape {tuple(result.shape)}", f"shape {tuple(out.shape)}", "Leave it out to have it allocated."))
    if out.dtype != result.dtype:
        raise DtypeError(message("out", f"dtype {result.dtype}", out.dtype, "Let out and out_dtype agree."))
    return out.copy_(result), lse


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _text_of(plan: DecodePlan) -> str:
    return plan.to_json()


def merge(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Folds attention over parts of the keys into attention over all of them. Differentiable, in plain torch.

    Each part is an attention result over keys of its own: ``lse = log(sum exp(lse_i))`` and
    ``out = sum(exp(lse_i - lse) * out_i)``. The order of the parts does not matter beyond rounding. Parts that saw no key
    (lse -inf) add nothing, whatever their out holds. A sink must be in one part only.

    Args:
        outs: one or more of (batch, seqlen_q, heads, dim), or packed (total_q, heads, dim); all of one shape, floating.
        lses: as many of (batch, heads, seqlen_q), or (heads, total_q); natural logarithm, floating.

    Returns:
        out: the shape of each part and their common dtype; computed in float32, or float64 where a part is.
        lse: the shape of each part's, float32, or float64 where a part is; -inf where no part saw a key.

    Raises:
        ArgumentError: no part, or not as many lses as outs, or devices that differ.
        ShapeError: shapes that differ, or a lse that does not fit its out.
        DtypeError: a part that is not a floating tensor.
    """
    _check_parts(outs, lses)
    dtype = outs[0].dtype
    for part in outs[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    work = torch.float64 if any(part.dtype == torch.float64 for part in (*outs, *lses)) else torch.float32
    stacked = torch.stack([lse.to(work) for lse in lses])  # (parts, [batch,] heads, queries)
    # The maximum only scales: the results do not depend on it, so no gradient needs to pass through it.
    top = stacked.detach().amax(dim=0)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(stacked - top)
    total = weights.sum(dim=0)
    seen = total > 0
    total = torch.where(seen, total, 1.0)
    lse = torch.where(seen, top + torch.log(total), -torch.inf)
    # (parts, [batch,] queries, heads, 1)
    shares = (weights / total).transpose(-1, -2).unsqueeze(-1)
    blind = (stacked == -torch.inf).transpose(-1, -2).unsqueeze(-1)
    parts = torch.stack([part.to(work) for part in outs])
    return (torch.where(blind, 0.0, parts) * shares).sum(dim=0).to(dtype), lse


def _check_parts(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> None:
    if len(outs) == 0 or len(outs) != len(lses):
        raise ArgumentError(
            message(
                "lses", "one for each of at least one out", f"{len(outs)} outs and {len(lses)} lses", "Pass two sequences of one length."
            )
        )
    first = outs[0]
    for i, (out, lse) in enumerate(zip(outs, lses)):
        for name, tensor in ((f"outs[{i}]", out), (f"lses[{i}]", lse)):
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                raise DtypeError(
                    message(
                        name, "a floating tensor", getattr(tensor, "dtype", type(tensor).__name__), "Pass what decode_with_lse returns."
                    )
                )
            if tensor.device != first.device:
                raise ArgumentError(
                    message(name, f"a tensor on the device of outs[0], {first.device}", tensor.device, "Move it there with .to(...).")
                )
        if out.ndim not in (3, 4) or out.shape != first.shape:
            wanted = tuple(first.shape) if first.ndim in (3, 4) else "(batch, seqlen_q, heads, dim) or (total_q, heads, dim)"
            raise ShapeError(
                message(f"outs[{i}]", f"shape {wanted}", f"shape {tuple(out.shape)}", "All parts are results for the same queries.")
            )
        fitting = (*out.shape[:-3], out.shape[-2], out.shape[-3])
        if tuple(lse.shape) != fitting:
            raise ShapeError(
                message(
                    f"lses[{i}]",
                    f"shape {fitting}, heads before queries",
                    f"shape {tuple(lse.shape)}",
                    "Transpose it if queries come before heads.",
                )
            )


def warmup(problems: Iterable[Problem], device: torch.device | str | None = None) -> list[DecodePlan]:
    """Plans problems and compiles their kernels ahead of the first call.

    Args:
        problems: what will be called; ``Problem.decode(...)`` makes one from a call's arguments, ``Problem(batch=...)``
            from numbers alone.
        device: where they will run; by default the current GPU, or the CPU where there is none.

    Returns:
        The plan of each problem, in order.

    Raises:
        UnsupportedError: no kernel can run a problem on this device.
        ToolchainError: a kernel cannot be compiled on this machine.
    """
    where = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.empty(0, device=where).device  # "cuda" alone means the current GPU: give it its index
    figures = Device.of(where)
    plans = []
    for problem in problems:
        plan = plan_decode(problem, figures)
        prepare = getattr(ops.kernel_module(plan), "prepare", None)
        if prepare is not None:
            prepare(problem, plan, where)
        plans.append(plan)
    return plans
