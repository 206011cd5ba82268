"""The CPU engine: decode by torch's own CPU kernels and matrix products, in memory linear in the keys.

A run of neighbouring sequences with equal lengths is one batch. Its rows are packed, (query position, head of the
group), so that every key is read once for all heads it serves; ``block_m`` bounds the rows of one pass (a position's
heads are never parted). The keys of a pass are cut where the mask needs to be applied, and into blocks where they have
to be gathered from pages or converted to float32; the blocks' partial results meet in ``Partials``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from flashtile.band import Band
from flashtile.kernels.call import DecodeCall, DecodeRunner
from flashtile.kernels.cpu_keys import KeyReader
from flashtile.kernels.cpu_mask import Mask, segments_of
from flashtile.kernels.cpu_scores import Partials, attend
from flashtile.kernels.cpu_whole import bind_whole
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem


class Run(NamedTuple):
    """Sequences ``first`` to ``stop`` of one call, all of the same lengths; ``row`` is the first one's row in packed q."""

    first: int
    stop: int
    row: int
    seqlen_q: int
    seqlen_k: int


def bind(problem: Problem, plan: DecodePlan, device: torch.device) -> DecodeRunner:
    """A runner for calls of ``problem`` on the CPU; every choice that does not hang on lengths is made here."""
    band, group = problem.band, problem.group
    positions = max(1, plan.block_m // group)
    through_float32 = _needs_float32(problem, min(positions, max(1, problem.seqlen_q)) * group)
    max_block = plan.keys_per_split if plan.keys_per_split < problem.seqlen_k else 0
    one_piece = _is_plain(problem) and not through_float32 and positions >= problem.seqlen_q and max_block == 0
    run_whole = bind_whole(problem) if one_piece else None

    def run(call: DecodeCall) -> None:
        if run_whole is not None and run_whole(call):
            return
        if call.cu_seqlens_q is not None:
            call.out.zero_()
            if call.lse is not None:
                call.lse.fill_(float("-inf"))
        if call.q.shape[0] == 0 or call.q.numel() == 0:
            return
        reader = KeyReader(call, through_float32, max_block)
        for part in _runs(call, reader):
            _run_part(call, part, reader, band, positions)

    return run


def _needs_float32(problem: Problem, rows: int) -> bool:
    """Whether blocks of keys are converted to float32 before the matrix products.

    Natively, torch's flash kernel is fast for bfloat16 with two or more rows; one row and float16 take a path several
    times slower than converting. Scores that the kernel does not know (softcap, a value dim of its own) are computed
    by float32 products, and a float32 result must not be rounded to 16 bits on its way.
    """
    if problem.dtype_q == "float32":
        return False
    native = problem.dtype_q == "bfloat16" and rows >= 2 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return not native or problem.softcap or problem.head_dim != problem.head_dim_v or problem.dtype_out == "float32"


def _is_plain(problem: Problem) -> bool:
    """Whether the problem is what torch's flash kernel computes by itself, but for packed rows, lengths and the band."""
    extras = problem.softcap or problem.alibi or problem.sinks or problem.ragged_q or problem.page_size
    return not extras and problem.total_q > 0 and problem.head_dim == problem.head_dim_v


def _runs(call: DecodeCall, reader: KeyReader) -> Iterator[Run]:
    """Neighbouring sequences of equal lengths, as many at once as the reader can serve in one block."""
    lengths = [min(max(n, 0), reader.capacity) for n in call.seqlens_k.tolist()]
    if call.cu_seqlens_q is None:
        starts = [i * call.q.shape[1] for i in range(len(lengths) + 1)]
    else:
        total = call.q.shape[0]
        starts = [min(max(start, 0), total) for start in call.cu_seqlens_q.tolist()]
    one_by_one = call.softcap != 0.0 or call.q.shape[-1] != call.v_cache.shape[-1]
    first = 0
    while first < len(lengths):
        seqlen_q, seqlen_k = starts[first + 1] - starts[first], lengths[first]
        limit = min(len(lengths), first + (1 if one_by_one else reader.sequences_at_once(seqlen_k)))
        stop = first + 1
        while stop < limit and lengths[stop] == seqlen_k and starts[stop + 1] - starts[stop] == seqlen_q:
            stop += 1
        if seqlen_q > 0:
            yield Run(first, stop, starts[first], seqlen_q, seqlen_k)
        first = stop


def _run_part(call: DecodeCall, run: Run, reader: KeyReader, band: Band, positions: int) -> None:
    """All rows of a run, a chunk of query positions at a time."""
    batch, heads_kv = run.stop - run.first, call.k_cache.shape[2]
    q, out, lse = _tensors_of(call, run)
    # Split the head dimension: (batch, seqlen_q, hk, group, d); lse (batch, hk, group, seqlen_q)
    q = q.view(batch, run.seqlen_q, heads_kv, -1, q.shape[-1])
    out = out.view(batch, run.seqlen_q, heads_kv, -1, out.shape[-1])
    lse = None if lse is None else lse.view(batch, heads_kv, -1, run.seqlen_q)
    reader.open(run.first, run.stop, run.seqlen_k)
    for start in range(0, run.seqlen_q, positions):
        here = slice(start, min(start + positions, run.seqlen_q))
        part_out, part_lse = _attend_rows(call, run, reader, band, q[:, here], here)
        group = q.shape[3]
        out[:, here].copy_(part_out.view(batch, heads_kv, -1, group, out.shape[-1]).transpose(1, 2))
        if lse is not None:
            lse[..., here].copy_(part_lse.view(batch, heads_kv, -1, group).transpose(2, 3))


def _attend_rows(
    call: DecodeCall, run: Run, reader: KeyReader, band: Band, q: torch.Tensor, here: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query positions ``here`` of a run against all keys they see: out (batch, hk, rows, dv) and lse (batch, hk, rows).

    q (batch, positions, hk, group, d); rows are (position, head of the group).
    """
    batch, num_positions, heads_kv, group, head_dim = q.shape
    rows = q.transpose(1, 2).reshape(batch, heads_kv, num_positions * group, head_dim)
    rows = rows.float() if reader.through_float32 else rows
    offset = run.seqlen_k - run.seqlen_q
    slopes = call.alibi_slopes
    slopes = slopes[run.first : run.stop] if slopes is not None and slopes.ndim == 2 else slopes
    mask = Mask(band, offset, here.start, num_positions, group, slopes, reader.key_mask)
    partials = Partials()
    for segment in segments_of(band, offset, here, run.seqlen_k, rows.shape[2], masked=mask.everywhere):
        step = reader.keys_at_once(batch, rows.shape[2] if segment.masked else 0)
        for start in range(segment.start, segment.stop, step):
            stop = min(start + step, segment.stop)
            k, v = reader.read(start, stop)
            attend(rows, k, v, mask.block(start, stop) if segment.masked else None, call.scale, call.softcap, partials)
    shape = (batch, heads_kv, num_positions * group, call.v_cache.shape[-1])
    out, lse = partials.merged(shape)
    return (out, lse) if call.sinks is None else _join_sinks(out, lse, call.sinks, group)


def _tensors_of(call: DecodeCall, run: Run) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """q and out (batch, seqlen_q, hq, d or dv) and lse (batch, hq, seqlen_q) of a run, as views."""
    if call.cu_seqlens_q is None:
        sequences = slice(run.first, run.stop)
        return call.q[sequences], call.out[sequences], None if call.lse is None else call.lse[sequences]
    batch = run.stop - run.first
    rows = slice(run.row, run.row + batch * run.seqlen_q)
    q = call.q[rows].view(batch, run.seqlen_q, *call.q.shape[1:])
    out = call.out[rows].view(batch, run.seqlen_q, *call.out.shape[1:])
    lse = None if call.lse is None else call.lse[:, rows].view(-1, batch, run.seqlen_q).transpose(0, 1)
    return q, out, lse


def _join_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds each head's sink to the softmax's denominator: out (batch, hk, rows, dv), lse (batch, hk, rows), sinks (hq,)."""
    sink = sinks.view(-1, group).repeat(1, lse.shape[-1] // group)
    joined = torch.logaddexp(lse, sink)
    share = torch.exp(lse - joined).masked_fill_(lse == float("-inf"), 0.0)
    return out * share.unsqueeze(-1), joined
