"""CacheShards: which keys of a cache lie on which rank, for decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashtile.errors import ArgumentError, message

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CacheShards:
    """A cache cut over ``num_ranks`` ranks by position; each holds ``capacity`` keys of each sequence.

    ``interleave`` None: rank r holds positions [r * capacity, (r + 1) * capacity). Else runs of that many keys go round: rank r holds
    positions [(n * num_ranks + r) * interleave, ... + interleave), n = 0, 1, ..., one run behind the other. With the page size, or
    a multiple of it, pages go round, so that a sequence that grows fills all ranks alike.
    """

    num_ranks: int
    interleave: int | None = None

    def __post_init__(self) -> None:
        for name, value, optional in (("num_ranks", self.num_ranks, False), ("interleave", self.interleave, True)):
            if not (value is None and optional) and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ArgumentError(message(name, "a positive count", repr(value), "Pages that go round have their size here."))

    def check_capacity(self, capacity: int) -> None:
        """Raises ArgumentError unless a rank's ``capacity`` keys are whole runs."""
        if self.interleave is not None and capacity % self.interleave:
            fix = "Give each rank whole runs of keys."
            raise ArgumentError(message("k_cache", f"a multiple of {self.interleave} keys a sequence on each rank", capacity, fix))

    def held_before(self, positions: torch.Tensor, rank: int, capacity: int) -> torch.Tensor:
        """How many keys before each position (any shape, integers) a rank holds: where among its keys that position is, or would be."""
        if self.interleave is None:
            return (positions - rank * capacity).clamp_(0, capacity)
        run, cycle = self.interleave, self.interleave * self.num_ranks
        positions = positions.clamp(0, capacity * self.num_ranks)
        return positions // cycle * run + (positions % cycle - rank * run).clamp_(0, run)

    def is_held(self, positions: torch.Tensor, rank: int, capacity: int) -> torch.Tensor:
        """bool: whether a rank holds each position."""
        run = self.interleave or capacity
        inside = (positions >= 0) & (positions < capacity * self.num_ranks)
        return inside & (positions // max(1, run) % self.num_ranks == rank)

    def positions(self, rank: int, capacity: int, device: torch.device | str | None = None) -> torch.Tensor:
        """(capacity,) int64: the position of each of a rank's keys."""
        import torch

        self.check_capacity(capacity)
        run = max(1, self.interleave or capacity)
        key = torch.arange(capacity, device=device)
        return (key // run * self.num_ranks + rank) * run + key % run
