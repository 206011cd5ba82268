"""Where the programs of a launch count the tiles that they have taken: two int32 in the device's memory, zero before and after.

The last program of a launch to finish sets both back to zero, so that the next launch finds them so without a memset. Two
launches that run at once must not share a pair: those of one stream never do, so each (device, stream) has its own. A CUDA
graph may be replayed on any stream, beside anything: it gets a pair of its own, cleared by a node of the graph.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from flashtile.kernels.replay import Recorder

_STREAMS = 1024  # of one device, as many as will ever be in use at once


class TileCounters:
    """The pairs of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._pairs: tuple[torch.Tensor, torch.cuda.Event] | None = None
        self._addresses: dict[int, int] = {}

    def address(self, stream: Any) -> tuple[int, torch.Tensor | None]:
        """The pair for a launch on ``stream``, which is the current one; and the tensor to keep until the launch is made, if any.

        A Recorder in the stream's place is told of the pairs of all streams.
        """
        if stream.__class__ is Recorder:
            return stream.memory_of_stream(self._addresses), None
        if not torch.cuda.is_current_stream_capturing():
            known = self._addresses.get(stream) or self._new_pair(stream)
            if known:
                return known, None
        own = torch.zeros(2, dtype=torch.int32, device=self._device)
        return own.data_ptr(), own

    def _new_pair(self, stream: int) -> int:
        """A pair for a stream that has none yet; 0 where there are too many streams."""
        with self._lock:
            if len(self._addresses) >= _STREAMS:
                return 0
            if self._pairs is None:
                # a thread of its own: memory that lives on must not come from a pool that the caller has told torch to use,
                # as torch.compile does while it warms up a CUDA graph
                with ThreadPoolExecutor(1) as other_thread:
                    self._pairs = other_thread.submit(_cleared_pairs, self._device).result()
            tensor, cleared = self._pairs
            torch.cuda.current_stream(self._device).wait_event(cleared)
            return self._addresses.setdefault(stream, tensor.data_ptr() + 8 * len(self._addresses))


def _cleared_pairs(device: torch.device) -> tuple[torch.Tensor, torch.cuda.Event]:
    """Pairs for all streams, and when they are cleared."""
    with torch.cuda.device(device):
        tensor = torch.zeros(2 * _STREAMS, dtype=torch.int32, device=device)
        cleared = torch.cuda.Event()
        cleared.record()
    return tensor, cleared


_COUNTERS: dict[torch.device, TileCounters] = {}
_MAKING = threading.Lock()


def tile_counters(device: torch.device) -> TileCounters:
    """The pairs of a device."""
    with _MAKING:
        return _COUNTERS.setdefault(device, TileCounters(device))
