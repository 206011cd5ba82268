"""New keys and values written into a cache, turned by their angles; queries turned beside them; and the new lengths: one launch.

A program moves some rows, each one head of one token: of k, of v, or of q. Source of the angles: RoFormer (Su et al. 2021).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashtile.kernels.call import AppendCall
from flashtile.kernels.launch import TRITON_DTYPES, Arg, Launch, Spec, launcher, on_device, pointer_of
from flashtile.kernels.operands import kv_scales_view, rows_view
from flashtile.kernels.tile.cache import is_page, page_of
from flashtile.kernels.tile.quantised import stored
from flashtile.kernels.tile.rotary import SequencesView, TablesView, angles_at, held, move_turned, tokens_of
from flashtile.kernels.tile.views import KeysView, KvScalesView, PagesView, RowsView, row_offsets
from flashtile.planner.device import Device
from flashtile.rounding import alignment_of

_ELEMENTS = 2048  # that a program holds at once: few, since a decode step has few rows and waits for them
_WARPS = 4
_TIMES_AVERAGE = 4  # packed sequences up to so many times their average have a program for each block of rows; longer ones, fewer


class CacheView(NamedTuple):
    """Lengths before the call (batch,) int32, what they are clamped to, and where those after it are written."""

    seqlens: Any
    capacity: Any
    new_seqlens: Any


class Kind(NamedTuple):
    """What a call's kernel is compiled for."""

    dtype: torch.dtype
    dtype_cache: torch.dtype
    scales: tuple[bool, bool]  # whether keys and values have a scale
    alignment: int
    packed_new: bool
    packed_q: bool
    page_size: int
    head_dim: int
    head_dim_v: int
    dtype_table: torch.dtype | None  # None: nothing is turned
    aligned_tables: bool
    own_positions: bool
    pairs: int
    interleaved: bool
    turns_q: bool
    queries_advance: bool
    dependent: bool  # launched as a dependent of the last kernel, and lets the next one be one


