"""The functions below FlashAttention-2's public ones, which other libraries call: one pass each, not followed by autograd.

Ring attention and its kin call these with parts of the keys, merge the outputs by their log-sum-exps, and hand the merged ones to the
backward functions. ``rng_state`` of a forward function is what its backward function needs to drop the same entries. The third and
fourth result of a forward function are None without dropout, and the third, the probabilities, always. Head dims are multiples of 8.
"""

from __future__ import annotations

import torch

from flashtile import ops
from flashtile.dropout import draw_seed
from flashtile.errors import ArgumentError, DtypeError, ShapeError, message
from flashtile.flash_attn.attend import Packed
from flashtile.flash_attn.conventions import lse_from_either, lse_of_two, window_of, with_rows
from flashtile.flash_attn.refusals import check_splits, check_supported
from flashtile.flash_attn.varlen import lengths_of_two
from flashtile.planner.choose import plan_forward
from flashtile.planner.device import Device
from flashtile.problem import Problem

Forwarded = tuple[torch.Tensor, torch.Tensor, None, torch.Tensor | None]
"""out, softmax_lse, S_dmask and rng_state."""


def _get_block_size_n(device: torch.device, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """The keys that a program of attention takes at a step, in the plan for a long sequence of such heads."""
    dim = head_dim + -head_dim % 8
    facts = Problem(operation="forward", seqlen_q=4096, seqlen_k=4096, num_heads_q=16, num_heads_kv=16, head_dim=dim, dropout=is_dropout)
    window = (None, 0 if is_causal else None)
    return plan_forward(facts.with_(band=type(facts.band)(*window)), Device.of(device)).block_n


def _flash_attn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    return_softmax: bool,
) -> Forwarded:
    """out and softmax_lse of `flash_attn_func`, and rng_state."""
    window = window_of((window_size_left, window_size_right))
    result: Forwarded = _forward(q, k, v, None, dropout_p, softmax_scale, causal, window, softcap, alibi_slopes)
    return result


def _flash_attn_varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    return_softmax: bool = False,
    block_table: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> Forwarded:
    """out and softmax_lse of `flash_attn_varlen_func`, and rng_state. Every row is written, so ``zero_tensors`` changes nothing."""
    check_supported("_flash_attn_varlen_forward", leftpad_k=leftpad_k)
    check_splits("_flash_attn_varlen_forward", num_splits)
    window = window_of((window_size_left, window_size_right))
    packed = lengths_of_two(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_k)
    result: Forwarded = _forward(q, k, v, packed, dropout_p, softmax_scale, causal, window, softcap, alibi_slopes)
    return result


def _flash_attn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
) -> None:
    """Writes the gradients to those of ``dq``, ``dk`` and ``dv`` that are given. FlashAttention returns its scratch; this returns None."""
    window = window_of((window_size_left, window_size_right))
    _backward(
        dout, q, k, v, out, softmax_lse, (dq, dk, dv), None, dropout_p, softmax_scale, causal, window, softcap, alibi_slopes,
        deterministic, rng_state,
    )  # fmt: skip


def _flash_attn_varlen_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
    zero_tensors: bool = False,
) -> None:
    """`_flash_attn_backward` of packed sequences. Every row is written, so ``zero_tensors`` changes nothing."""
    window = window_of((window_size_left, window_size_right))
    packed = lengths_of_two(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    _backward(
        dout, q, k, v, out, softmax_lse, (dq, dk, dv), packed, dropout_p, softmax_scale, causal, window, softcap, alibi_slopes,
        deterministic, rng_state,
    )  # fmt: skip


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packed: Packed | None,
    dropout_p: float,
    scale: float,
    causal: bool,
    window: tuple[int | None, int | None],
    softcap: float,
    alibi_slopes: torch.Tensor | None,
) -> Forwarded:
    seed = draw_seed(q.device) if dropout_p else None
    with torch.no_grad():
        out, lse = ops.forward.forward(
            with_rows(q), with_rows(k), with_rows(v), *_lengths(packed), None if packed is None else packed.page_table,
            None if packed is None else packed.seqused_k, causal, window, softcap, scale, None, alibi_slopes, None, None, None, False,
            None, True, dropout_p, seed,
        )  # fmt: skip
        return out, lse_of_two(lse), None, seed  # type: ignore[arg-type]  # it was asked for


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    grads: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    packed: Packed | None,
    dropout_p: float,
    scale: float,
    causal: bool,
    window: tuple[int | None, int | None],
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None,
) -> None:
    if dropout_p and rng_state is None:
        raise ArgumentError(message("rng_state", "what the forward call returned", None, "It says which entries were dropped."))
    *batch, queries, heads, _ = q.shape
    shape = (*q.shape[:-1], v.shape[-1])
    for name, tensor, wanted, dtype in (
        ("dout", dout, shape, q.dtype), ("out", out, shape, q.dtype), ("softmax_lse", softmax_lse, (*batch, heads, queries), torch.float32),
        ("dq", grads[0], q.shape, q.dtype), ("dk", grads[1], k.shape, k.dtype), ("dv", grads[2], v.shape, v.dtype),
    ):  # fmt: skip
        _check_like(name, tensor, tuple(wanted), dtype, q.device)
    seed = None
    if dropout_p:
        _check_like("rng_state", rng_state, (2,), torch.int64, q.device)
        seed = rng_state.contiguous()  # type: ignore[union-attr]  # it is checked
    dq, dk, dv = (_writable(grad, x) for grad, x in zip(grads, (q, k, v)))
    with torch.no_grad():
        ops.backward.backward(
            with_rows(q), with_rows(k), with_rows(v), with_rows(out), lse_from_either(softmax_lse), dout, None, *_lengths(packed),
            None if packed is None else packed.seqused_k, causal, window, float(softcap), scale, None, alibi_slopes, False,
            deterministic or None, False, dropout_p, seed, (dq, dk, dv),
        )  # fmt: skip
        for grad, written in zip(grads, (dq, dk, dv)):
            if grad is not None and grad is not written:
                grad.copy_(written)


def _lengths(packed: Packed | None) -> tuple[torch.Tensor | None, torch.Tensor | None, int | None, int | None]:
    return (None, None, None, None) if packed is None else packed[:4]


def _writable(grad: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """What a kernel writes x's gradient to: the tensor that was given, if it can."""
    return ops.backward.gradient_like(x) if grad is None or grad.stride(-1) != 1 else grad


def _check_like(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor is None and name in ("dq", "dk", "dv"):
        return
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype:
        raise DtypeError(message(name, f"a tensor of {dtype}", getattr(tensor, "dtype", type(tensor).__name__), "Cast it first."))
    if tuple(tensor.shape) != shape or tensor.device != device:
        got = f"shape {tuple(tensor.shape)} on {tensor.device}"
        raise ShapeError(message(name, f"shape {shape} on {device}", got, "It goes with the forward call's q, k and v."))
