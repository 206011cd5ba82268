"""Rotating input sets of one problem: enough of them that a call never finds its keys in the L2 cache."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch

from benchmarks.grids import Entry

COLD_BYTES = 400_000_000
MAX_SETS = 1024
QUANTISED_SPREAD = 20.0  # what values are multiplied by before they are quantised


def num_sets(entry: Entry, device: torch.device) -> int:
    """How many sets make a round trip longer than four L2 caches (and 400 MB)."""
    if device.type == "cpu":
        return 2
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MAX_SETS, ceil(max(COLD_BYTES, 4 * l2) / max(1, entry.kv_bytes))))


class InputSets:
    """``count`` sets of random inputs of one entry.

    q[i] (b, seqlen_q, hq, d); k[i], v[i] (b, capacity, hk, d), or (pages, page_size, hk, d) with ``page_table``
    (b, max_pages). The capacity is rounded up to 16 keys, so that libraries that know pages alone can read the same cache.
    """

    def __init__(self, entry: Entry, device: torch.device, count: int, seed: int = 0) -> None:
        self.entry, self.device, self.count = entry, device, count
        self.dtype: torch.dtype = getattr(torch, entry.dtype)
        self.scale: float = entry.head_dim**-0.5
        generator = torch.Generator(device=device).manual_seed(seed)
        heads = (entry.num_heads_kv, entry.head_dim)
        self.page_table: torch.Tensor | None = None
        if entry.page_size:
            pages = self._scatter_pages(generator)
            shape = (pages, entry.page_size, *heads)
        else:
            shape = (entry.batch, entry.capacity, *heads)
        draw = lambda size: torch.randn(size, device=device, dtype=self.dtype, generator=generator)  # noqa: E731
        self.q = draw((count, entry.batch, entry.seqlen_q, entry.num_heads_q, entry.head_dim)).unbind(0)
        self.k = self._stored(draw((count, *shape))).unbind(0)
        self.v = self._stored(draw((count, *shape))).unbind(0)
        self.kv_scale = torch.full((1,), 1 / QUANTISED_SPREAD, device=device) if entry.dtype_kv else None
        self.seqlens_k = torch.tensor(entry.lengths, device=device, dtype=torch.int32)

    def _stored(self, values: torch.Tensor) -> torch.Tensor:
        """Values of a size of about 1 as the cache has them."""
        if not self.entry.dtype_kv:
            return values
        spread = values.mul_(QUANTISED_SPREAD)
        return (spread.round_().clamp_(-128, 127) if self.entry.dtype_kv == "int8" else spread).to(getattr(torch, self.entry.dtype_kv))

    def _scatter_pages(self, generator: torch.Generator) -> int:
        """Gives each sequence its pages in random order, as a cache has them after a while; returns how many there are."""
        needed = [ceil(n / self.entry.page_size) for n in self.entry.lengths]
        ids = torch.randperm(sum(needed), device=self.device, generator=generator).to(torch.int32)
        table = torch.zeros(self.entry.batch, max(needed), device=self.device, dtype=torch.int32)
        for row, part in zip(table, ids.split(needed)):
            row[: part.numel()] = part
        self.page_table = table
        return sum(needed)

    def args(self, i: int) -> dict[str, Any]:
        """Keyword arguments of ``flashtile.decode`` for set ``i``."""
        args = {"q": self.q[i], "k_cache": self.k[i], "v_cache": self.v[i], "seqlens_k": self.seqlens_k, "page_table": self.page_table}
        return args | self._scales()

    def _scales(self) -> dict[str, Any]:
        return {} if self.kv_scale is None else {"k_scale": self.kv_scale, "v_scale": self.kv_scale}

    def sequence(self, i: int, b: int) -> dict[str, Any]:
        """The same for sequence ``b`` alone."""
        one = slice(b, b + 1)
        args = {"q": self.q[i][one], "seqlens_k": self.seqlens_k[one]} | self._scales()
        if self.page_table is None:
            return args | {"k_cache": self.k[i][one], "v_cache": self.v[i][one], "page_table": None}
        pages = ceil(self.entry.lengths[b] / self.entry.page_size)
        table = self.page_table[b, :pages]
        cut = torch.arange(pages, device=self.device, dtype=torch.int32)[None]
        k, v = (_pages(cache, table) for cache in (self.k[i], self.v[i]))
        return args | {"k_cache": k, "v_cache": v, "page_table": cut}


def _pages(cache: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The pages of a cache that a table (pages,) names, copied; torch gathers no float8."""
    bits = torch.uint8 if cache.itemsize == 1 else cache.dtype
    return cache.view(bits)[table.long()].view(cache.dtype)
