"""Peers: other libraries' forward, each as ``make(sets) -> fn(i) -> out, or (out, lse, ...)``, or Refused with the reason.

FlashAttention-3 is the shared object that vLLM ships (its varlen function; all sequences are handed to it packed), FlashAttention-4 a
package in the peers folder; cuDNN and FlashAttention-2 come with torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from benchmarks import fa4
from benchmarks.forward_grids import Shape
from benchmarks.forward_sets import InputSets
from benchmarks.peers import load_object, operator
from benchmarks.refusals import Refused
from benchmarks.timing import Contestant
from flashtile.testing.peers import by_backend

DEFAULT = ("cudnn", "fa3", "fa4", "torch_flash")


def load(folder: Path, wanted: Iterable[str] = DEFAULT) -> dict[str, str]:
    """Loads those of ``wanted`` that lie in ``folder``; returns for each that is missing or does not load why."""
    loaders: dict[str, Callable[[], str | None]] = {"fa3": lambda: load_object(folder, "fa3"), "fa4": lambda: fa4.load(folder)}
    found = {name: loaders[name]() for name in wanted if name in loaders}
    return {name: why for name, why in found.items() if why is not None}


def fa3(sets: InputSets) -> Contestant:
    """FlashAttention-3 unsplit, as its own varlen function calls it; its own rule for packing heads into rows."""
    op = operator("_vllm_fa3_C", "fwd")
    shape, table = sets.shape, sets.page_table
    left, right = (-1 if side is None else side for side in shape.window or (None, None))
    flat = lambda several: [t if shape.packed else t.flatten(0, 1) for t in several]  # noqa: E731
    q, k, v = flat(sets.q), flat(sets.k), flat(sets.v)
    cu_seqlens_k, seqused_k = (sets.cu_seqlens_k, None) if table is None else (None, sets.seqused_k)
    numbers = (sets.scale, shape.causal, left, 0 if shape.causal and shape.window is not None else right, 0.0)

    def call(i: int) -> list[torch.Tensor]:
        return op(q[i], k[i], v[i], None, None, None, None, sets.cu_seqlens_q, cu_seqlens_k, None, None, seqused_k,
                  sets.max_seqlen_q, sets.max_seqlen_k, table, None, None, None, None, None, None, None, None, *numbers, True,
                  None, 1, None, 0, None, 1, 0, None)  # fmt: skip

    return call


def cudnn(sets: InputSets) -> Contestant:
    """cuDNN through torch SDPA."""
    return _sdpa(sets, SDPBackend.CUDNN_ATTENTION)


def torch_flash(sets: InputSets) -> Contestant:
    """torch's own FlashAttention-2 through SDPA."""
    return _sdpa(sets, SDPBackend.FLASH_ATTENTION)


def sdpa(sets: InputSets) -> Contestant:
    """torch SDPA, whichever backend it picks (the peer on a CPU)."""
    return _sdpa(sets, None)


def ensure_sdpa_can(shape: Shape) -> None:
    """Raises Refused where torch SDPA cannot say what the problem asks for."""
    if shape.packed:
        raise Refused("SDPA knows neither packed sequences nor pages")
    if shape.window is not None:
        raise Refused("SDPA knows no window without a mask in memory")
    if shape.causal and shape.seqlens_q != shape.seqlens_k:
        raise Refused("SDPA's causal mask is aligned to the top left")


def _sdpa(sets: InputSets, backend: SDPBackend | None) -> Contestant:
    shape = sets.shape
    ensure_sdpa_can(shape)
    options: dict[str, Any] = {"is_causal": shape.causal}
    if shape.num_heads_q != shape.num_heads_kv:
        options["enable_gqa"] = True

    def call(i: int) -> torch.Tensor:
        q, k, v = (t[i].transpose(1, 2) for t in (sets.q, sets.k, sets.v))
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    return call if backend is None else by_backend(backend, call)


PEERS: dict[str, Callable[[InputSets], Contestant]] = {
    "cudnn": cudnn, "fa3": fa3, "fa4": fa4.contestant, "torch_flash": torch_flash, "sdpa": sdpa,
}  # fmt: skip
