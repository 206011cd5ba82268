"""The CPU engine's backward: gradients by torch's own CPU kernels and matrix products, in memory linear in the lengths.

Full and causal attention goes to the backward of torch's flash kernel with all rows at once. Everything else (windows, ALiBi,
softcap, dropout, a gradient through lse) is computed from blocks of scores, one sequence at a time (``cpu_gradients.py``); ``block_m``
bounds the query positions of one block there.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from flashtile.band import Band
from flashtile.kernels.call import BackwardCall, BackwardRunner
from flashtile.kernels.cpu_gradients import BLOCK_ROWS, RunTensors, add_sink_gradients, run_blocks, tensors_of
from flashtile.kernels.cpu_keys import KeyReader
from flashtile.kernels.cpu_mask import triangle_of
from flashtile.kernels.cpu_run import Run, runs_of, tokens_of
from flashtile.kernels.cpu_scores import computes_natively
from flashtile.planner.plans import BackwardPlan
from flashtile.problem import Problem

_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def bind(problem: Problem, plan: BackwardPlan, device: torch.device) -> BackwardRunner:
    """A runner for calls of ``problem`` on the CPU; every choice that does not hang on lengths is made here."""
    band = problem.band
    positions = max(1, min(plan.block_m, BLOCK_ROWS // problem.group))
    flash_knows = not (problem.softcap or problem.alibi or problem.dropout or band.left is not None)
    in_one_piece = flash_knows and plan.block_m >= problem.seqlen_q
    native = computes_natively(problem, problem.rows)

    def run(call: BackwardCall) -> None:
        if call.cu_seqlens_q is not None or call.q.numel() == 0:
            for gradient in (call.dq, call.dk, call.dv):
                gradient.zero_()
        if call.dsinks is not None:
            call.dsinks.zero_()
        # Torch's kernel takes no dlse, and hides scores by -inf before it scales them.
        whole = in_one_piece and call.dlse is None and call.scale > 0.0
        through_float32 = problem.dtype_q != "float32" and not (whole and native)
        reader = KeyReader(call.k, call.v, None, through_float32, one_by_one=not whole)
        queries, keys = tokens_of(call, reader)
        for part in runs_of(queries, keys, reader):
            tensors = tensors_of(call, part)
            if call.dsinks is not None and call.sinks is not None:
                add_sink_gradients(call.dsinks, call.sinks, tensors)
            if whole:
                _run_whole(part, tensors, reader, band, call.scale)
            else:
                run_blocks(call, part, tensors, reader, band, positions)

    return run


def _run_whole(run: Run, tensors: RunTensors, reader: KeyReader, band: Band, scale: float) -> None:
    """dq, dk and dv of a run with all of its rows at once; ``band`` has no left side."""
    q, out, dout, dq, dk, dv = (t.transpose(1, 2) for t in (tensors.q, tensors.out, tensors.dout, tensors.dq, tensors.dk, tensors.dv))
    shift, blind = triangle_of(band, run.seqlen_q, run.seqlen_k)
    dq[:, :, :blind] = 0.0
    if blind == run.seqlen_q:
        dk.zero_()
        dv.zero_()
        return
    k, v = reader.read(0, run.seqlen_k)
    dim = max(k.shape[-1], v.shape[-1])
    # Head dims are padded with zeros to the larger one, which changes no product of rows.
    q, out, dout = (_padded(rows[:, :, blind:].to(k.dtype), dim) for rows in (q, out, dout))
    k, v = _padded(k, dim), _padded(v, dim)
    lse = tensors.lse[:, :, blind:]
    if shift >= run.seqlen_k - 1:
        parts = [(slice(0, run.seqlen_k), False)]
    elif shift <= 0:
        parts = [(slice(0, run.seqlen_k), True)]
    else:  # torch's triangle begins at the first query and key: keys left of it are a part of their own
        parts = [(slice(0, shift), False), (slice(shift, run.seqlen_k), True)]
    sum_of_dq: torch.Tensor | None = None
    for keys, is_causal in parts:
        part_dq, part_dk, part_dv = _flash_backward(dout, q, k[:, :, keys], v[:, :, keys], out, lse, 0.0, is_causal, scale=scale)
        sum_of_dq = part_dq if sum_of_dq is None else sum_of_dq.float() + part_dq
        dk[:, :, keys].copy_(part_dk[..., : dk.shape[-1]])
        dv[:, :, keys].copy_(part_dv[..., : dv.shape[-1]])
    if sum_of_dq is not None:
        dq[:, :, blind:].copy_(sum_of_dq[..., : dq.shape[-1]])


def _padded(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    return tensor if tensor.shape[-1] == dim else pad(tensor, (0, dim - tensor.shape[-1]))
