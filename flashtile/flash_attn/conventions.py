"""FlashAttention's conventions in flashtile's terms: windows, layouts, head dims and log-sum-exps."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from flashtile.errors import ArgumentError, message

Sides = tuple[int | None, int | None]


def window_of(window_size: tuple[int, int]) -> Sides:
    """(left, right) with None for a side that is unbounded, which FlashAttention writes as -1."""
    try:
        left, right = window_size
    except (TypeError, ValueError) as error:
        raise ArgumentError(message("window_size", "a pair (left, right)", repr(window_size), "(-1, -1) is no window.")) from error
    return _side(left), _side(right)


def _side(count: int | torch.Tensor | None) -> int | None:
    if count is None:
        return None
    side = count_of(count)
    return None if side < 0 else side


def count_of(length: int | torch.Tensor) -> int:
    """A length or a window's side as the planner needs it. FlashAttention takes tensors too, and waits for their device to read them."""
    return int(length) if isinstance(length, torch.Tensor) else length


def scale_for(q: torch.Tensor, softmax_scale: float | None) -> float:
    """The scale that was asked for, or that of q's own head dim, before it is padded."""
    if softmax_scale is not None:
        return softmax_scale
    if not isinstance(q, torch.Tensor) or q.ndim == 0 or q.shape[-1] == 0:
        return 1.0  # the call's checks say what is wrong with q
    scale: float = q.shape[-1] ** -0.5
    return scale


def readable(x: torch.Tensor) -> torch.Tensor:
    """``x`` with a contiguous last dimension and a multiple of 8 there: itself where it has, else a copy, padded with zeros."""
    if not isinstance(x, torch.Tensor) or x.ndim == 0:
        return x  # the call's checks say what is wrong with it
    short = -x.shape[-1] % 8
    return F.pad(x, (0, short)) if short else with_rows(x)


def with_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` with a contiguous last dimension: itself where it has."""
    return x if x.stride()[-1] == 1 or x.shape[-1] == 1 else x.contiguous()  # stride() takes half as long as stride(-1)


def cut(out: torch.Tensor, head_dim_v: int) -> torch.Tensor:
    """``out`` without what v was padded with."""
    return out if out.shape[-1] == head_dim_v else out[..., :head_dim_v]


def lse_of_two(lse: torch.Tensor) -> torch.Tensor:
    """As FlashAttention-2 returns it: +inf, where flashtile has -inf, for a query that sees no key."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def lse_of_three(lse: torch.Tensor, keys: int) -> torch.Tensor:
    """As FlashAttention-3 returns it: -inf for a query that sees no key, but +inf where there is no key at all."""
    return lse if keys else torch.full_like(lse, torch.inf)


def lse_from_either(lse: torch.Tensor) -> torch.Tensor:
    """flashtile's lse from one in either convention."""
    return lse.masked_fill(lse == torch.inf, -torch.inf)
