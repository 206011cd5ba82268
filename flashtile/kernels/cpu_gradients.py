"""Gradients from blocks of scores, for attention that torch's own backward kernel does not know: float32 matrix products.

A sequence is computed some query positions at a time, their rows packed as (position, head of the group); a block of their scores is
made again from q, k and lse, serves dQ, dK and dV, and is dropped. Blocks follow each other in one order: results never vary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashtile.band import Band
from flashtile.kernels.call import BackwardCall
from flashtile.kernels.cpu_dropout import RowDropout
from flashtile.kernels.cpu_keys import KeyReader
from flashtile.kernels.cpu_mask import Mask, MaskBlock, segments_of
from flashtile.kernels.cpu_run import Run, keys_of, lse_of, queries_of

BLOCK_ROWS = 256  # packed rows of a key head whose scores are in memory together
_BLOCK_BYTES = 1 << 20  # of the scores of some heads: several passes go over them while they lie in the caches


class RunTensors(NamedTuple):
    """A run's part of a call, as views: q, out, dout and dq (batch, seqlen_q, hq, d or dv), lse and dlse (batch, hq, seqlen_q), dk and
    dv (batch, seqlen_k, hk, d or dv)."""

    q: torch.Tensor
    out: torch.Tensor
    dout: torch.Tensor
    lse: torch.Tensor
    dlse: torch.Tensor | None
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def tensors_of(call: BackwardCall, run: Run) -> RunTensors:
    packed = call.cu_seqlens_q is not None
    q, out, dout, dq = (queries_of(tensor, run, packed) for tensor in (call.q, call.out, call.dout, call.dq))
    dk, dv = (keys_of(tensor, run, call.cu_seqlens_k is not None) for tensor in (call.dk, call.dv))
    dlse = None if call.dlse is None else lse_of(call.dlse, run, packed)
    return RunTensors(q, out, dout, lse_of(call.lse, run, packed), dlse, dq, dk, dv)


class _Rows(NamedTuple):
    """Packed rows of each key head, in float32: q (hk, rows, d), dout (hk, rows, dv), lse and delta (hk, rows, 1).

    q is scaled. lse is inf where a row sees nothing, so that its weights are 0. delta is sum(out * dout) - dlse: what each weight's
    gradient has too much.
    """

    q: torch.Tensor
    dout: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor

    def heads(self, here: slice) -> _Rows:
        return _Rows(*(tensor[here] for tensor in self))


def run_blocks(call: BackwardCall, run: Run, tensors: RunTensors, reader: KeyReader, band: Band, positions: int) -> None:
    """dq, dk and dv of a run of one sequence that the reader has opened, ``positions`` query positions at a time."""
    heads_kv, group = reader.num_heads, call.q.shape[-2] // reader.num_heads
    dk, dv = (torch.zeros(heads_kv, run.seqlen_k, tensor.shape[-1]) for tensor in (tensors.dk, tensors.dv))
    offset = run.seqlen_k - run.seqlen_q
    slopes = call.alibi_slopes
    slopes = slopes[run.first] if slopes is not None and slopes.ndim == 2 else slopes
    for first in range(0, run.seqlen_q, positions):
        here = slice(first, min(first + positions, run.seqlen_q))
        mask = Mask(band, offset, first, here.stop - first, group, slopes, None)
        rows = _rows_of(tensors, here, heads_kv, call.scale)
        dropout = None if call.dropout is None else RowDropout(call.dropout, run.first, heads_kv, group, here)
        dq = torch.zeros_like(rows.q)
        for segment in segments_of(band, offset, here, run.seqlen_k, rows.q.shape[1], masked=mask.everywhere):
            step = reader.keys_at_once(1, rows.q.shape[1])
            for start in range(segment.start, segment.stop, step):
                keys = slice(start, min(start + step, segment.stop))
                k, v = reader.read(keys.start, keys.stop)
                block = mask.block(keys.start, keys.stop) if segment.masked else None
                factors = None if dropout is None else dropout.factors(keys.start, keys.stop)
                for heads in _heads_at_once(heads_kv, rows.q.shape[1] * (keys.stop - start)):
                    _add_block(
                        rows.heads(heads), k[0, heads], v[0, heads], _heads_of(block, heads),
                        None if factors is None else factors[heads], call.softcap,
                        dq[heads], dk[heads, keys], dv[heads, keys],
                    )  # fmt: skip
        # (hk, positions, group, d) into (positions, hk, group, d)
        dq = dq.mul_(call.scale).view(heads_kv, -1, group, dq.shape[-1]).transpose(0, 1)
        tensors.dq[0, here].view(-1, heads_kv, group, dq.shape[-1]).copy_(dq)
    tensors.dk[0].copy_(dk.transpose(0, 1))
    tensors.dv[0].copy_(dv.transpose(0, 1))


def _add_block(
    rows: _Rows, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, factors: torch.Tensor | None, softcap: float,
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor,
) -> None:  # fmt: skip
    """Adds what rows and keys k (heads, keys, d), v (heads, keys, dv) give each other; dq (heads, rows, d) still wants the scale.

    ``bias`` and ``factors`` are (heads or 1, rows, keys): added to the scores, and multiplied with their softmax (dropout).
    """
    scores = torch.bmm(rows.q, k.transpose(1, 2))
    slope = None
    if softcap:
        capped = scores.div_(softcap).tanh_()
        scores = capped * softcap
        slope = capped.square_().neg_().add_(1.0)
    if bias is not None:
        scores.add_(bias)
    weights = scores.sub_(rows.lse).exp_()
    dv.baddbmm_((weights if factors is None else weights * factors).transpose(1, 2), rows.dout)
    dweights = torch.bmm(rows.dout, v.transpose(1, 2))
    if factors is not None:
        dweights.mul_(factors)
    dscores = dweights.sub_(rows.delta).mul_(weights)
    if slope is not None:
        dscores.mul_(slope)
    dk.baddbmm_(dscores.transpose(1, 2), rows.q)
    dq.baddbmm_(dscores, k)


def _rows_of(tensors: RunTensors, here: slice, heads_kv: int, scale: float) -> _Rows:
    """Query positions ``here`` of a run of one sequence."""
    q, out, dout = (_packed(tensor[0, here], heads_kv) for tensor in (tensors.q, tensors.out, tensors.dout))
    lse = _packed(tensors.lse[0, :, here].t().unsqueeze(-1), heads_kv)
    delta = (out * dout).sum(dim=-1, keepdim=True)
    if tensors.dlse is not None:
        delta.sub_(_packed(tensors.dlse[0, :, here].t().unsqueeze(-1), heads_kv))
    return _Rows(q * scale, dout, lse.masked_fill(lse == float("-inf"), float("inf")), delta)


def _packed(tensor: torch.Tensor, heads_kv: int) -> torch.Tensor:
    """(positions, hq, d) as rows of each key head, (hk, positions x group, d) in float32."""
    grouped = tensor.view(tensor.shape[0], heads_kv, -1, tensor.shape[-1]).transpose(0, 1)
    return grouped.float().reshape(heads_kv, -1, tensor.shape[-1])


def _heads_at_once(heads_kv: int, scores: int) -> list[slice]:
    """Slices of key heads so that their blocks of ``scores`` each lie in the caches together."""
    step = max(1, _BLOCK_BYTES // (4 * max(1, scores)))
    return [slice(first, min(first + step, heads_kv)) for first in range(0, heads_kv, step)]


def _heads_of(block: MaskBlock | None, heads: slice) -> torch.Tensor | None:
    """The mask's bias of some key heads, (heads or 1, rows, keys)."""
    if block is None:
        return None
    bias = block.bias[0]
    return bias if bias.shape[0] == 1 else bias[heads]


def add_sink_gradients(dsinks: torch.Tensor, sinks: torch.Tensor, tensors: RunTensors) -> None:
    """Adds what a run's rows give each head's sink, (hq,): its share of every row's softmax, times -delta."""
    # (batch, hq, seqlen_q)
    delta = (tensors.out.float() * tensors.dout).sum(dim=-1).transpose(1, 2)
    if tensors.dlse is not None:
        delta = delta - tensors.dlse
    shares = torch.exp(sinks[:, None] - tensors.lse).masked_fill_(tensors.lse == float("-inf"), 0.0)
    dsinks.sub_((shares * delta).sum(dim=(0, 2)))
