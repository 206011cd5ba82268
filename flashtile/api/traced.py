"""What the public functions do under torch.compile, where a whole call is one operator."""

from __future__ import annotations

import torch

from flashtile.errors import DtypeError, ShapeError, message
from flashtile.planner.plans import Plan


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def text_of(plan: Plan) -> str:
    """The plan as it crosses an operator's schema."""
    return plan.to_json()


def copied(result: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """A given ``out`` with the operator's result in it: a copy, which its graph may fuse."""
    if out.shape != result.shape:
        raise ShapeError(message("out", f"shape {tuple(result.shape)}", f"shape {tuple(out.shape)}", "Leave it out to have it allocated."))
    if out.dtype != result.dtype:
        raise DtypeError(message("out", f"dtype {result.dtype}", out.dtype, "Leave it out to have it allocated."))
    return out.copy_(result)
