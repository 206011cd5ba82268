"""Powers of two by a polynomial, in Triton's interpreter, against float64."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from flashtile.kernels.tile.exponential import exp2_by_polynomial

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning")

SMALLEST = 2.0**-126  # float32's smallest number of full precision
DEGREES = [(3, 2.0**-13.2), (4, 2.0**-18.3)]


@triton.jit
def power(x, out, DEGREE: tl.constexpr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out + at, exp2_by_polynomial(tl.load(x + at), DEGREE))


def powers(x: torch.Tensor, degree: int) -> torch.Tensor:
    count = 1 << (len(x) - 1).bit_length()
    padded = torch.zeros(count, dtype=torch.float32)
    padded[: len(x)] = x
    out = torch.full_like(padded, math.nan)
    power[(1,)](padded, out, degree, count)
    return out[: len(x)]


@pytest.mark.parametrize(("degree", "error"), DEGREES)
def test_the_relative_error_is_as_stated(degree: int, error: float) -> None:
    x = torch.cat([torch.linspace(-126, 9, 2**16), torch.linspace(-1, 1, 2**15), -torch.logspace(-9, 0, 2**15, base=10.0)])
    exact = torch.exp2(x.double())
    worst = ((powers(x, degree).double() - exact).abs() / exact).max().item()
    assert error / 1.2 < worst <= error


@pytest.mark.parametrize("degree", [3, 4])
def test_whole_numbers_are_exact(degree: int) -> None:
    x = torch.arange(-126, 128, dtype=torch.float32)
    assert torch.equal(powers(x, degree), torch.exp2(x))


@pytest.mark.parametrize("degree", [3, 4])
def test_hidden_keys_and_those_far_below_the_maximum_give_nothing(degree: int) -> None:
    x = torch.tensor([-127.0, -128.0, -1000.0, -3e38, -math.inf])
    assert torch.equal(powers(x, degree), torch.zeros(5))
    between = powers(torch.linspace(-127, -126, 1000), degree)
    assert ((between >= 0) & (between <= SMALLEST)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("degree", [3, 4])
def test_nan_is_not_finite_as_a_probability(degree: int, dtype: torch.dtype) -> None:
    assert not powers(torch.tensor([math.nan]), degree).to(dtype).isfinite().any()
