"""Where the CPU engine's keys and values come from: views of a cache, or blocks gathered from pages or converted."""

from __future__ import annotations

import torch

from flashtile.kernels.call import DecodeCall
from flashtile.kernels.cpu_mask import MASK_BYTES

_BLOCK_BYTES = 2 << 20  # of K, and as many of V: a block is written and read again while it lies in the caches
_MIN_BLOCK = 64


class KeyReader:
    """Reads keys of one call; ``open`` chooses the sequences, ``read`` returns some of their keys.

    A contiguous cache that needs no conversion is never copied: ``read`` returns views of any length. Otherwise blocks
    of ``keys_at_once`` keys go through two buffers that are reused, so that a block is valid until the next ``read``.
    """

    def __init__(self, call: DecodeCall, through_float32: bool, max_block: int) -> None:
        self.k_cache, self.v_cache = call.k_cache, call.v_cache
        self.page_table = call.page_table
        self.through_float32 = through_float32
        self.max_block = max_block
        self.direct = call.page_table is None and not through_float32
        self.page_size = call.k_cache.shape[1]
        pages = 0 if call.page_table is None or call.k_cache.shape[0] == 0 else call.page_table.shape[1]
        self.capacity = self.page_size if call.page_table is None else pages * self.page_size
        self.key_mask: torch.Tensor | None = None
        self._buffers: dict[str, torch.Tensor] = {}
        item = 4 if through_float32 else call.k_cache.element_size()
        self._key_bytes = call.k_cache.shape[2] * max(call.k_cache.shape[3], call.v_cache.shape[3]) * item

    def sequences_at_once(self, seqlen_k: int) -> int:
        """How many sequences of this length may be one run."""
        return 1 << 30 if self.direct else max(1, _BLOCK_BYTES // max(1, seqlen_k * self._key_bytes))

    def keys_at_once(self, batch: int, masked_rows: int) -> int:
        """The most keys of one block; ``masked_rows`` packed rows need a mask over them."""
        limit = 1 << 30
        if not self.direct:
            limit = max(_MIN_BLOCK, _BLOCK_BYTES // (batch * self._key_bytes))
        if masked_rows:
            limit = min(limit, max(_MIN_BLOCK, MASK_BYTES // (4 * masked_rows)))
        return min(limit, self.max_block) if self.max_block > 0 else limit

    def open(self, first: int, stop: int, seqlen_k: int) -> None:
        """Turns to sequences ``first`` to ``stop``, each with ``seqlen_k`` keys."""
        self._sequences = slice(first, stop)
        self.key_mask = None
        if self.page_table is None:
            return
        ids = self.page_table[self._sequences, : -(-seqlen_k // self.page_size)]
        num_pages = self.k_cache.shape[0]
        exists = (ids >= 0) & (ids < num_pages)
        if not exists.all():
            self.key_mask = exists.repeat_interleave(self.page_size, dim=1)
            ids = ids.clamp(0, num_pages - 1)
        self._ids = ids

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``start`` to ``stop`` of the open sequences: K (batch, hk, keys, d) and V (batch, hk, keys, dv)."""
        return self._read("k", self.k_cache, start, stop), self._read("v", self.v_cache, start, stop)

    def _read(self, name: str, cache: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        if self.page_table is None:
            keys = cache[self._sequences, start:stop]
        else:
            keys = self._gather(name, cache, start, stop)
        if self.through_float32:
            keys = self._buffer(name + "32", keys.shape, torch.float32).copy_(keys)
        return keys.transpose(1, 2)

    def _gather(self, name: str, cache: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Copies the pages that hold keys ``start`` to ``stop`` and returns these keys, (batch, keys, hk, d)."""
        first_page = start // self.page_size
        ids = self._ids[:, first_page : -(-stop // self.page_size)]
        block = self._buffer(name, (ids.numel(), *cache.shape[1:]), cache.dtype)
        torch.index_select(cache, 0, ids.reshape(-1), out=block)
        keys = block.view(ids.shape[0], -1, *cache.shape[2:])
        first_key = start - first_page * self.page_size
        keys = keys[:, first_key : first_key + stop - start]
        if self.key_mask is not None:
            # A page that does not exist was read as some other: its keys are masked, and its NaN must not count.
            keys.masked_fill_(~self.key_mask[:, start:stop, None, None], 0.0)
        return keys

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        numel = 1
        for size in shape:
            numel *= size
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < numel:
            buffer = self._buffers[name] = torch.empty(numel, dtype=dtype)
        return buffer[:numel].view(shape)
