"""A cache that grows by a token a step asks for few kernels, and is rarely planned anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashtile.kernels.call import DecodeCall
from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device
from flashtile.problem import Problem

pytest.importorskip("triton")

from flashtile.kernels import combine, decode
from flashtile.kernels.launch import Launch
from flashtile.kernels.spec import Spec

CPU = torch.device("cpu")


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> dict[Any, int]:
    """How often each kernel is asked for; none is compiled, and launches do nothing."""
    asked: dict[Any, int] = {}

    def note(spec: Spec, device: torch.device) -> Launch:
        asked[spec.key()] = asked.get(spec.key(), 0) + 1
        return Launch(lambda *args: None, ())

    monkeypatch.setattr(decode, "launcher", note)
    monkeypatch.setattr(combine, "launcher", note)
    return asked


def step(device: Device, *, max_seqlen_k: int | None = None, **tensors: torch.Tensor) -> None:
    problem = Problem.decode(**tensors, max_seqlen_k=max_seqlen_k)
    plan = plan_decode(problem, device)
    call = DecodeCall(**tensors, page_table=None, cu_seqlens_q=None, sinks=None, alibi_slopes=None,
                      out=tensors["q"], lse=None, scale=1.0, softcap=0.0)  # fmt: skip
    decode.bind(problem, plan, CPU)(call)


@pytest.mark.parametrize("growth", ["cache", "hint"])
@pytest.mark.parametrize("first", [1, 900, 4000, 16_000, 32_000])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("heads", [(32, 8, 128), (64, 1, 128), (16, 16, 64)], ids=str)
def test_a_thousand_growing_lengths_ask_for_at_most_four_kernels(
    heads: tuple[int, int, int], batch: int, first: int, growth: str, asked_for: dict[Any, int]
) -> None:
    heads_q, heads_kv, dim = heads
    k, v = torch.empty(2, batch, first + 1000, heads_kv, dim, dtype=torch.bfloat16)
    q, lengths = torch.empty(batch, 1, heads_q, dim, dtype=torch.bfloat16), torch.empty(batch, dtype=torch.int32)
    device = Device.named("h200")
    # plans change at most every 64 keys
    for length in range(first, first + 1000, 16):
        if growth == "hint":
            step(device, q=q, k_cache=k, v_cache=v, seqlens_k=lengths, max_seqlen_k=length)
        else:
            step(device, q=q, k_cache=k[:, :length], v_cache=v[:, :length], seqlens_k=lengths)
    assert 1 <= len(asked_for) <= 4


def test_a_run_of_lengths_is_planned_anew_only_at_steps() -> None:
    k = torch.empty(1, 3000, 8, 128, dtype=torch.bfloat16)
    q, lengths = torch.empty(1, 1, 32, 128, dtype=torch.bfloat16), torch.empty(1, dtype=torch.int32)
    problems = {Problem.decode(q, k, k, lengths, max_seqlen_k=length) for length in range(1000, 2000)}
    assert len(problems) <= 10
