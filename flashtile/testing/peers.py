"""Other attention libraries on a uniform decode problem, where they are installed.

Each peer is called as its own documentation says, on the same tensors; what it cannot express it refuses with a reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

_SPREAD = 20.0  # what values are multiplied by before they are quantised


@dataclass(frozen=True)
class DecodeInputs:
    """One query a sequence: q (b, 1, hq, d), k and v (b, seqlen_k, hk, d), seqlens_k (b,) int32, all equal to seqlen_k."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    seqlens_k: torch.Tensor
    kv_scale: torch.Tensor | None = None  # (1,), of quantised keys and values

    @classmethod
    def random(
        cls, batch: int, seqlen_k: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device, seed: int,
        dtype_kv: torch.dtype | None = None,
    ) -> DecodeInputs:  # fmt: skip
        generator = torch.Generator(device=device).manual_seed(seed)
        shapes = ((batch, 1, heads[0], head_dim), (batch, seqlen_k, heads[1], head_dim), (batch, seqlen_k, heads[1], head_dim))
        q, k, v = (torch.randn(shape, dtype=dtype, device=device, generator=generator) for shape in shapes)
        lengths = torch.full((batch,), seqlen_k, dtype=torch.int32, device=device)
        if dtype_kv is None:
            return cls(q, k, v, lengths)
        k, v = ((_SPREAD * keys).round().clamp(-127, 127).to(dtype_kv) for keys in (k, v))
        return cls(q, k, v, lengths, torch.full((1,), 1 / _SPREAD, device=device))

    @property
    def args(self) -> dict[str, Any]:
        """Keyword arguments of ``flashtile.decode``."""
        args = {"q": self.q, "k_cache": self.k, "v_cache": self.v, "seqlens_k": self.seqlens_k}
        return args | {"k_scale": self.kv_scale, "v_scale": self.kv_scale}

    @property
    def num_bytes(self) -> int:
        return self.k.nbytes + self.v.nbytes + 2 * self.q.nbytes


Run = Callable[[DecodeInputs], torch.Tensor]
"""Runs one input set and returns out (b, 1, hq, d)."""


Inputs = TypeVar("Inputs")


@dataclass(frozen=True)
class Peer(Generic[Inputs]):
    """``prepare`` gets one input set, plans what the library wants planned, and returns what is timed on any set like it."""

    name: str
    reason_against: Callable[[torch.device, torch.dtype], str | None]
    prepare: Callable[[Inputs], Callable[[Inputs], Any]]


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """torch SDPA of tensors as flashtile has them, (b, seqlen, heads, dim)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def by_backend(backend: SDPBackend, call: Callable[[Inputs], torch.Tensor]) -> Callable[[Inputs], torch.Tensor]:
    """``call``, in which torch SDPA has that backend alone."""

    def run(x: Inputs) -> torch.Tensor:
        with sdpa_kernel([backend]):
            return call(x)

    return run


def sdpa_peers(attend: Callable[[Inputs], torch.Tensor]) -> tuple[Peer[Inputs], ...]:
    """``attend`` by SDPA as it comes on a CPU, and by its fast backends on a GPU."""
    cudnn, flash = (by_backend(backend, attend) for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION))
    return (
        Peer("SDPA", on_cpu, lambda sample: attend),
        Peer("SDPA cuDNN", on_gpu(), lambda sample: cudnn),
        Peer("SDPA flash", on_gpu(), lambda sample: flash),
    )


def _flash_attn_2(sample: DecodeInputs) -> Run:
    from flash_attn import flash_attn_with_kvcache

    return lambda x: flash_attn_with_kvcache(x.q, x.k, x.v, cache_seqlens=x.seqlens_k, causal=True)


def _flash_attn_3(sample: DecodeInputs) -> Run:
    flash_attn_with_kvcache = import_module("flash_attn_interface").flash_attn_with_kvcache

    return lambda x: flash_attn_with_kvcache(x.q, x.k, x.v, cache_seqlens=x.seqlens_k, causal=True)


def _flashinfer(sample: DecodeInputs) -> Run:
    """Its paged decode, pages of 16 keys where the length allows: the contiguous cache seen as pages in order."""
    import flashinfer

    batch, seqlen_k, heads_kv, head_dim = sample.k.shape
    heads_q, device = sample.q.shape[2], sample.q.device
    page_size = next(size for size in (16, 8, 4, 2, 1) if seqlen_k % size == 0)
    pages = seqlen_k // page_size
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device=device), "NHD", use_tensor_cores=heads_q > heads_kv
    )
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32, device=device) * pages,
        torch.arange(batch * pages, dtype=torch.int32, device=device),
        torch.full((batch,), page_size, dtype=torch.int32, device=device),
        heads_q, heads_kv, head_dim, page_size, q_data_type=sample.q.dtype, kv_data_type=sample.k.dtype,
    )  # fmt: skip

    def run(x: DecodeInputs) -> torch.Tensor:
        kv = tuple(t.view(batch * pages, page_size, heads_kv, head_dim) for t in (x.k, x.v))
        out: torch.Tensor = wrapper.run(x.q[:, 0], kv)
        return out[:, None]

    return run


def on_gpu(*modules: str) -> Callable[[torch.device, torch.dtype], str | None]:
    """Why a library of 16-bit GPU kernels cannot run: its modules are missing, or the device or the dtype is another."""

    def reason_against(device: torch.device, dtype: torch.dtype) -> str | None:
        missing = [name for name in modules if find_spec(name) is None]
        if missing:
            return f"{', '.join(missing)} is not installed"
        if device.type != "cuda":
            return "runs on a GPU only"
        return "takes 16-bit inputs only" if dtype == torch.float32 else None

    return reason_against


def on_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why SDPA as it comes is not timed: on a GPU its backends are."""
    return None if device.type == "cpu" else "its backends are timed one by one on a GPU"


PEERS: tuple[Peer[DecodeInputs], ...] = (
    *sdpa_peers(lambda x: sdpa(x.q, x.k, x.v)),
    Peer("flash-attn 2", on_gpu("flash_attn"), _flash_attn_2),
    Peer("flash-attn 3", on_gpu("flash_attn_interface"), _flash_attn_3),
    Peer("FlashInfer", on_gpu("flashinfer"), _flashinfer),
)
