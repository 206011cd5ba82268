"""Peers: other libraries' decode, each as ``make(sets) -> fn(i) -> out``, or Refused with the reason.

FlashAttention-2 and -3 are the shared objects that vLLM ships, loaded from the peers folder; FlashInfer is a package
in its ``site`` folder; cuDNN and one more FlashAttention come with torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import ceil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from benchmarks.grids import CAPACITY_STEP
from benchmarks.refusals import Refused
from benchmarks.sets import InputSets
from benchmarks.timing import Contestant
from flashtile.testing.peers import by_backend

FLASHINFER_WORKSPACE = 256 << 20
FLASH_OBJECTS = {"fa2": "_vllm_fa2_C.abi3.so", "fa3": "_vllm_fa3_C.abi3.so"}
DEFAULT = ("fa2", "fa3", "flashinfer_tc", "flashinfer_cc", "cudnn")
_workspaces: dict[tuple[str, torch.device], torch.Tensor] = {}


def load(folder: Path) -> dict[str, str]:
    """Loads what lies in ``folder``; returns for each library that is missing or does not load why."""
    missing = {name: why for name in FLASH_OBJECTS if (why := load_object(folder, name)) is not None}
    site = folder / "site"
    if site.is_dir() and str(site) not in sys.path:
        sys.path.append(str(site))  # last, so that it shadows nothing that is installed
    try:
        import flashinfer  # noqa: F401
    except Exception as error:  # a package of compiled parts fails in many ways
        missing["flashinfer"] = f"{type(error).__name__}: {error}"[:300]
    return missing


def load_object(folder: Path, name: str) -> str | None:
    """Loads one of the shared objects; why not, where it is missing or does not load."""
    try:
        torch.ops.load_library(str(folder / FLASH_OBJECTS[name]))
    except (OSError, RuntimeError) as error:
        return str(error).splitlines()[0][:300]
    return None


def operator(library: str, name: str) -> Callable[..., list[torch.Tensor]]:
    """An operator of a loaded shared object; Refused where it is not there."""
    try:
        return getattr(getattr(torch.ops, library), name)  # type: ignore[no-any-return]
    except AttributeError as error:
        raise Refused(f"{library} is not loaded") from error


def _refuse_codes(sets: InputSets) -> None:
    if sets.entry.dtype_kv:
        raise Refused("it knows no quantised keys")


def fa2(sets: InputSets) -> Contestant:
    """FlashAttention-2's fwd_kvcache with its own split rule."""
    _refuse_codes(sets)
    op = operator("_vllm_fa2_C", "fwd_kvcache")
    table = sets.page_table
    if table is not None and sets.entry.page_size % 16:
        raise Refused("its pages hold a multiple of 16 keys")

    def call(i: int) -> torch.Tensor:
        return op(sets.q[i], sets.k[i], sets.v[i], None, None, sets.seqlens_k, None, None, None, None, table, None, None,
                  sets.scale, True, -1, -1, 0.0, True, 0)[0]  # fmt: skip

    return call


def fa3(sets: InputSets) -> Contestant:
    """FlashAttention-3 with its own rules for splits and for packing heads into rows."""
    if sets.entry.dtype_kv:
        raise Refused("float8 keys are for a float8 q, which is another problem")
    op = operator("_vllm_fa3_C", "fwd")

    def call(i: int) -> torch.Tensor:
        return op(sets.q[i], sets.k[i], sets.v[i], None, None, None, None, None, None, None, None, sets.seqlens_k, None, None,
                  sets.page_table, None, None, None, None, None, None, None, None, sets.scale, True, -1, -1, 0.0, True, None,
                  0, None, 0, None, 1, 0, None)[0]  # fmt: skip

    return call


def flashinfer_tc(sets: InputSets) -> Contestant:
    """FlashInfer on tensor cores; its plan, which reads the lengths on the host, is made before the timing."""
    return _flashinfer_decode(sets, tensor_cores=True) if sets.entry.seqlen_q == 1 else _flashinfer_prefill(sets)


def flashinfer_cc(sets: InputSets) -> Contestant:
    """FlashInfer on CUDA cores."""
    if sets.entry.seqlen_q > 1:
        raise Refused("more than one query needs tensor cores")
    return _flashinfer_decode(sets, tensor_cores=False)


def cudnn(sets: InputSets) -> Contestant:
    """cuDNN through torch SDPA."""
    return _sdpa(sets, SDPBackend.CUDNN_ATTENTION)


def torch_flash(sets: InputSets) -> Contestant:
    """torch's own FlashAttention-2 through SDPA."""
    return _sdpa(sets, SDPBackend.FLASH_ATTENTION)


def sdpa(sets: InputSets) -> Contestant:
    """torch SDPA with ``enable_gqa``, whichever backend it picks (the peer on a CPU)."""
    return _sdpa(sets, None)


