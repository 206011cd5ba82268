"""Which entries of the softmax the CPU engine drops, as its blocks of packed rows want to know it."""

from __future__ import annotations

import torch

from flashtile.dropout import keep_mask, scale_of
from flashtile.kernels.call import Dropout


class RowDropout:
    """Dropout of query positions ``here`` of one sequence, whose rows are packed as (position, head of the group)."""

    def __init__(self, dropout: Dropout, sequence: int, heads_kv: int, group: int, here: slice) -> None:
        heads = torch.arange(heads_kv * group).view(heads_kv, group)
        self._streams = sequence * heads_kv * group + heads
        self._dropout = dropout
        self._positions = range(here.start, here.stop)

    def factors(self, start: int, stop: int) -> torch.Tensor:
        """What each entry over keys ``start`` to ``stop`` is multiplied by, 0 or the scale: float32 (hk, rows, keys)."""
        kept = keep_mask(self._dropout.p, self._dropout.seed, self._streams, self._positions, range(start, stop))
        return kept.transpose(1, 2).flatten(1, 2).float().mul_(scale_of(self._dropout.p))
