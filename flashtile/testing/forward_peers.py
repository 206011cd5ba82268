"""Other attention libraries on a uniform forward problem, where they are installed: each called as its own documentation says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch

from flashtile.testing.peers import Peer, on_gpu, sdpa, sdpa_peers


@dataclass(frozen=True)
class ForwardInputs:
    """As many queries as keys: q (b, seqlen, hq, d), k and v (b, seqlen, hk, d)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    causal: bool

    @classmethod
    def random(
        cls,
        batch: int,
        seqlen: int,
        heads: tuple[int, int],
        head_dim: int,
        causal: bool,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> ForwardInputs:
        generator = torch.Generator(device=device).manual_seed(seed)
        shapes = [(batch, seqlen, number, head_dim) for number in (heads[0], heads[1], heads[1])]
        q, k, v = (torch.randn(shape, dtype=dtype, device=device, generator=generator) for shape in shapes)
        return cls(q, k, v, causal)

    @property
    def num_bytes(self) -> int:
        return 2 * self.q.nbytes + self.k.nbytes + self.v.nbytes

    @property
    def flops(self) -> int:
        """Of both matrix products; where causal, half of all pairs, as FlashAttention counts."""
        batch, seqlen, heads, head_dim = self.q.shape
        return 4 * batch * heads * seqlen * seqlen * head_dim // (2 if self.causal else 1)


Run = Callable[[ForwardInputs], torch.Tensor]
"""Runs one input set and returns out (b, seqlen, hq, d)."""


def _flash_attn(module: str) -> Callable[[ForwardInputs], Run]:
    """``flash_attn_func`` of one of FlashAttention's modules: newer ones return lse as well."""

    def prepare(sample: ForwardInputs) -> Run:
        flash_attn_func = import_module(module).flash_attn_func

        def run(x: ForwardInputs) -> torch.Tensor:
            result = flash_attn_func(x.q, x.k, x.v, causal=x.causal)
            out: torch.Tensor = result[0] if isinstance(result, tuple) else result
            return out

        return run

    return prepare


PEERS: tuple[Peer[ForwardInputs], ...] = (
    *sdpa_peers(lambda x: sdpa(x.q, x.k, x.v, x.causal)),
    Peer("flash-attn 2", on_gpu("flash_attn"), _flash_attn("flash_attn")),
    Peer("flash-attn 3", on_gpu("flash_attn_interface"), _flash_attn("flash_attn_interface")),
    Peer("flash-attn 4", on_gpu("flash_attn", "cutlass"), _flash_attn("flash_attn.cute")),
)
