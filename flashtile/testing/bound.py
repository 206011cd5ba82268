"""A kernel called as the library calls it, but with the plan of one's choice and memory that shows mistakes."""

from __future__ import annotations

from typing import Any

import torch

from flashtile.kernels.call import DecodeCall
from flashtile.ops import kernel_module
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem
from flashtile.testing import poison

TENSORS = (
    "q", "k_cache", "v_cache", "seqlens_k", "page_table", "cu_seqlens_q", "sinks", "alibi_slopes", "k_scale", "v_scale", "leftpad_k",
)  # fmt: skip


def run_plan(
    args: dict[str, Any],
    plan: DecodePlan,
    *,
    lse: bool = True,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of ``flashtile.decode``'s arguments by exactly this plan, whatever the planner thinks of it.

    Outputs and workspace are NaN where the kernel leaves them to chance; lse stays NaN unless wanted.
    """
    q, v_cache, scale = args["q"], args["v_cache"], args.get("scale")
    problem = Problem.decode(**args, lse=lse, out=out, out_dtype=out_dtype)
    fresh_out, lse_out = poison.outputs(q, v_cache.shape[-1], out_dtype)
    tensors: dict[str, Any] = {name: args.get(name) for name in TENSORS}
    call = DecodeCall(
        **tensors,
        out=fresh_out if out is None else out,
        lse=lse_out if lse else None,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        softcap=float(args.get("softcap", 0.0)),
    )
    with poison.allocations():
        kernel_module(plan).bind(problem, plan, q.device)(call)
    return call.out, lse_out
