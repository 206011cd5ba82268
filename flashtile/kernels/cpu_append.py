"""New keys and values written into a cache on a CPU, in torch's own operations; the definition that the GPU's kernel is tested against."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from flashtile.kernels.call import AppendCall
from flashtile.kernels.cpu_rotary import rotate


class _Tokens(NamedTuple):
    """Tokens that belong to a sequence, (tokens,) each: the sequence, the place there, the row of the flat tensor."""

    sequence: torch.Tensor
    place: torch.Tensor
    row: torch.Tensor


def runner_for(call: AppendCall) -> Callable[[AppendCall], None]:
    """What runs calls like this one."""
    return run


def run(call: AppendCall) -> None:
    """Writes the new keys and values, the new lengths, and q turned."""
    capacity = call.k_cache.shape[1] * (1 if call.page_table is None else call.page_table.shape[1])
    seqlens = call.seqlens.long().clamp(0, capacity)
    positions = (call.seqlens if call.positions is None else call.positions).long()
    tokens, counts = _tokens_of(call.k, call.cu_seqlens_k_new)
    call.new_seqlens.copy_((seqlens + counts).clamp(max=capacity))
    keys, values = _flat(call.k)[tokens.row], _flat(call.v)[tokens.row]
    if call.cos is not None and call.sin is not None:
        keys = keys if call.k_cache.dtype == keys.dtype else keys.float()  # what becomes a code is not rounded twice
        keys = _turned(keys, call.cos, call.sin, positions[tokens.sequence] + tokens.place, call.interleaved)
        if call.q is not None and call.turned_q is not None:
            queries, _ = _tokens_of(call.q, call.cu_seqlens_q)
            at = positions[queries.sequence] + (queries.place if call.queries_advance else 0)
            _flat(call.turned_q)[queries.row] = _turned(_flat(call.q)[queries.row], call.cos, call.sin, at, call.interleaved)
    block, slot, inside = _places(call, tokens.sequence, seqlens[tokens.sequence] + tokens.place, capacity)
    for new, cache, scale in ((keys, call.k_cache, call.k_scale), (values, call.v_cache, call.v_scale)):
        if new.dtype != cache.dtype:
            new = _codes_of(new, scale, tokens.sequence, len(counts), cache.dtype)
        bits = torch.uint8 if cache.itemsize == 1 else cache.dtype  # torch puts no float8
        cache.view(bits)[block[inside], slot[inside]] = new.view(bits)[inside]


def _flat(x: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, dim): a view of what is contiguous."""
    return x.flatten(0, 1) if x.ndim == 4 else x


def _tokens_of(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple[_Tokens, torch.Tensor]:
    """The tokens of x, and how many each sequence has (b,)."""
    if cu_seqlens is None:
        batch, each = x.shape[:2]
        first, counts = torch.arange(batch) * each, torch.full((batch,), each)
    else:
        starts = cu_seqlens.long().clamp(0, x.shape[0])
        first, counts = starts[:-1], (starts[1:] - starts[:-1]).clamp(min=0)
    sequence = torch.arange(len(counts)).repeat_interleave(counts)
    place = torch.arange(len(sequence)) - (counts.cumsum(0) - counts)[sequence]
    return _Tokens(sequence, place, first[sequence] + place), counts


def _codes_of(x: torch.Tensor, scale: torch.Tensor | None, sequence: torch.Tensor, batch: int, dtype: torch.dtype) -> torch.Tensor:
    """Tokens (tokens, heads, dim) over their scale as a quantised cache holds them: the nearest, beyond its range its end."""
    x = x.float()
    if scale is not None:
        x = x / scale.expand(batch, x.shape[1])[sequence][..., None]
    return x.round().clamp(-128, 127).to(dtype) if dtype == torch.int8 else x.clamp(-448.0, 448.0).to(dtype)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, at: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Tokens (tokens, heads, dim) at positions ``at`` (tokens,), each a sequence to `rotate`."""
    turned = torch.empty_like(x, memory_format=torch.contiguous_format)
    rotate(x[:, None], turned[:, None], cos, sin, at, 0, None, 1, interleaved, False)
    return turned


def _places(call: AppendCall, sequence: torch.Tensor, key: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens,) each key's sequence or page in the cache, its place there, and whether there is such a place."""
    inside = key < capacity
    if call.page_table is None:
        return sequence, key, inside
    page_size = call.k_cache.shape[1]
    page = call.page_table.long()[sequence, (key // page_size).clamp(max=max(0, call.page_table.shape[1] - 1))] if capacity else key
    return page, key % max(1, page_size), inside & (page >= 0) & (page < call.k_cache.shape[0])
