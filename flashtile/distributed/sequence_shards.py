"""SequenceShards: which positions of each sequence lie on which rank, for prefill and training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from flashtile.distributed.blocks import Part
from flashtile.errors import ArgumentError, ShapeError, message

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SequenceShards:
    """Sequences cut over ``num_ranks`` ranks by position.

    ``seqlens`` is one length for a batch (batch, seqlen, ...), or with ``packed`` one a sequence of a packed (total, ...). With
    ``zigzag`` each sequence is cut in ``2 num_ranks`` chunks, and rank r holds chunk r and then chunk ``2 num_ranks - 1 - r``, so
    that under a causal mask all ranks have as much to do; else in ``num_ranks``. Any length will do: chunk i of C begins at
    ``i * seqlen // C``. Of packed sequences a rank holds the first chunks of all, and then the second chunks of all.
    """

    seqlens: tuple[int, ...]
    num_ranks: int
    packed: bool = False
    zigzag: bool = True

    def __post_init__(self) -> None:
        if not all(isinstance(n, int) and n >= 0 for n in self.seqlens) or (not self.packed and len(self.seqlens) != 1):
            wanted = "lengths that are not negative" if self.packed else "one length, that is not negative"
            raise ArgumentError(message("seqlens", wanted, self.seqlens, "They are Python ints: transfers have to be planned."))
        if not isinstance(self.num_ranks, int) or self.num_ranks < 1:
            raise ArgumentError(message("num_ranks", "a positive count", self.num_ranks, "It is the size of the group."))

    @classmethod
    def dense(cls, seqlen: int, num_ranks: int, *, zigzag: bool = True) -> SequenceShards:
        """Of a batch of sequences of one length."""
        return cls((seqlen,), num_ranks, False, zigzag)

    @classmethod
    def of_packed(cls, seqlens: Sequence[int], num_ranks: int, *, zigzag: bool = True) -> SequenceShards:
        """Of packed sequences of their own lengths."""
        return cls(tuple(seqlens), num_ranks, True, zigzag)

    @property
    def total(self) -> int:
        """Rows of the whole: of one sequence of a batch, or of all that are packed."""
        return sum(self.seqlens)

    @property
    def dim(self) -> int:
        """The dimension of tensors (batch, seqlen, ...) or (total, ...) that is cut."""
        return 0 if self.packed else 1

    def chunks(self, rank: int) -> tuple[int, ...]:
        """The numbers of a rank's chunks, in the order in which it holds them."""
        return (rank, 2 * self.num_ranks - 1 - rank) if self.zigzag else (rank,)

    def parts(self, rank: int) -> tuple[Part, ...]:
        """What a rank holds, in order."""
        return _parts(self, rank)

    def num_rows(self, rank: int) -> int:
        """Rows that a rank holds (of each sequence of a batch)."""
        return sum(part.num_rows for part in self.parts(rank))

    def rows(self, rank: int) -> list[int]:
        """The row of the whole that each of a rank's rows is."""
        begins = [sum(self.seqlens[:n]) for n in range(len(self.seqlens))]
        return [begins[n] + position for n, position in self._places(rank)]

    def positions(self, rank: int, device: torch.device | str | None = None) -> torch.Tensor:
        """(num_rows,) int64: the position within its sequence of each of a rank's rows, for rotary embeddings, say."""
        import torch

        return torch.tensor([position for _, position in self._places(rank)], dtype=torch.int64, device=device)

    def shard(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        """A rank's rows of a whole tensor, (batch, seqlen, ...) or packed (total, ...), as a tensor of their own."""
        import torch

        if not 0 <= rank < self.num_ranks:
            raise ArgumentError(message("rank", f"0 to {self.num_ranks - 1}", rank, "Use dist.get_rank()."))
        if whole.ndim <= self.dim or whole.shape[self.dim] != self.total:
            wanted = f"{self.total} rows in dimension {self.dim}"
            raise ShapeError(message("whole", wanted, f"shape {tuple(whole.shape)}", "Shards are cut from the whole."))
        return whole.index_select(self.dim, torch.tensor(self.rows(rank), dtype=torch.int64, device=whole.device))

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole of everyone's rows, in rank order."""
        import torch

        return torch.cat(list(shards), dim=self.dim).index_select(self.dim, inverse_order(self, str(shards[0].device)))

    def _places(self, rank: int) -> list[tuple[int, int]]:
        """(sequence, position) of each of a rank's rows."""
        return [
            (n, start + i)
            for part in self.parts(rank)
            for n, (start, length) in enumerate(zip(part.starts, part.lengths))
            for i in range(length)
        ]


@lru_cache(maxsize=256)
def _parts(shards: SequenceShards, rank: int) -> tuple[Part, ...]:
    num_chunks = shards.num_ranks * (2 if shards.zigzag else 1)
    parts, row = [], 0
    for chunk in shards.chunks(rank):
        starts = tuple(chunk * n // num_chunks for n in shards.seqlens)
        lengths = tuple((chunk + 1) * n // num_chunks - start for n, start in zip(shards.seqlens, starts))
        parts.append(Part(row, starts, lengths))
        row += sum(lengths)
    return tuple(parts)


@lru_cache(maxsize=64)
def order(shards: SequenceShards, device: str) -> torch.Tensor:
    """(total,): the row of the whole that each row of all ranks' rows, one rank after the other, is."""
    import torch

    return torch.tensor([row for rank in range(shards.num_ranks) for row in shards.rows(rank)], dtype=torch.int64, device=device)


@lru_cache(maxsize=64)
def inverse_order(shards: SequenceShards, device: str) -> torch.Tensor:
    """(total,): where among all ranks' rows, one rank after the other, each row of the whole lies."""
    return order(shards, device).argsort()
