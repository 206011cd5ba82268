"""The public functions on the GPU: compiled callers, lse, out, dtypes, merge, warmup."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashtile
from flashtile import DecodePlan, UnsupportedError, reference
from flashtile.testing import poison
from flashtile.testing.cases import Case
from flashtile.testing.inputs import make_inputs
from flashtile.testing.tolerance import assert_close

CASE = Case("api", (600, 77, 1), 1, 32, 8, head_dim=128, dtype="bfloat16", page_size=16)


def args_of(device: torch.device, seed: int = 0) -> dict[str, Any]:
    return make_inputs(CASE, device, seed=seed).args


def test_a_compiled_caller_without_graph_breaks(device: torch.device) -> None:
    args = args_of(device)
    rest = {name: value for name, value in args.items() if name != "q"}

    def block(q: torch.Tensor) -> torch.Tensor:
        return flashtile.decode(q * 0.5, **rest) + 1.0

    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(compiled(args["q"]), block(args["q"]), rtol=1e-2, atol=1e-2)


def test_out_is_filled_and_returned(device: torch.device) -> None:
    args = args_of(device)
    out, _ = poison.outputs(args["q"], 128)
    assert flashtile.decode(**args, out=out) is out
    assert torch.equal(out, flashtile.decode(**args))


def test_float32_partials_are_finer_than_bfloat16(device: torch.device) -> None:
    args = args_of(device)
    expected, _ = reference.decode(**args, dtype=torch.float32)
    out = flashtile.decode(**args, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    assert_close(out, None, expected, None, dtype=torch.bfloat16)
    rounded = flashtile.decode(**args)
    assert (out - expected).norm() < (rounded.float() - expected).norm()


def test_lse_is_the_natural_logarithm_of_the_denominator(device: torch.device) -> None:
    args = args_of(device)
    out, lse = flashtile.decode_with_lse(**args)
    assert lse.shape == (3, 32, 1)
    assert lse.dtype == torch.float32
    assert_close(out, lse, *reference.decode(**args, dtype=torch.float32))


@pytest.mark.parametrize("num_splits", [1, 4])
def test_two_halves_merge_into_the_whole(num_splits: int, device: torch.device) -> None:
    k, v = (torch.randn(2, 1000, 8, 128, dtype=torch.bfloat16, device=device) for _ in range(2))
    q = torch.randn(2, 1, 32, 128, dtype=torch.bfloat16, device=device)
    whole = torch.tensor([1000, 613], dtype=torch.int32, device=device)
    first, second = whole.clamp(max=500), (whole - 500).clamp(min=0)
    kinds = {"num_splits": num_splits, "out_dtype": torch.float32}
    halves = [
        flashtile.decode_with_lse(q, k[:, :500], v[:, :500], first, **kinds),
        flashtile.decode_with_lse(q, k[:, 500:], v[:, 500:], second, **kinds),
    ]
    out, lse = flashtile.merge([half[0] for half in halves], [half[1] for half in halves])
    expected = reference.decode(q, k, v, whole, dtype=torch.float32)
    assert_close(out, lse, *expected, dtype=torch.bfloat16)


def test_an_impossible_plan_is_refused_with_reasons(device: torch.device) -> None:
    plan = DecodePlan(kernel="triton.decode", block_m=128, block_n=1024, num_stages=4)
    with pytest.raises(UnsupportedError) as refusal:
        flashtile.decode(**args_of(device), plan=plan)
    assert refusal.value.reasons


def test_a_plan_of_the_cpu_engine_is_refused_on_a_gpu(device: torch.device) -> None:
    with pytest.raises(UnsupportedError, match=r"cpu\.decode"):
        flashtile.decode(**args_of(device), plan=DecodePlan(kernel="cpu.decode", block_m=1))
