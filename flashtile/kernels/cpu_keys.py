"""Where the CPU engine's keys and values come from: views of a cache, or blocks gathered from pages or converted."""

from __future__ import annotations

import torch

from flashtile.kernels.cpu_mask import MASK_BYTES

_BLOCK_BYTES = 2 << 20  # of K, and as many of V: a block is written and read again while it lies in the caches
_MIN_BLOCK = 64


class KeyReader:
    """Reads keys of one call; ``open`` chooses the sequences, ``read`` returns some of their keys.

    k and v are (b, capacity, hk, d or dv), packed (total_k, hk, d or dv), or with a page table (pages, page_size, hk, d or dv).
    Keys that lie in place and need no conversion are never copied: ``read`` returns views of any length. Otherwise blocks
    of ``keys_at_once`` keys go through two buffers that are reused, so that a block is valid until the next ``read``.
    """

    def __init__(
        self, k: torch.Tensor, v: torch.Tensor, page_table: torch.Tensor | None,
        through_float32: bool, max_block: int = 0, *, one_by_one: bool = False,
    ) -> None:  # fmt: skip
        self.k, self.v = k, v
        self.page_table = page_table
        self.through_float32 = through_float32
        self.max_block = max_block
        self.one_by_one = one_by_one
        self.packed = k.ndim == 3
        self.direct = page_table is None and not through_float32
        self.num_heads = k.shape[-2]
        self.key_mask: torch.Tensor | None = None
        self._page_size = k.shape[1] if page_table is not None else 0
        self._buffers: dict[str, torch.Tensor] = {}
        item = 4 if through_float32 else k.element_size()
        self._key_bytes = self.num_heads * max(k.shape[-1], v.shape[-1]) * item

    @property
    def capacity(self) -> int:
        """The most keys that a sequence can have, unless keys are packed."""
        if self.page_table is None:
            return self.k.shape[1]
        return self.page_table.shape[1] * self._page_size if self.k.shape[0] else 0

    def sequences_at_once(self, seqlen_k: int) -> int:
        """How many sequences of this length may be one run."""
        if self.one_by_one:
            return 1
        return 1 << 30 if self.direct else max(1, _BLOCK_BYTES // max(1, seqlen_k * self._key_bytes))

    def keys_at_once(self, batch: int, scored_rows: int) -> int:
        """The most keys of one block; ``scored_rows`` packed rows need a mask over them, or have their scores in memory."""
        limit = 1 << 30
        if not self.direct:
            limit = max(_MIN_BLOCK, _BLOCK_BYTES // (batch * self._key_bytes))
        if scored_rows:
            limit = min(limit, max(_MIN_BLOCK, MASK_BYTES // (4 * scored_rows)))
        return min(limit, self.max_block) if self.max_block > 0 else limit

    def open(self, first: int, stop: int, key: int, seqlen_k: int) -> None:
        """Turns to sequences ``first`` to ``stop``, each with ``seqlen_k`` keys from ``key`` on; packed ones follow without gaps."""
        self.key_mask = None
        if self.page_table is not None:
            self._open_pages(self.page_table[first:stop, : -(-(key + seqlen_k) // self._page_size)], key)
        elif self.packed:
            batch = stop - first
            rows = slice(key, key + batch * seqlen_k)
            self._k, self._v = (t[rows].view(batch, seqlen_k, *t.shape[1:]) for t in (self.k, self.v))
        else:
            self._k, self._v = self.k[first:stop, key:], self.v[first:stop, key:]

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``start`` to ``stop`` of the open sequences: K (batch, hk, keys, d) and V (batch, hk, keys, dv)."""
        if self.page_table is None:
            k, v = self._k[:, start:stop], self._v[:, start:stop]
        else:
            k, v = self._gather("k", self.k, start, stop), self._gather("v", self.v, start, stop)
        if self.through_float32:
            k, v = self._converted("k32", k), self._converted("v32", v)
        return k.transpose(1, 2), v.transpose(1, 2)

    def _open_pages(self, ids: torch.Tensor, first_key: int) -> None:
        self._first_key = first_key
        num_pages = self.k.shape[0]
        exists = (ids >= 0) & (ids < num_pages)
        if not exists.all():
            self.key_mask = exists.repeat_interleave(self._page_size, dim=1)[:, first_key:]
            ids = ids.clamp(0, num_pages - 1)
        self._ids = ids

    def _converted(self, name: str, keys: torch.Tensor) -> torch.Tensor:
        return self._buffer(name, keys.shape, torch.float32).copy_(keys)

    def _gather(self, name: str, cache: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Copies the pages that hold keys ``start`` to ``stop`` and returns these keys, (batch, keys, hk, d)."""
        first_key, last_key = start + self._first_key, stop + self._first_key  # counted from the cache's first key
        first_page = first_key // self._page_size
        ids = self._ids[:, first_page : -(-last_key // self._page_size)]
        block = self._buffer(name, (ids.numel(), *cache.shape[1:]), cache.dtype)
        bits = torch.uint8 if cache.itemsize == 1 else cache.dtype  # torch gathers no float8
        torch.index_select(cache.view(bits), 0, ids.reshape(-1), out=block.view(bits))
        keys = block.view(ids.shape[0], -1, *cache.shape[2:])
        first_slot = first_key - first_page * self._page_size
        keys = keys[:, first_slot : first_slot + stop - start]
        if self.key_mask is not None:
            # A page that does not exist was read as some other: its keys are masked, and its NaN must not count.
            keys.view(bits).masked_fill_(~self.key_mask[:, start:stop, None, None], 0)
        return keys

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        numel = 1
        for size in shape:
            numel *= size
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < numel:
            buffer = self._buffers[name] = torch.empty(numel, dtype=dtype)
        return buffer[:numel].view(shape)
