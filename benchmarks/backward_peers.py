"""Peers: other libraries' backward, each as ``make(sets) -> fn(i) -> (dq, dk, dv)``, or Refused with the reason.

cuDNN and FlashAttention-2 are torch's own operators, called directly on what their own forward returned; FlashAttention-4 is a package
in the peers folder, and takes any forward's out and lse. The FlashAttention-3 that vLLM ships is built without its backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import fa4
from benchmarks.backward_grids import BackwardShape
from benchmarks.backward_sets import BackwardSets
from benchmarks.forward_grids import shrunk
from benchmarks.forward_peers import ensure_sdpa_can
from benchmarks.refusals import Refused
from benchmarks.timing import Contestant
from flashtile.testing.backward_peers import cudnn_backward, flash_backward, sdpa_backward

DEFAULT = ("cudnn", "fa4", "torch_flash")


def load(folder: Path, wanted: Iterable[str] = DEFAULT) -> dict[str, str]:
    """Loads those of ``wanted`` that lie in ``folder``; returns for each that is missing or does not load why."""
    why = fa4.load(folder) if "fa4" in wanted else None
    return {} if why is None else {"fa4": why}


def cudnn(sets: BackwardSets) -> Contestant:
    """cuDNN by torch's operators."""
    return _torchs(sets, cudnn_backward)


def torch_flash(sets: BackwardSets) -> Contestant:
    """torch's own FlashAttention-2."""
    return _torchs(sets, flash_backward)


def sdpa(sets: BackwardSets) -> Contestant:
    """torch SDPA through autograd, whichever backend it picks (the peer on a CPU)."""
    return _torchs(sets, sdpa_backward)


def _torchs(sets: BackwardSets, backward: Callable[..., Callable[[], Any]]) -> Contestant:
    ensure_sdpa_can(sets.shape)
    ready = [backward(sets.q[i], sets.k[i], sets.v[i], sets.dout[i], sets.shape.causal) for i in range(sets.count)]
    return lambda i: ready[i]()


def flash_attention_4(sets: BackwardSets) -> Contestant:
    """FlashAttention-4's own choice of everything; packed problems by their starts."""
    try:
        from flash_attn.cute.interface import _flash_attn_bwd
    except Exception as error:
        raise Refused(f"flash_attn.cute: {error}") from error
    options: dict[str, Any] = {"softmax_scale": sets.scale, "causal": sets.shape.causal, "deterministic": sets.shape.deterministic}
    if sets.shape.packed:
        options |= {"cu_seqlens_q": sets.cu_seqlens_q, "cu_seqlens_k": sets.cu_seqlens_k,
                    "max_seqlen_q": sets.max_seqlen_q, "max_seqlen_k": sets.max_seqlen_k}  # fmt: skip
    results = sets.results

    def call(i: int) -> Any:
        out, lse = results[i]
        return _flash_attn_bwd(sets.q[i], sets.k[i], sets.v[i], out, sets.dout[i], lse, **options)

    return fa4.without_gradients(call)


def compile_flash_attention_4(shape: BackwardShape) -> None:
    """In a worker: one call of fake tensors, which compiles and computes nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        small = shrunk(shape, longest=fa4.SMALL, max_heads=64)
        flash_attention_4(BackwardSets(small, torch.device("cuda"), real=False))(0)


PEERS: dict[str, Callable[[BackwardSets], Contestant]] = {
    "cudnn": cudnn, "fa4": flash_attention_4, "torch_flash": torch_flash, "sdpa": sdpa,
}  # fmt: skip
