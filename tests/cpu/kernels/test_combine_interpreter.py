"""Combine in Triton's interpreter: partial results made by hand, against their sum in float64."""

from __future__ import annotations

import pytest
import torch

from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem
from flashtile.testing import poison
from flashtile.testing.tolerance import assert_close

pytest.importorskip("triton")
from flashtile.kernels.combine import bind_combine

pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton 3.6 with NumPy 2
]

INF = float("inf")
TOKENS, HEADS, DIM = 5, 2, 40


def made_up_partials(num_splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """out (tokens, heads, splits, dim) and lse (tokens, heads, splits), float32; where lse is -inf, out is NaN."""
    rng = torch.Generator().manual_seed(num_splits)
    lse = 30 * torch.randn(TOKENS, HEADS, num_splits, generator=rng)
    lse[torch.rand(lse.shape, generator=rng) < 0.4] = -INF
    lse[0, 0] = -INF
    lse[1, 0, :-1] = -INF
    lse[1, 0, -1] = 400.0
    lse[2, 0, 1:] = -INF
    out = torch.randn(*lse.shape, DIM, generator=rng)
    out[lse == -INF] = float("nan")
    return out, lse


def combined(
    out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None, *, ragged: bool = False, **plan: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, heads, dim) and (heads, tokens); ragged: the last token belongs to no sequence."""
    num_splits = lse.shape[-1]
    problem = Problem(
        batch=1, seqlen_q=TOKENS, num_heads_q=HEADS, head_dim=DIM, dtype_q="float32", lse=True, sinks=sinks is not None, ragged_q=ragged
    )
    combine = bind_combine(problem, DecodePlan("triton.decode", block_m=1, num_splits=num_splits, **plan), torch.device("cpu"))
    whole, whole_lse = poison.outputs(torch.empty(TOKENS, HEADS, DIM), DIM)
    buffer = torch.cat([out.flatten(), lse.flatten()])
    starts = torch.tensor([0, TOKENS - 1], dtype=torch.int32) if ragged else None
    lengths = (torch.zeros(1, dtype=torch.int32), starts, 0, TOKENS, TOKENS, None)
    views = ((buffer, out.numel(), num_splits), (whole, 0, *whole.stride()[:2]), (whole_lse, 0, *whole_lse.stride()), lengths, sinks)
    combine(0, TOKENS * HEADS, *views)
    return whole, whole_lse


def expected(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    logits = lse.double()
    if sinks is not None:
        logits = torch.cat([logits, sinks.double()[None, :, None].expand(TOKENS, HEADS, 1)], -1)
    total = torch.logsumexp(logits, -1)
    weights = torch.exp(lse.double() - total.clamp(min=-1e30)[..., None])
    return (weights[..., None] * out.double().nan_to_num()).sum(-2), total.T


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    ("num_splits", "warps"), [(2, 1), (3, 1), (63, 1), (64, 1), (65, 1), (70, 1), (70, 4), (256, 4), (257, 4), (1000, 4)]
)
def test_any_number_of_splits(num_splits: int, warps: int, sinks: bool) -> None:
    out, lse = made_up_partials(num_splits)
    sink = torch.tensor([0.5, -700.0]) if sinks else None
    assert_close(*combined(out, lse, sink, combine_warps=warps), *expected(out, lse, sink))


@pytest.mark.parametrize("block_d", [8, 16, 64])
def test_any_block_of_columns(block_d: int) -> None:
    out, lse = made_up_partials(5)
    assert_close(*combined(out, lse, None, combine_block_d=block_d), *expected(out, lse, None))


@pytest.mark.parametrize("sinks", [False, True])
def test_a_row_of_no_sequence_is_empty_whatever_its_partials_hold(sinks: bool) -> None:
    out, lse = made_up_partials(6)
    out[-1], lse[-1] = float("nan"), float("nan")
    sink = torch.tensor([0.5, 3.0]) if sinks else None
    whole, whole_lse = combined(out, lse, sink, ragged=True)
    assert (whole[-1] == 0).all()
    assert (whole_lse[:, -1] == -INF).all()
    expected_out, expected_lse = expected(out, lse, sink)
    assert_close(whole[:-1], whole_lse[:, :-1], expected_out[:-1], expected_lse[:, :-1])
