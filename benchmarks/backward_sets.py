"""Input sets of one backward problem: forward's, with what the forward call returned and the gradient that flows into it."""

from __future__ import annotations

from functools import cached_property

import torch

from benchmarks.backward_grids import BackwardShape
from benchmarks.forward_sets import InputSets, problem_of
from flashtile.kernels.call import BackwardCall
from flashtile.problem import Problem
from flashtile.testing.backward_peers import Grads


class BackwardSets(InputSets):
    """Forward's sets; besides, dout[i] (q's shape with dv features), and what ``results`` has.

    out and lse are flashtile's, and every contestant that takes them from outside gets the same.
    """

    shape: BackwardShape

    def __init__(self, shape: BackwardShape, device: torch.device, count: int = 1, seed: int = 0, real: bool = True) -> None:
        super().__init__(shape, device, count, seed, real)
        self.real = real
        self.dout = self._draw((count, *self.q[0].shape[:-1], shape.head_dim_v)).unbind(0)

    @cached_property
    def results(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each set out (like dout) and lse float32 (b, hq, seqlen_q), or (hq, total_q) where packed; empty where sets are not real."""
        if self.real:
            forward = self.contestant()
            return [forward(i) for i in range(self.count)]
        rows = self.q[0].shape[:-1].numel() // self.shape.num_heads_q
        shape = (self.shape.num_heads_q, rows) if self.shape.packed else (self.shape.batch, self.shape.num_heads_q, self.max_seqlen_q)
        return [(torch.empty_like(dout), torch.empty(shape, device=self.device, dtype=torch.float32)) for dout in self.dout]

    def call(self, i: int, grads: Grads) -> BackwardCall:
        """What a kernel's runner gets for set ``i``, to write ``grads``."""
        packed, (dq, dk, dv), (out, lse) = self.shape.packed, grads, self.results[i]
        return BackwardCall(
            q=self.q[i], k=self.k[i], v=self.v[i], out=out, lse=lse, dout=self.dout[i], dlse=None, dq=dq, dk=dk, dv=dv, dsinks=None,
            cu_seqlens_q=self.cu_seqlens_q if packed else None, cu_seqlens_k=self.cu_seqlens_k if packed else None, seqused_k=None,
            max_seqlen_q=self.max_seqlen_q, max_seqlen_k=self.max_seqlen_k, sinks=None, alibi_slopes=None,
            scale=self.scale, softcap=0.0,
        )  # fmt: skip

    def leaves(self, i: int) -> Grads:
        """q, k and v of set ``i`` as a model's parameters are: gradients are wanted."""
        q, k, v = (tensor.detach().requires_grad_() for tensor in (self.q[i], self.k[i], self.v[i]))
        return q, k, v


def backward_problem_of(shape: BackwardShape) -> Problem:
    """What the planner sees of a problem; no memory is taken."""
    return problem_of(shape).with_(operation="backward", deterministic=shape.deterministic)