def _sdpa(sets: InputSets, backend: SDPBackend | None) -> Contestant:
    _refuse_codes(sets)
    entry = sets.entry
    if sets.page_table is not None:
        raise Refused("SDPA knows no pages")
    if not entry.is_even:
        raise Refused("SDPA knows no lengths")
    if entry.seqlen_q > 1:
        raise Refused("SDPA's causal mask is aligned to the top left")
    keys = [k[:, : entry.longest].transpose(1, 2) for k in sets.k]
    values = [v[:, : entry.longest].transpose(1, 2) for v in sets.v]
    grouped = entry.num_heads_q != entry.num_heads_kv

    def call(i: int) -> torch.Tensor:
        return F.scaled_dot_product_attention(sets.q[i].transpose(1, 2), keys[i], values[i], enable_gqa=grouped).transpose(1, 2)

    return call if backend is None else by_backend(backend, call)


class _Pages:
    """A problem's cache as FlashInfer wants it: pages, and for each sequence which (host tensors; the plan copies them)."""

    def __init__(self, sets: InputSets) -> None:
        entry = sets.entry
        self.size = entry.page_size or CAPACITY_STEP
        counts = [ceil(n / self.size) for n in entry.lengths]
        if sets.page_table is None:
            room = sets.k[0].shape[1] // self.size
            ids = [list(range(b * room, b * room + count)) for b, count in enumerate(counts)]
            self.caches = [tuple(t.view(-1, self.size, *t.shape[2:]) for t in pair) for pair in zip(sets.k, sets.v)]
        else:
            rows = sets.page_table.tolist()
            ids = [row[:count] for row, count in zip(rows, counts)]
            self.caches = list(zip(sets.k, sets.v))
        as_int32 = lambda values: torch.tensor(values, device=sets.device, dtype=torch.int32)  # noqa: E731
        self.starts = as_int32([sum(counts[:b]) for b in range(len(counts) + 1)])
        self.ids = as_int32([page for row in ids for page in row])
        self.in_last = as_int32([n - (count - 1) * self.size for n, count in zip(entry.lengths, counts)])


def _workspace(kind: str, device: torch.device) -> torch.Tensor:
    if (kind, device) not in _workspaces:
        _workspaces[kind, device] = torch.empty(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=device)
    return _workspaces[kind, device]


def _flashinfer_decode(sets: InputSets, tensor_cores: bool) -> Contestant:
    flashinfer = _flashinfer()
    entry, pages = sets.entry, _Pages(sets)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(f"tc={tensor_cores}", sets.device), "NHD", use_tensor_cores=tensor_cores
    )
    wrapper.plan(pages.starts, pages.ids, pages.in_last, entry.num_heads_q, entry.num_heads_kv, entry.head_dim, pages.size,
                 q_data_type=sets.dtype, kv_data_type=sets.k[0].dtype)  # fmt: skip
    scales = _flashinfer_scales(sets)
    return lambda i: wrapper.run(sets.q[i].flatten(0, 1), pages.caches[i], **scales).view_as(sets.q[i])


def _flashinfer_prefill(sets: InputSets) -> Contestant:
    flashinfer = _flashinfer()
    entry, pages = sets.entry, _Pages(sets)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace("prefill", sets.device), "NHD", backend="fa2")
    starts = torch.arange(entry.batch + 1, device=sets.device, dtype=torch.int32) * entry.seqlen_q
    wrapper.plan(starts, pages.starts, pages.ids, pages.in_last, entry.num_heads_q, entry.num_heads_kv, entry.head_dim, pages.size,
                 causal=True, q_data_type=sets.dtype, kv_data_type=sets.k[0].dtype)  # fmt: skip
    scales = _flashinfer_scales(sets)
    return lambda i: wrapper.run(sets.q[i].flatten(0, 1), pages.caches[i], **scales).view_as(sets.q[i])


def _flashinfer_scales(sets: InputSets) -> dict[str, float]:
    """FlashInfer takes a number for all keys and one for all values, and of quantised caches those in float8."""
    if sets.kv_scale is None:
        return {}
    if sets.entry.dtype_kv != "float8_e4m3fn":
        raise Refused(f"it knows no keys in {sets.entry.dtype_kv}")
    scale = float(sets.kv_scale)
    return {"k_scale": scale, "v_scale": scale}


def _flashinfer():  # type: ignore[no-untyped-def]
    try:
        import flashinfer
    except Exception as error:
        raise Refused(f"flashinfer: {error}") from error
    return flashinfer


PEERS: dict[str, Callable[[InputSets], Contestant]] = {
    "fa2": fa2, "fa3": fa3, "flashinfer_tc": flashinfer_tc, "flashinfer_cc": flashinfer_cc, "cudnn": cudnn,
    "torch_flash": torch_flash, "sdpa": sdpa,
}  # fmt: skip
