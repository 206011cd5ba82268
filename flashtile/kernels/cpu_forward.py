"""The CPU engine's forward: prefill by torch's own CPU kernels and matrix products, in memory linear in the lengths.

Full and causal attention goes to torch's flash kernel with all rows at once: it knows the triangle that begins at the first query
and key, so that keys left of it are a part of their own. Everything else (windows, ALiBi, softcap, dropout, missing pages, few rows of
many heads) takes the way of decode, some packed rows at a time; ``block_m`` bounds the query positions of one pass there.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch
from torch.nn.functional import pad

from flashtile.band import Band
from flashtile.kernels.call import ForwardCall, ForwardRunner
from flashtile.kernels.cpu_keys import KeyReader
from flashtile.kernels.cpu_mask import triangle_of
from flashtile.kernels.cpu_run import Run, clear, join_sinks, run_packed, runs_of, tensors_of, tokens_of
from flashtile.kernels.cpu_scores import Partials, computes_natively, flash, needs_products
from flashtile.planner.plans import ForwardPlan
from flashtile.problem import Problem

_ROWS_AT_ONCE = 256  # packed rows whose masks, or scores, are in memory together
_RESULT_BYTES = 1 << 20  # of a thread: a result is written once more, to ``out``; 4 % faster than 4 MB at once, on two threads
_WORTH_UNPACKED = 64  # query positions from which reading the keys once a query head beats packing the heads of a group


def bind(problem: Problem, plan: ForwardPlan, device: torch.device) -> ForwardRunner:
    """A runner for calls of ``problem`` on the CPU; every choice that does not hang on lengths is made here."""
    band, group = problem.band, problem.group
    positions = max(1, min(plan.block_m, _ROWS_AT_ONCE // group))
    flash_knows = not (problem.softcap or problem.alibi or problem.dropout or band.left is not None)
    in_one_piece = flash_knows and plan.block_m >= problem.seqlen_q
    products = problem.dropout or needs_products(problem.softcap, problem.head_dim, problem.head_dim_v)
    always_unpacked = group == 1 or products
    # Decode's way takes products in float32, and a missing page sends a call that way.
    by_products = products and not (in_one_piece and not problem.page_size)
    through_float32 = not computes_natively(problem, problem.rows) or (by_products and problem.dtype_q != "float32")

    def run(call: ForwardCall) -> None:
        if call.cu_seqlens_q is not None:
            clear(call)
        if call.q.numel() == 0:
            return
        reader = KeyReader(call.k, call.v, call.page_table, through_float32, one_by_one=problem.dropout)
        queries, keys = tokens_of(call, reader)
        for part in runs_of(queries, keys, reader):
            unpacked = always_unpacked or part.seqlen_q >= _WORTH_UNPACKED
            if in_one_piece and unpacked and reader.key_mask is None:
                _run_whole(call, part, reader, band)
            else:
                run_packed(call, part, reader, band, positions)

    return run


def _run_whole(call: ForwardCall, run: Run, reader: KeyReader, band: Band) -> None:
    """A run with all of its rows at once, some heads after others; ``band`` has no left side."""
    q, out, lse = tensors_of(call, run)
    q, out = q.transpose(1, 2), out.transpose(1, 2)
    sinks = None if call.sinks is None else call.sinks[:, None]
    shift, blind = triangle_of(band, run.seqlen_q, run.seqlen_k)
    if blind:
        out[:, :, :blind] = 0.0
        if lse is not None:
            lse[:, :, :blind] = float("-inf") if sinks is None else sinks
    if blind == run.seqlen_q:
        return
    k, v = reader.read(0, run.seqlen_k)
    row_bytes = max(k.shape[-1], v.shape[-1]) * k.element_size()
    for heads_kv, heads in _heads_at_once(q, reader.num_heads, row_bytes):
        rows = q[:, heads, blind:].to(k.dtype)
        part_out, part_lse = _attend_whole(rows, k[:, heads_kv], v[:, heads_kv], max(0, shift), call.scale)
        part_out = part_out[..., : out.shape[-1]]
        if sinks is not None:
            part_out, part_lse = join_sinks(part_out, part_lse, sinks[heads])
        out[:, heads, blind:].copy_(part_out)
        if lse is not None:
            lse[:, heads, blind:].copy_(part_lse)


def _heads_at_once(q: torch.Tensor, heads_kv: int, row_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Slices of key heads and their query heads, so that a result is copied to ``out`` while it lies in the caches.

    q (b, hq, rows, d); ``row_bytes`` of a row's result. Torch's kernel gives each thread neighbouring heads: a causal call is only
    balanced if all threads have as many.
    """
    group, threads = q.shape[1] // heads_kv, torch.get_num_threads()
    step = max(1, _RESULT_BYTES * threads // (q.shape[0] * group * q.shape[2] * row_bytes))
    step += -step % (threads // gcd(threads, group))
    if step > heads_kv or heads_kv % step:
        step = heads_kv
    for first in range(0, heads_kv, step):
        yield slice(first, first + step), slice(first * group, (first + step) * group)


def _attend_whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shift: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows q (b, hq, rows, d), of which row i sees keys 0 to i + shift of k (b, hk, keys, d) and v (b, hk, keys, dv).

    out (b, hq, rows, d or dv, the larger) and lse (b, hq, rows): head dims are padded with zeros to the larger one, which changes no
    score and adds zeros to the result.
    """
    if q.shape[-1] != v.shape[-1]:
        dim = max(q.shape[-1], v.shape[-1])
        q, k, v = (pad(tensor, (0, dim - tensor.shape[-1])) for tensor in (q, k, v))
    seqlen_k = k.shape[2]
    if shift >= seqlen_k - 1:
        return flash(q, k, v, scale=scale)
    if scale <= 0.0:  # the kernel scales scores after it hides some of them by -inf
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    if shift == 0:
        return flash(q, k, v, is_causal=True, scale=scale)
    partials = Partials()
    for keys, is_causal in ((slice(0, shift), False), (slice(shift, seqlen_k), True)):
        out, lse = flash(q, k[:, :, keys], v[:, :, keys], is_causal=is_causal, scale=scale)
        partials.add(out.unsqueeze(0), lse.unsqueeze(0))
    return partials.merged((q.shape[0], q.shape[1], q.shape[2], q.shape[3]))
