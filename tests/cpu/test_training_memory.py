"""Forward and backward together hold memory in proportion to the lengths, never a row of scores for each query."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashtile
from flashtile.testing.memory import peak_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS, DIM = 2, 16
SHORT, LONG = 2048, 6144


def training_peak(seqlen: int, features: dict[str, Any], *, through_lse: bool = False) -> int:
    rng = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, seqlen, HEADS, DIM, generator=rng).requires_grad_() for _ in range(3)]
    dout, dlse = torch.randn(1, seqlen, HEADS, DIM), torch.randn(1, HEADS, seqlen)

    def train() -> tuple[torch.Tensor, ...]:
        out, lse = flashtile.attention_with_lse(*leaves, **features)
        return torch.autograd.grad([out, lse][: 1 + through_lse], leaves, [dout, dlse][: 1 + through_lse])

    train()  # what the first call of a kind leaves behind is no part of it
    return peak_bytes(train, torch.device("cpu"))


@pytest.mark.parametrize("through_lse", [False, True])
@pytest.mark.parametrize("features", [{"causal": True}, {"window": (99, 7)}, {"causal": True, "softcap": 9.0}], ids=str)
def test_the_peak_is_linear_in_the_length(features: dict[str, Any], through_lse: bool) -> None:
    short, long = (training_peak(seqlen, features, through_lse=through_lse) for seqlen in (SHORT, LONG))
    assert long <= 1.1 * (LONG / SHORT) * short
    one_tensor = LONG * HEADS * DIM * 4
    assert long <= 15 * one_tensor
    assert 15 * one_tensor < HEADS * LONG * LONG * 4 / 8  # an eighth of all scores


def test_the_peak_of_stored_scores_is_not() -> None:
    """The measure itself, on attention that stores its scores."""

    def train(seqlen: int) -> int:
        q = torch.randn(1, HEADS, seqlen, DIM, requires_grad=True)
        return peak_bytes(lambda: torch.autograd.grad(torch.softmax(q @ q.mT, dim=-1).matmul(q).sum(), q), torch.device("cpu"))

    assert train(1536) > 6 * train(512)
