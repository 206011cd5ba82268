"""The portable forward kernel in Triton's interpreter against the reference: every small case, over tiles.

The cases take turns at the tiles; each case meets one. bfloat16 cases run as float16: the interpreter's product of bfloat16
is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from flashtile.band import Band
from flashtile.planner.plans import ForwardPlan
from flashtile.problem import Problem
from flashtile.testing import poison
from flashtile.testing.forward_cases import FORWARD_CASES, ForwardCase
from flashtile.testing.forward_inputs import ForwardInputs, expected_forward, forward_call, make_forward_inputs
from flashtile.testing.tolerance import assert_close

pytest.importorskip("triton")
from flashtile.kernels import forward

# NumPy computes both branches of a select, log2(0) and 1/0 of rows without keys among them
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton 3.6 with NumPy 2
]

TILES = ((16, 16), (64, 32), (128, 64), (32, 128), (128, 16), (64, 64), (32, 32), (16, 64), (128, 128))
"""(block_m, block_n): rows above and below the head dims, key tiles above and below the rows."""


def plan_of(block_m: int = 32, block_n: int = 16) -> ForwardPlan:
    return ForwardPlan("triton.forward", block_m=block_m, block_n=block_n, num_warps=4, num_stages=2)


def problem_of(inputs: ForwardInputs, *, lse: bool = True) -> Problem:
    """The problem that the kernel is bound for."""
    case, used = inputs.case, inputs.args.get("seqused_k")
    return Problem(
        operation="forward", batch=case.batch, seqlen_q=max(case.query_lengths, default=0), total_q=sum(case.query_lengths),
        seqlen_k=max(case.key_lengths, default=0), num_heads_q=case.num_heads_q, num_heads_kv=case.num_heads_kv,
        head_dim=case.head_dim, head_dim_v=case.head_dim_v, dtype_q=case.dtype, band=Band.of(case.causal, case.window),
        softcap=case.softcap != 0.0, alibi=case.alibi, sinks=case.sinks, lse=lse, page_size=case.page_size,
        ragged_q=case.varlen, ragged_k=case.varlen and not case.page_size, seqused_k=used is not None,
        alignment=min(16, (case.offset_elements or 16) * inputs.args["q"].element_size()),
    )  # fmt: skip


def run(
    inputs: ForwardInputs, plan: ForwardPlan, *, lse: bool = True, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, NaN where nothing was written."""
    fresh, lse_out = poison.outputs(inputs.args["q"], inputs.case.head_dim_v)
    call = forward_call(inputs, fresh if out is None else out, lse_out if lse else None)
    forward.bind(problem_of(inputs, lse=lse), plan, call.q.device)(call)
    return call.out, lse_out


def check(inputs: ForwardInputs, plan: ForwardPlan) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = run(inputs, plan)
    assert_close(out, lse, *expected_forward(inputs), dtype=inputs.dtype, what=inputs.case.name)
    return out, lse


def trials() -> Iterator[Any]:
    # a call without sequences runs no kernel
    for turn, case in enumerate(case for case in FORWARD_CASES if case.batch):
        block_m, block_n = TILES[turn % len(TILES)]
        if case.dtype == "bfloat16":
            case = replace(case, dtype="float16")
        yield pytest.param(case, plan_of(block_m, block_n), id=f"{case.name}-m{block_m}-n{block_n}")


@pytest.mark.parametrize(("case", "plan"), list(trials()))
def test_every_case_matches_the_reference(case: ForwardCase, plan: ForwardPlan) -> None:
    check(make_forward_inputs(case, seed=3), plan)
