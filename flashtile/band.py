"""Band: causal, sliding-window and cross-length masks as one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashtile.errors import ArgumentError, message

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Band:
    """Which keys a query sees, relative to the diagonal that ends at the last query and the last key.

    Query ``q`` sees key ``k`` iff ``-left <= k - q - offset <= right``, where ``offset`` is
    ``seqlen_k - seqlen_q`` (bottom-right alignment). ``None`` leaves a side unbounded.
    """

    left: int | None = None
    right: int | None = None

    def __post_init__(self) -> None:
        for side in ("left", "right"):
            value = getattr(self, side)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ArgumentError(
                    message(f"window ({side})", "a non-negative int or None", repr(value), "Use None for an unbounded side.")
                )

    @classmethod
    def of(cls, causal: bool = False, window: tuple[int | None, int | None] | None = None) -> Band:
        """The band of the public arguments: ``causal`` closes the right side at the diagonal."""
        if window is None:
            left, right = None, None
        elif isinstance(window, (tuple, list)) and len(window) == 2:
            left, right = window
        else:
            raise ArgumentError(
                message("window", "a pair (left, right) of non-negative ints or None", repr(window), "For example window=(1023, 0).")
            )
        if causal:
            right = 0
        return cls(left, right)

    @property
    def is_full(self) -> bool:
        return self.left is None and self.right is None

    def transposed(self) -> Band:
        """The band seen from the keys: the backward pass has no mask formula of its own."""
        return Band(self.right, self.left)

    def simplified(self, max_seqlen_q: int) -> Band:
        """Drops a right side that can hide nothing: a lone query stands on the diagonal's last key."""
        return Band(self.left, None) if max_seqlen_q <= 1 else self

    def keys_seen(self, seqlen_q: int, seqlen_k: int) -> int:
        """How many keys lie inside the union of all queries' windows: what a kernel must read."""
        offset = seqlen_k - seqlen_q
        first = 0 if self.left is None else max(0, offset - self.left)
        last = seqlen_k if self.right is None else min(seqlen_k, offset + seqlen_q + self.right)
        return max(0, last - first)

    def dense(self, seqlen_q: int, seqlen_k: int, *, offset: int | None = None, device: torch.device | str | None = None) -> torch.Tensor:
        """The mask as a bool matrix (seqlen_q, seqlen_k), True where visible: the oracle of every mask test."""
        import torch

        offset = seqlen_k - seqlen_q if offset is None else offset
        q = torch.arange(seqlen_q, device=device)[:, None]
        k = torch.arange(seqlen_k, device=device)[None, :]
        distance = k - q - offset
        visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
        if self.left is not None:
            visible &= distance >= -self.left
        if self.right is not None:
            visible &= distance <= self.right
        return visible
