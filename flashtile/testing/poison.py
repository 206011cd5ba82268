"""Memory that shows when it is read before it is written, or never written: NaN."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


def nan_like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape, dtype, strides and device, all NaN."""
    return torch.full_like(tensor, float("nan"))


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """What ``torch.empty`` gives, with NaN for what it leaves to chance."""
    return torch.full(tuple(shape), float("nan"), dtype=dtype, device=device)


def outputs(q: torch.Tensor, head_dim_v: int, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """NaN-filled out (like q, with head_dim_v) and lse ((b, hq, seqlen_q), or (hq, total_q) for packed q)."""
    out = empty((*q.shape[:-1], head_dim_v), dtype or q.dtype, q.device)
    lse = empty(q.transpose(-3, -2).shape[:-1], torch.float32, q.device)
    return out, lse


@contextmanager
def allocations() -> Iterator[None]:
    """Inside, torch fills what ``torch.empty`` and its kin return with NaN (a setting of the whole process)."""
    were = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(were[0], warn_only=were[1])
        torch.utils.deterministic.fill_uninitialized_memory = were[2]  # type: ignore[attr-defined]
