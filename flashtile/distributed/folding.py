"""Partial results become one: `merge`'s algebra in few passes, in place, for results that no gradient flows through."""

from __future__ import annotations

import torch


def fold_in(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Folds a part over other keys into float32 out (..., rows, heads, dim) and lse (..., heads, rows), in place.

    ``out + share * (part - out)`` with ``share = exp(part_lse - lse) / (1 + exp(part_lse - lse))``: one pass over out. Where neither
    has seen a key, all stays as it is.
    """
    share = torch.sigmoid(part_lse - lse).nan_to_num_(0.0)  # (..., heads, rows)
    out.lerp_(part.float(), share.transpose(-1, -2).unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, part_lse))


def folded(parts: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
    """float32 parts (num_parts, ..., rows, heads, dim), 0 where lses (num_parts, ..., heads, rows) are -inf, to (..., rows, heads, dim)."""
    shares = lses.softmax(dim=0).nan_to_num_(0.0)  # NaN where nobody saw a key
    return parts.mul_(shares.transpose(-1, -2).unsqueeze(-1)).sum(dim=0)
