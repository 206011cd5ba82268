"""Quantised caches in Triton's interpreter: what each code means, bfloat16's rows in float16, every small case against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashtile import reference
from flashtile.planner.plans import DecodePlan
from flashtile.testing.bound import run_plan
from flashtile.testing.cases import QUANTISED_CASES, Case
from flashtile.testing.inputs import Inputs, make_inputs
from flashtile.testing.tolerance import assert_close, relative_l2

pytest.importorskip("triton")
import triton
import triton.language as tl

from flashtile.kernels.tile.quantised import as_half, rows_as_half

pytestmark = [
    # NumPy computes both branches of a select, log2(0) and 1/0 of rows without keys among them
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton 3.6 with NumPy 2
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

TILES = ((1, False), (8, True), (16, False), (16, True), (32, False), (64, False))
CODES = torch.arange(256, dtype=torch.int32).to(torch.uint8)


@triton.jit
def convert(codes, out, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out + n, as_half(tl.load(codes + n)))


@triton.jit
def move(q, half, factor, ROWS: tl.constexpr, DIM: tl.constexpr):
    rows, d = tl.arange(0, ROWS), tl.arange(0, DIM)
    at = rows[:, None] * DIM + d[None, :]
    moved, by = rows_as_half(tl.load(q + at))
    tl.store(half + at, moved)
    tl.store(factor + rows, by)


def plan_of(block_m: int = 16, swapped: bool = False, block_n: int = 16, num_splits: int = 1, **fields: Any) -> DecodePlan:
    return DecodePlan(kernel="triton.decode", block_m=block_m, swapped=swapped, block_n=block_n, num_splits=num_splits, **fields)


def check(inputs: Inputs, plan: DecodePlan) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = run_plan(inputs.args, plan)
    assert_close(out, lse, *reference.decode(**inputs.args), dtype=inputs.dtype, what=inputs.case.name)
    return out, lse


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_every_code_is_its_value(dtype: torch.dtype) -> None:
    stored = CODES.view(dtype)
    out = torch.full((256,), 7.0, dtype=torch.float16)
    convert[(1,)](CODES if dtype == torch.float8_e4m3fn else stored, out, 256)
    torch.testing.assert_close(out, stored.to(torch.float16), rtol=0, atol=0, equal_nan=True)
    assert int(out.isnan().sum()) == (2 if dtype == torch.float8_e4m3fn else 0)
    number = ~out.isnan()
    assert torch.equal(out.signbit()[number], stored.to(torch.float32).signbit()[number])


@pytest.mark.parametrize("exponent", [-113, -112, -40, 0, 40, 112, 127])
def test_rows_move_into_float16s_range_and_back_without_loss(exponent: int) -> None:
    rng = torch.Generator().manual_seed(exponent + 200)
    # the interpreter reads bfloat16's subnormals wrongly
    size = 2.0 ** torch.randint(max(-16, -124 - exponent), 1, (8, 64), generator=rng)
    q = ((1 - 0.5 * torch.rand(8, 64, generator=rng)) * size * 2.0**exponent).to(torch.bfloat16)
    q[0], q[1, 3], q[2, :2] = 0.0, -q[1, 4], torch.tensor([float("inf"), float("nan")])
    half, factor = torch.empty(8, 64, dtype=torch.float16), torch.empty(8)
    move[(1,)](q, half, factor, 8, 64)
    mantissas = factor.frexp().mantissa
    assert (mantissas == 0.5).all(), "not a power of two"
    torch.testing.assert_close(half.double() * factor.double()[:, None], q.double(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("turn", "case"), list(enumerate(QUANTISED_CASES)), ids=lambda value: getattr(value, "name", ""))
def test_every_case_matches_the_reference(turn: int, case: Case) -> None:
    if not case.batch:
        pytest.skip("a call without sequences runs no kernel")
    block_m, swapped = TILES[turn % len(TILES)]
    check(make_inputs(case, seed=3), plan_of(block_m, swapped, (16, 32)[turn % 2], (1, 3)[turn // 2 % 2]))


def plain(**changes: Any) -> Case:
    values: dict[str, Any] = {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 32, "dtype": "bfloat16", "dtype_kv": "float8_e4m3fn"}
    return Case("plain", (70, 20), 2, **(values | {"k_scales": "head", "v_scales": "sequence"} | changes))


@pytest.mark.parametrize(("block_m", "swapped"), TILES[:4])
@pytest.mark.parametrize("exponent", [-100, 100])
def test_scales_that_q_makes_up_for(exponent: int, block_m: int, swapped: bool) -> None:
    """What leaves float16's range, on the side of q, of keys or of values, comes back by the scales."""
    inputs = make_inputs(plain())
    expected, expected_lse = reference.decode(**inputs.args)
    args = inputs.args | {"q": inputs.args["q"] * 2.0**exponent, "k_scale": inputs.args["k_scale"] * 2.0**-exponent}
    out, lse = run_plan(args, plan_of(block_m, swapped, num_splits=3))
    assert_close(out, lse, expected, expected_lse, dtype=torch.bfloat16)
    args |= {"v_scale": inputs.args["v_scale"] * 2.0**exponent}
    out, lse = run_plan(args, plan_of(block_m, swapped), out_dtype=torch.float32)
    assert_close(out * 2.0**-exponent, lse, expected, expected_lse, dtype=torch.bfloat16)


@pytest.mark.parametrize("scale", [0.0, -0.05])
@pytest.mark.parametrize("k_scale", [0.0, -0.02])
def test_scales_of_any_sign(k_scale: float, scale: float) -> None:
    for case in (plain(scale=scale), plain(scale=scale, softcap=9.0), plain(scale=scale, dtype="float16", dtype_kv="int8", alibi=True)):
        inputs = make_inputs(case)
        inputs.args["k_scale"] = torch.full((2,), k_scale)
        for block_m, swapped in TILES[:3]:
            check(inputs, plan_of(block_m, swapped))


@pytest.mark.parametrize("given", ["k_scale", "v_scale"])
def test_one_scale_may_be_left_out(given: str) -> None:
    inputs = make_inputs(plain(k_scales="tensor", v_scales="tensor"))
    inputs.args["k_scale" if given == "v_scale" else "v_scale"] = None
    inputs.args["scale"] = 0.01  # stored keys are large
    check(inputs, plan_of(num_splits=3))


def test_scales_are_read_by_their_strides() -> None:
    inputs = make_inputs(plain())
    inputs.args["k_scale"] = torch.tensor([[0.1, 9.0, 0.05, 9.0]])[0, ::2]
    inputs.args["v_scale"] = torch.tensor([[0.1], [0.3]]).expand(2, 2)
    check(inputs, plan_of(num_splits=3))


def test_a_nan_that_a_query_sees_is_seen() -> None:
    inputs = make_inputs(plain())
    inputs.args["k_cache"][0, 5, 0, 3] = float("nan")
    inputs.args["v_cache"][1, 2, 1, 9] = float("nan")
    out, _ = run_plan(inputs.args, plan_of())
    assert out[0, :, :2].isnan().all()
    assert out[0, :, 2:].isfinite().all()
    assert out[1, :, 2:, 9].isnan().all()
    out[1, :, 2:, 9] = 0.0
    assert out[1].isfinite().all()


def test_weights_are_rounded_to_float16_beside_bfloat16_queries() -> None:
    """Nearer to the reference than products in q's own dtype would be."""
    inputs = make_inputs(plain(head_dim=64))
    out, _ = run_plan(inputs.args, plan_of(), out_dtype=torch.float32)
    assert relative_l2(out, reference.decode(**inputs.args)[0]) < 4e-4
