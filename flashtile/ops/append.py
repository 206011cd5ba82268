"""An append to a cache, and the operator flashtile::append_kv. On a GPU, calls of a kind that comes again take the way of `replay`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.autograd import forward_ad

from flashtile.arguments import check_no_tangent
from flashtile.arguments.append import check_append
from flashtile.checking import CHECKING, check_append_values
from flashtile.errors import UnsupportedError
from flashtile.kernels.call import AppendCall
from flashtile.ops.modes import apart_from_callers_modes, note_written

Appended = tuple[torch.Tensor, torch.Tensor | None]
"""The keys of each sequence from now on, (batch,) int32; and q turned, None where nothing turns it."""

_repeat: Callable[..., Appended | None] | None = None  # an append's arguments to its result, or None for a call that was not recorded


def append(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seqlens_k: torch.Tensor,
    page_table: torch.Tensor | None,
    cu_seqlens_k_new: torch.Tensor | None,
    q: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int | None,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
    rotary_seqlens: torch.Tensor | None,
    rotary_interleaved: bool,
    queries_advance: bool,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> Appended:
    """One append on the tensors' own device."""
    global _repeat
    if forward_ad._current_level >= 0:
        check_no_tangent(k_cache, v_cache, k, v, q, rotary_cos, rotary_sin, k_scale, v_scale)
    args = (
        k_cache, v_cache, k, v, seqlens_k, page_table, cu_seqlens_k_new, q, cu_seqlens_q, max_seqlen_q, rotary_cos, rotary_sin,
        rotary_seqlens, rotary_interleaved, queries_advance, k_scale, v_scale,
    )  # fmt: skip
    checking = CHECKING.get()
    if _repeat is not None and not checking:
        repeated = _repeat(*args)
        if repeated is not None:
            if torch.is_grad_enabled():
                note_written(k_cache, v_cache)
            return repeated
    check_append(*args)
    turned_q = None
    if q is not None and rotary_cos is not None:
        turned_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    cos, sin = (None, None) if rotary_cos is None or rotary_sin is None else (rotary_cos.contiguous(), rotary_sin.contiguous())
    call = AppendCall(
        k, v, k_cache, v_cache, seqlens_k, page_table, cu_seqlens_k_new, None if turned_q is None else q, cu_seqlens_q,
        cos, sin, rotary_seqlens, torch.empty_like(seqlens_k), turned_q, rotary_interleaved, queries_advance,
        k_scale, v_scale,
    )  # fmt: skip
    if checking:
        check_append_values(call)
    if not seqlens_k.shape[0]:
        return call.new_seqlens, turned_q
    run: Any = _module_for(k_cache.device).runner_for(call)
    with apart_from_callers_modes(k_cache.device) if k_cache.device.type == "cpu" else nullcontext():
        run(call)
    if torch.is_grad_enabled():
        note_written(k_cache, v_cache)
    note = getattr(run, "note", None)
    if note is not None:
        _repeat = note(args, call) or _repeat
    return call.new_seqlens, turned_q


def _module_for(device: torch.device) -> Any:
    if device.type not in ("cuda", "cpu"):
        raise UnsupportedError(f"No kernel appends to a cache on {device}.", {"append": ["it runs on CUDA, ROCm and the CPU"]})
    return importlib.import_module("flashtile.kernels.cpu_append" if device.type == "cpu" else "flashtile.kernels.append")


@torch.library.custom_op("flashtile::append_kv", mutates_args=("k_cache", "v_cache"))
def append_operator(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seqlens_k: torch.Tensor,
    page_table: torch.Tensor | None,
    cu_seqlens_k_new: torch.Tensor | None,
    q: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int | None,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
    rotary_seqlens: torch.Tensor | None,
    rotary_interleaved: bool,
    queries_advance: bool,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`append` as torch.compile sees it: the turned q has no element where nothing turns it."""
    seqlens, turned_q = append(
        k_cache, v_cache, k, v, seqlens_k, page_table, cu_seqlens_k_new, q, cu_seqlens_q, max_seqlen_q, rotary_cos, rotary_sin,
        rotary_seqlens, rotary_interleaved, queries_advance, k_scale, v_scale,
    )  # fmt: skip
    return seqlens, k.new_empty(0) if turned_q is None else turned_q


@append_operator.register_fake
def _(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seqlens_k: torch.Tensor,
    page_table: torch.Tensor | None,
    cu_seqlens_k_new: torch.Tensor | None,
    q: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int | None,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
    rotary_seqlens: torch.Tensor | None,
    rotary_interleaved: bool,
    queries_advance: bool,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    seqlens = torch.empty_like(seqlens_k)
    if q is None or rotary_cos is None:
        return seqlens, k.new_empty(0)
    return seqlens, torch.empty_like(q, memory_format=torch.contiguous_format)
