"""What the public functions do under torch.compile, where a whole call is one operator."""

from __future__ import annotations

import torch

from flashtile.errors import DtypeError, ShapeError, message
from flashtile.ops.prepared import check_choice
from flashtile.planner.plans import Plan


def text_of(plan: Plan | None, kind: type[Plan]) -> str | None:
    """The plan, if there is one, as it crosses an operator's schema; ArgumentError for one that is not of the operation's kind."""
    if plan is None:
        return None
    check_choice(plan, kind)
    text: str = _constant_text(plan)
    return text


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant_text(plan: Plan) -> str:
    return plan.to_json()


def copied(result: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """A given ``out`` with the operator's result in it: a copy, which its graph may fuse."""
    if out.shape != result.shape:
        raise ShapeError(message("out", f"shape {tuple(result.shape)}", f"shape {tuple(out.shape)}", "Leave it out to have it allocated."))
    if out.dtype != result.dtype:
        raise DtypeError(message("out", f"dtype {result.dtype}", out.dtype, "Leave it out to have it allocated."))
    return out.copy_(result)