@triton.jit
def append_kernel(
    q, turned_q, k, v, k_cache, v_cache, kv_scales, tables, pages, cache, queries, news,
    num_heads_q, num_heads_kv, query_blocks, key_blocks,
    BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, PAGE_SIZE: tl.constexpr, PAIRS: tl.constexpr,
    PAIRS_HELD: tl.constexpr, REST_HELD: tl.constexpr, INTERLEAVED: tl.constexpr, QUERIES_ADVANCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: for each sequence ``key_blocks`` programs for k, as many for v, and ``query_blocks`` for q.

    A program takes every so-manieth block of rows, so that all are taken whatever the lengths of packed tokens are. ``tables`` is
    None, and so is ``q``, where nothing is turned. PDL: it takes its place while the last kernel ends, waits there, and lets the next
    one do the same.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    job = tl.program_id(0) % (2 * key_blocks + query_blocks)
    b = tl.program_id(0) // (2 * key_blocks + query_blocks)
    given = tl.load(cache.seqlens + b)
    seqlen = tl.minimum(tl.maximum(given, 0), cache.capacity)
    position = given
    if tables.offsets is not None:
        position = tl.load(tables.offsets + b).to(tl.int32)
    if job < 2 * key_blocks:
        first, end = tokens_of(news, b)
        if job == 0:
            tl.store(cache.new_seqlens + b, tl.minimum(end - first, cache.capacity - seqlen) + seqlen)
        b_rows = b * 0 if news.cu_seqlens is not None else b
        for start in tl.range(job % key_blocks * BLOCK_M, (end - first) * num_heads_kv, key_blocks * BLOCK_M, num_stages=1):
            # (BLOCK_M,)
            row = start + tl.arange(0, BLOCK_M)
            token = row // num_heads_kv
            head = row % num_heads_kv
            key = seqlen + token
            inside = (token < end - first) & (key < cache.capacity)
            if PAGE_SIZE == 0:
                block, slot = b + token * 0, key
            else:
                page = page_of(pages, b, key, inside, PAGE_SIZE)
                inside = inside & is_page(pages, page)
                block, slot = page, key % PAGE_SIZE
            # a scale is written inside the calls: it may be None, which a name bound in a branch may not
            if job < key_blocks:
                source = k.ptr + row_offsets(k, b_rows, first + token, head)
                target = k_cache.ptr + _place(k_cache, block, slot, head)
                if tables.cos is not None:
                    cos, sin = angles_at(tables, position + token, inside, PAIRS, PAIRS_HELD)
                    move_turned(
                        source, target, inside, cos, sin,
                        _scale(k, k_cache, kv_scales.k, kv_scales.k_stride_b, kv_scales.k_stride_h, b, head),
                        PAIRS, PAIRS_HELD, HEAD_DIM, REST_HELD, INTERLEAVED, False,
                    )  # fmt: skip
                else:
                    _move(
                        source, target, inside,
                        _scale(k, k_cache, kv_scales.k, kv_scales.k_stride_b, kv_scales.k_stride_h, b, head), HEAD_DIM,
                    )  # fmt: skip
            else:
                _move(
                    v.ptr + row_offsets(v, b_rows, first + token, head), v_cache.ptr + _place(v_cache, block, slot, head), inside,
                    _scale(v, v_cache, kv_scales.v, kv_scales.v_stride_b, kv_scales.v_stride_h, b, head), HEAD_DIM_V,
                )  # fmt: skip
    elif q.ptr is not None:
        first, end = tokens_of(queries, b)
        b_rows = b * 0 if queries.cu_seqlens is not None else b
        for start in tl.range((job - 2 * key_blocks) * BLOCK_M, (end - first) * num_heads_q, query_blocks * BLOCK_M, num_stages=1):
            row = start + tl.arange(0, BLOCK_M)
            token = row // num_heads_q
            head = row % num_heads_q
            real = token < end - first
            at = position + (token if QUERIES_ADVANCE else token * 0)
            cos, sin = angles_at(tables, at, real, PAIRS, PAIRS_HELD)
            source = q.ptr + row_offsets(q, b_rows, first + token, head)
            target = turned_q.ptr + row_offsets(turned_q, b_rows, first + token, head)
            move_turned(source, target, real, cos, sin, None, PAIRS, PAIRS_HELD, HEAD_DIM, REST_HELD, INTERLEAVED, False)


@triton.jit
def _place(view, block, slot, head):
    """(rows,) element offsets of heads in a cache: ``block`` is the sequence or page, ``slot`` the key's place there."""
    return block.to(tl.int64) * view.stride_b + slot.to(tl.int64) * view.stride_n + head.to(tl.int64) * view.stride_h


@triton.jit
def _scale(new, cache, ptr, stride_b, stride_h, b, head):
    """What the cache's codes of heads (rows,) are multiplied by, [rows, 1]; None where it holds what is new as it comes."""
    if new.ptr.dtype.element_ty == cache.ptr.dtype.element_ty:
        scale = None
    elif ptr is None:
        scale = tl.full([head.shape[0], 1], 1.0, tl.float32)
    else:
        scale = tl.load(ptr + b.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h)[:, None]
    return scale


@triton.jit
def _move(source, target, real, scale, DIM: tl.constexpr):
    """Heads of DIM elements from pointers ``source`` (rows,) to ``target``: bit by bit, or as codes where there is a ``scale``."""
    d = tl.arange(0, triton.next_power_of_2(DIM))
    mask = real[:, None] & (d < DIM)[None, :]
    x = tl.load(source[:, None] + d[None, :], mask=mask)
    tl.store(target[:, None] + d[None, :], stored(x, scale, target.dtype.element_ty), mask=mask)


def append_spec(kind: Kind) -> Spec:
    """The kernel for calls of a kind."""
    i32, i64, starts = Arg("i32"), Arg("i64"), Arg("*i32")
    stride = Arg("i64", max(1, kind.alignment // kind.dtype.itemsize))
    pointer = Arg("*" + _name_of(kind.dtype), kind.alignment)
    rows = RowsView(pointer, stride, stride, stride)
    stride = Arg("i64", max(1, kind.alignment // kind.dtype_cache.itemsize))
    keys = KeysView(Arg("*" + _name_of(kind.dtype_cache), kind.alignment), stride, stride, stride)
    scales = [(Arg("*fp32"), i64, i64) if given else (None, None, None) for given in kind.scales]
    queries = rows if kind.turns_q else RowsView(None, None, None, None)
    tables = TablesView(None, None, None, None, None)
    if kind.dtype_table is not None:
        table = Arg("*" + _name_of(kind.dtype_table), 16 if kind.aligned_tables else 1)
        tables = TablesView(table, table, i32, Arg("*i32") if kind.own_positions else None, None)
    return Spec(
        append_kernel,
        args={
            "q": queries, "turned_q": queries, "k": rows, "v": rows, "k_cache": keys, "v_cache": keys,
            "kv_scales": KvScalesView(*scales[0], *scales[1]), "tables": tables,
            "pages": PagesView(starts, i64, i32) if kind.page_size else PagesView(None, None, None),
            "cache": CacheView(starts, i32, starts),
            "queries": SequencesView(starts if kind.packed_q else None, i32 if kind.turns_q else None),
            "news": SequencesView(starts if kind.packed_new else None, i32),
            "num_heads_q": i32, "num_heads_kv": i32, "query_blocks": i32, "key_blocks": i32,
        },
        constants={
            "BLOCK_M": _block_m(kind), "HEAD_DIM": kind.head_dim, "HEAD_DIM_V": kind.head_dim_v, "PAGE_SIZE": kind.page_size,
            "PAIRS": kind.pairs, "PAIRS_HELD": held(kind.pairs), "REST_HELD": held(kind.head_dim - 2 * kind.pairs),
            "INTERLEAVED": kind.interleaved, "QUERIES_ADVANCE": kind.queries_advance, "PDL": kind.dependent,
        },
        options={"num_warps": _WARPS, "num_stages": 1, **({"launch_pdl": True} if kind.dependent else {})},
    )  # fmt: skip


def runner_for(call: AppendCall) -> Callable[[AppendCall], None]:
    """What runs calls like this one on their device's current stream."""
    q, k, v, k_cache, turned_q = call.q, call.k, call.v, call.k_cache, call.turned_q
    alignment = alignment_of(k, k_cache, call.v_cache, v)
    dtype_table, aligned, pairs = None, True, 0
    if call.cos is not None and call.sin is not None:
        dtype_table, pairs = call.cos.dtype, call.cos.shape[1]
        aligned = (call.cos.data_ptr() | call.sin.data_ptr()) % 16 == 0
    turns = q is not None and turned_q is not None
    if q is not None and turned_q is not None:
        alignment = min(alignment, alignment_of(q, k, v, turned_q))
    kind = Kind(
        k.dtype, k_cache.dtype, (call.k_scale is not None, call.v_scale is not None), alignment,
        call.cu_seqlens_k_new is not None, turns and call.cu_seqlens_q is not None,
        0 if call.page_table is None else k_cache.shape[1], k.shape[-1], v.shape[-1], dtype_table, aligned,
        dtype_table is not None and call.positions is not None, pairs, call.interleaved, turns, turns and call.queries_advance,
        _launches_dependents(k.device),
    )  # fmt: skip
    return _runner(kind, k.device)


@functools.lru_cache(maxsize=64)
def _launches_dependents(device: torch.device) -> bool:
    return Device.of(device).dependent_launch


@functools.lru_cache(maxsize=256)
def _runner(kind: Kind, device: torch.device) -> Callable[[AppendCall], None]:
    launch: Launch = launcher(append_spec(kind), device)
    pointer = pointer_of(append_kernel)
    block_m = _block_m(kind)

    def run(stream: int, call: AppendCall) -> None:
        q, turned_q, k, k_cache, table, cos, sin = call.q, call.turned_q, call.k, call.k_cache, call.page_table, call.cos, call.sin
        batch, heads_kv = call.seqlens.shape[0], k.shape[-2]
        capacity = k_cache.shape[1]
        pages: tuple[Any, ...] = (None, None, None)
        if table is not None:
            capacity, pages = capacity * table.shape[1], (pointer(table), table.stride(0), k_cache.shape[0])
        news, key_blocks = _sequences(k, call.cu_seqlens_k_new, batch, block_m, pointer)
        queries, query_blocks, heads_q = (None, None), 0, 0
        q_view: tuple[Any, ...] = (None, None, None, None)
        turned_view = q_view
        if q is not None and turned_q is not None:
            queries, query_blocks = _sequences(q, call.cu_seqlens_q, batch, block_m, pointer)
            q_view, turned_view, heads_q = rows_view(q, pointer), rows_view(turned_q, pointer), q.shape[-2]
        tables: tuple[Any, ...] = (None, None, None, None, None)
        if cos is not None and sin is not None:
            tables = (pointer(cos), pointer(sin), cos.shape[0], None if call.positions is None else pointer(call.positions), None)
        launch.run(
            batch * (2 * key_blocks + query_blocks), 1, stream, q_view, turned_view, rows_view(k, pointer), rows_view(call.v, pointer),
            rows_view(k_cache, pointer), rows_view(call.v_cache, pointer), kv_scales_view(call.k_scale, call.v_scale, pointer),
            tables, pages,
            (pointer(call.seqlens), capacity, pointer(call.new_seqlens)), queries, news, heads_q, heads_kv, query_blocks, key_blocks,
            *launch.constants,
        )  # fmt: skip

    return on_device(run, device)


def _sequences(
    x: torch.Tensor, cu_seqlens: torch.Tensor | None, batch: int, block_m: int, pointer: Callable[[torch.Tensor], Any]
) -> tuple[tuple[Any, Any], int]:
    """Where the tokens of x are, and how many programs of each sequence move their rows."""
    heads = x.shape[-2]
    if cu_seqlens is None:
        return (None, x.shape[1]), max(1, -(-x.shape[1] * heads // block_m))
    return (pointer(cu_seqlens), x.shape[0]), max(1, -(-x.shape[0] * heads * _TIMES_AVERAGE // (max(1, batch) * block_m)))


def _block_m(kind: Kind) -> int:
    return max(1, _ELEMENTS // held(max(kind.head_dim, kind.head_dim_v)))


def _name_of(dtype: torch.dtype) -> str:
    return TRITON_DTYPES[str(dtype).removeprefix("torch.")]
