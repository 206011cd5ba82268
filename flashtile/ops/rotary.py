"""Rotary position embeddings: a call, how autograd follows it, and the operator flashtile::rotary for compilers."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.autograd import forward_ad

from flashtile.arguments.gradients import check_no_tangent
from flashtile.arguments.rotary import check_rotary
from flashtile.arguments.tensors import check_writable
from flashtile.errors import UnsupportedError
from flashtile.ops.modes import note_written
from flashtile.ops.tracing import is_traced


def rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    in_place: bool = False,
    offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """``x`` with the first ``2 * cos.shape[1]`` elements of each head turned by its token's angle; differentiable in x.

    x is (batch, seqlen, heads, dim), or packed (tokens, heads, dim) with ``cu_seqlens`` and ``max_seqlen``; cos and sin are
    (positions, pairs). ``offsets``, a number or one a sequence, is added to positions. The result is contiguous, or x itself
    ``in_place``.
    """
    check_rotary(x, cos, sin, interleaved, offsets, cu_seqlens, max_seqlen)
    if in_place:
        check_writable("x", x)
    offset = 0 if isinstance(offsets, torch.Tensor) else offsets
    of_sequence = offsets.contiguous() if isinstance(offsets, torch.Tensor) else None
    starts = None if cu_seqlens is None else cu_seqlens.contiguous()
    longest = x.shape[1] if max_seqlen is None else max_seqlen
    args = cos.contiguous(), sin.contiguous(), of_sequence, offset, starts, longest, interleaved
    if is_traced(x, cos, sin):
        turned: torch.Tensor = torch.ops.flashtile.rotary(x, *args, False)
        return x.copy_(turned) if in_place else turned
    if forward_ad._current_level >= 0:
        check_no_tangent(x, cos, sin)
    if torch.is_grad_enabled() and x.requires_grad:
        return Rotary.apply(x, *args, in_place)  # type: ignore[no-any-return, no-untyped-call]
    return _rotated(x, *args, conjugate=False, in_place=in_place)


def _rotated(x: torch.Tensor, cos: torch.Tensor, *args: Any, conjugate: bool, in_place: bool = False) -> torch.Tensor:
    """The result, by the kernel of x's device."""
    if x.device.type not in ("cuda", "cpu"):
        raise UnsupportedError(f"No kernel turns tensors on {x.device}.", {"rotary": ["it runs on CUDA, ROCm and the CPU"]})
    readable = x if x.stride(-1) == 1 else x.contiguous()
    out = readable if in_place else torch.empty_like(readable, memory_format=torch.contiguous_format)
    module = importlib.import_module("flashtile.kernels.cpu_rotary" if x.device.type == "cpu" else "flashtile.kernels.rotary")
    with torch.no_grad():
        module.rotate(readable, out, cos, *args, conjugate)
        if not in_place:
            return out
        if readable is not x:
            return x.copy_(out)
        note_written(x)
        return x


class Rotary(torch.autograd.Function):
    """A call that autograd follows; to turn back is its own gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        offsets: torch.Tensor | None,
        offset: int,
        cu_seqlens: torch.Tensor | None,
        max_seqlen: int,
        interleaved: bool,
        in_place: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin, offsets, cu_seqlens)
        ctx.numbers = offset, max_seqlen, interleaved
        if in_place:
            ctx.mark_dirty(x)
        return _rotated(x, cos, sin, offsets, offset, cu_seqlens, max_seqlen, interleaved, conjugate=False, in_place=in_place)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _turned_back(ctx, grad), *[None] * 8


def _turned_back(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    cos, sin, offsets, cu_seqlens = ctx.saved_tensors
    offset, max_seqlen, interleaved = ctx.numbers
    if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return _rotated(grad, cos, sin, offsets, offset, cu_seqlens, max_seqlen, interleaved, conjugate=True)
    turned: torch.Tensor = torch.ops.flashtile.rotary(grad, cos, sin, offsets, offset, cu_seqlens, max_seqlen, interleaved, True)
    return turned


@torch.library.custom_op("flashtile::rotary", mutates_args=())
def rotary_operator(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    offsets: torch.Tensor | None,
    offset: int,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    interleaved: bool,
    conjugate: bool,
) -> torch.Tensor:
    """`rotary` as compilers see it, and as gradients of gradients do; ``conjugate`` turns back."""
    return _rotated(x, cos, sin, offsets, offset, cu_seqlens, max_seqlen, interleaved, conjugate=conjugate)


@rotary_operator.register_fake
def _(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    offsets: torch.Tensor | None,
    offset: int,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    interleaved: bool,
    conjugate: bool,
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, cos, sin, offsets, offset, cu_seqlens, max_seqlen, interleaved, conjugate = inputs
    ctx.save_for_backward(cos, sin, offsets, cu_seqlens)
    ctx.numbers = offset, max_seqlen, interleaved, conjugate


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    cos, sin, offsets, cu_seqlens = ctx.saved_tensors
    offset, max_seqlen, interleaved, conjugate = ctx.numbers
    turned = torch.ops.flashtile.rotary(grad, cos, sin, offsets, offset, cu_seqlens, max_seqlen, interleaved, not conjugate)
    return turned, *[None] * 8


rotary_operator.register_autograd(_backward, setup_context=_keep)
