"""torch's own backward operators on a uniform problem, each made ready by its own forward call, so that the backward alone is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

import flashtile
from flashtile.kernels.call import BackwardCall
from flashtile.testing.forward_peers import ForwardInputs
from flashtile.testing.peers import Peer, on_cpu, on_gpu, sdpa

Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""dq, dk and dv, laid out like q, k and v."""
Ready = Callable[[], Grads]
"""Computes the gradients of one set of inputs, as often as it is called."""


@dataclass(frozen=True, eq=False)
class BackwardInputs:
    """A forward call's inputs and what it returned, out (b, seqlen, hq, d) and lse (b, hq, seqlen); dout, like out, flows in."""

    forward: ForwardInputs
    out: torch.Tensor
    lse: torch.Tensor
    dout: torch.Tensor

    @classmethod
    def of(cls, forward: ForwardInputs, seed: int) -> BackwardInputs:
        """Runs the forward call, and draws what flows in."""
        out, lse = flashtile.attention_with_lse(forward.q, forward.k, forward.v, causal=forward.causal)
        generator = torch.Generator(device=out.device).manual_seed(seed)
        return cls(forward, out, lse, torch.randn(out.shape, dtype=out.dtype, device=out.device, generator=generator))

    @property
    def num_bytes(self) -> int:
        return self.forward.num_bytes + self.dout.nbytes + self.lse.nbytes

    @property
    def flops(self) -> float:
        """2.5 times the forward's: five matrix products instead of two."""
        return 2.5 * self.forward.flops

    def call(self, grads: Grads) -> BackwardCall:
        """What a kernel's runner gets, to write ``grads``."""
        (dq, dk, dv), x = grads, self.forward
        return BackwardCall(
            q=x.q, k=x.k, v=x.v, out=self.out, lse=self.lse, dout=self.dout, dlse=None, dq=dq, dk=dk, dv=dv, dsinks=None,
            cu_seqlens_q=None, cu_seqlens_k=None, seqused_k=None, max_seqlen_q=x.q.shape[1], max_seqlen_k=x.k.shape[1],
            sinks=None, alibi_slopes=None, scale=x.q.shape[-1] ** -0.5, softcap=0.0,
        )  # fmt: skip


def cudnn_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, causal: bool) -> Ready:
    """cuDNN's, of q, k, v and dout as (b, seqlen, heads, dim)."""
    forward = torch.ops.aten._scaled_dot_product_cudnn_attention
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    qt, kt, vt, dout_t = _turned((q, k, v, dout))
    with torch.no_grad():
        out, lse, starts_q, starts_k, max_q, max_k, seed, offset, _ = forward(qt, kt, vt, None, True, 0.0, causal, False)
    saved = (out, lse, seed, offset, None, starts_q, starts_k, max_q, max_k, 0.0, causal)
    return lambda: _three(backward(dout_t, qt, kt, vt, *saved))


def flash_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, causal: bool) -> Ready:
    """That of torch's FlashAttention-2, of the same."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    qt, kt, vt, dout_t = _turned((q, k, v, dout))
    with torch.no_grad():
        out, lse, starts_q, starts_k, max_q, max_k, seed, offset, _ = forward(qt, kt, vt, 0.0, causal, False)
    saved = (out, lse, starts_q, starts_k, max_q, max_k, 0.0, causal, seed, offset)
    return lambda: _three(backward(dout_t, qt, kt, vt, *saved))


def sdpa_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, causal: bool) -> Ready:
    """Autograd's, of whichever kernel torch SDPA picks, of the same; for a CPU, where no stream has to be that of the forward call."""
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    out = sdpa(leaves[0], leaves[1], leaves[2], causal)

    def run() -> Grads:
        dq, dk, dv = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        return dq, dk, dv

    return run


def _turned(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """(b, heads, seqlen, dim) instead of (b, seqlen, heads, dim), or the other way round; views."""
    return [tensor.transpose(1, 2) for tensor in tensors]


def _three(grads: Iterable[torch.Tensor]) -> Grads:
    dq, dk, dv = _turned(grads)
    return dq, dk, dv


def _prepared(make: Callable[..., Ready]) -> Callable[[BackwardInputs], Callable[[BackwardInputs], Grads]]:
    """A peer that is made ready for each set of inputs at the first call with it."""

    def prepare(sample: BackwardInputs) -> Callable[[BackwardInputs], Grads]:
        ready: dict[BackwardInputs, Ready] = {}

        def run(x: BackwardInputs) -> Grads:
            if x not in ready:
                ready[x] = make(x.forward.q, x.forward.k, x.forward.v, x.dout, x.forward.causal)
            return ready[x]()

        return run

    return prepare


PEERS = (
    Peer("SDPA", on_cpu, _prepared(sdpa_backward)),
    Peer("SDPA cuDNN", on_gpu(), _prepared(cudnn_backward)),
    Peer("SDPA flash", on_gpu(), _prepared(flash_backward)),
)
