"""Quantised caches on a GPU: every code, small cases and many rows by both kernels, scales of each granularity, calls that come again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import flashtile
from flashtile import DecodePlan, Problem, UnsupportedError, reference
from flashtile.kernels.call import DecodeCall
from flashtile.planner.catalog import kernel_named
from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device
from flashtile.testing.cases import QUANTISED_CASES, Case
from flashtile.testing.inputs import make_inputs
from flashtile.testing.tolerance import assert_close
from flashtile.testing.variants import HOPPER, ONE, PORTABLE, PROGRAMS, SHARES, Shape, Share, explicit_plan, fitting_plan, kernels_choice

PORTABLE_TILES = ((1, False), (8, True), (16, False), (32, False), (64, False))
# what is planned for quantised keys, and the corners: few keys, few warps, a deep ring
SHAPES = {
    8: (Shape(8, 128, 8, 3), Shape(8, 64, 4, 6), Shape(8, 128, 4, 2), Shape(8, 256, 8, 3), Shape(8, 32, 2, 2)),
    16: (Shape(16, 64, 4, 3), Shape(16, 128, 8, 2), Shape(16, 32, 1, 2), Shape(16, 128, 4, 3)),
}
STORED = (torch.float8_e4m3fn, torch.int8)
QUERIES = (torch.float16, torch.bfloat16)
LARGE = Case(
    "large",
    (700, 33, 1500, 4097, 0),
    1,
    32,
    8,
    head_dim=128,
    dtype="bfloat16",
    dtype_kv="float8_e4m3fn",
    k_scales="head",
    v_scales="sequence",
)
FACTS = {"num_heads_q": 8, "num_heads_kv": 2, "head_dim": 128, "dtype_kv": "float8_e4m3fn", "k_scales": "head", "v_scales": "sequence"}
# 24, 32 and 64 packed rows, and more; sequences with fewer keys than queries, and with none
ROWS = [
    Case("24_rows", (700, 33, 2, 0), 6, **FACTS),
    Case("24_rows_of_a_group_of_3", (300, 129), 8, **FACTS | {"num_heads_q": 6}, dtype="bfloat16"),
    Case("32_rows", (1500, 64, 5), 8, **FACTS, dtype="bfloat16"),
    Case("32_rows_int8", (1500, 64, 5), 8, **FACTS | {"dtype_kv": "int8"}),
    Case("32_rows_alone", (2000,), 8, **FACTS, dtype="bfloat16"),
    Case("32_rows_not_causal", (130, 257), 8, **FACTS, causal=False),
    Case("32_rows_pages_of_16", (700, 33, 500), 8, **FACTS, page_size=16, dtype="bfloat16"),
    Case("32_rows_pages_of_1", (300, 33), 8, **FACTS | {"dtype_kv": "int8"}, page_size=1),
    Case("32_rows_missing_pages", (300, 200), 8, **FACTS, page_size=16, missing_pages=2),
    Case("64_rows", (1100, 40, 16), 16, **FACTS, dtype="bfloat16"),
    Case("64_rows_alone", (1100,), 16, **FACTS),
    Case("64_rows_window", (900, 70), 16, **FACTS, window=(300, None), dtype="bfloat16"),
    Case("64_rows_pages_of_128", (900, 130), 16, **FACTS, page_size=128, dtype="bfloat16"),
    Case("64_rows_shaped", (400, 90), 16, **FACTS, softcap=20.0, alibi=True, sinks=True, logit_scale=4.0),
    Case("64_rows_leftpad", (400, 90, 30), 16, **FACTS, leftpad_k=(150, 90, 3), dtype="bfloat16"),
    Case("64_rows_head_dim_64", (700, 33), 16, **FACTS | {"head_dim": 64, "dtype_kv": "int8"}, dtype="bfloat16"),
    Case("ragged_up_to_64_rows", (900, 64, 300, 7), (16, 1, 8, 0), ragged_q=True, spare_rows=3, **FACTS, dtype="bfloat16"),
    Case("ragged_pages_of_16", (900, 64, 300), (6, 16, 1), ragged_q=True, page_size=16, **FACTS | {"dtype_kv": "int8"}),
    Case("ragged_chunk_among_tokens", (600, 200, 64, 64), (150, 1, 1, 2), ragged_q=True, sinks=True, **FACTS, dtype="bfloat16"),
    Case("136_rows", (500, 40), 34, **FACTS, dtype="bfloat16"),
]  # fmt: skip


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


KERNELS = [PORTABLE, pytest.param(HOPPER, marks=pytest.mark.skipif(not on_hopper(), reason="needs a GPU of sm_90"))]


def run(kernel: str, args: dict[str, Any], **others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse by the planner's choice of one kernel's plans."""
    problem = Problem.decode(**args, **others, lse=True)
    return flashtile.decode_with_lse(**args, **others, plan=kernels_choice(problem, Device.of(args["q"]), kernel))


def in_codes(stored: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.arange(256, device=device).to(torch.uint8).view(stored)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", QUERIES)
@pytest.mark.parametrize("stored", STORED)
def test_every_code_of_values_is_exact(stored: torch.dtype, dtype: torch.dtype, kernel: str, device: torch.device) -> None:
    """A lone key has a weight of 1: out is its value, NaN where that is one."""
    codes = in_codes(stored, device).view(2, 1, 1, 128)
    args = {
        "q": torch.zeros(2, 1, 1, 128, dtype=dtype, device=device),
        "k_cache": torch.zeros(2, 1, 1, 128, device=device).to(stored),
        "v_cache": codes,
        "seqlens_k": torch.ones(2, dtype=torch.int32, device=device),
    }
    out, _ = run(kernel, args, out_dtype=torch.float32)
    torch.testing.assert_close(out, codes.float(), rtol=0, atol=0, equal_nan=True)
    out, _ = run(kernel, args | {"v_scale": torch.tensor([-0.5], device=device)}, out_dtype=torch.float32)
    torch.testing.assert_close(out, -0.5 * codes.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", QUERIES)
@pytest.mark.parametrize("stored", STORED)
def test_every_code_of_keys_is_exact(stored: torch.dtype, dtype: torch.dtype, kernel: str, device: torch.device) -> None:
    """The lse of a lone key is its score, here that of one dim."""
    codes = in_codes(stored, device)
    numbers = ~codes.float().isnan()
    for dim in (0, 1, 2, 3, 66, 127):
        q = torch.zeros(256, 1, 1, 128, dtype=dtype, device=device)
        q[..., dim] = 1.0
        keys = torch.zeros(256, 1, 1, 128, device=device).to(stored)
        keys.view(torch.uint8)[:, 0, 0, dim] = codes.view(torch.uint8)
        args = {"q": q, "k_cache": keys, "v_cache": torch.zeros_like(keys), "scale": 1.0}
        _, lse = run(kernel, args | {"seqlens_k": torch.ones(256, dtype=torch.int32, device=device)})
        torch.testing.assert_close(lse[numbers, 0, 0], codes.float()[numbers], rtol=1e-6, atol=0)


def portable_trials() -> Iterator[Any]:
    for turn, case in enumerate(QUANTISED_CASES):
        tile = PORTABLE_TILES[turn % len(PORTABLE_TILES)]
        yield pytest.param(case, tile, (Share((1, 3)[turn % 2]), *PROGRAMS[:2]), id=f"{case.name}-m{tile[0]}")


def hopper_trials() -> Iterator[Any]:
    for turn, case in enumerate(QUANTISED_CASES):
        for pick, shapes in enumerate(SHAPES.values()):
            shape, shares = shapes[(turn + pick) % len(shapes)], SHARES[(turn + 2 * pick) % len(SHARES)]
            yield pytest.param(case, shape, shares, id=f"{case.name}-{shape}-{'-'.join(map(str, shares))}")


@pytest.mark.parametrize(("case", "tile", "shares"), list(portable_trials()))
def test_the_portable_kernel_matches_the_reference(
    case: Case, tile: tuple[int, bool], shares: tuple[Share, ...], check_plans: Callable[..., None]
) -> None:
    def plan_of(problem: Problem, on: Device, share: Share) -> DecodePlan:
        return fitting_plan(problem, on, PORTABLE, tile, share)

    try:
        check_plans(case, plan_of, shares, seed=3)
    except UnsupportedError as error:
        if 1 < tile[0] < 64 and max(case.head_dim, case.head_dim_v) <= 128:
            raise
        pytest.skip(str(error))


@pytest.mark.skipif(not on_hopper(), reason="needs a GPU of sm_90")
@pytest.mark.parametrize(("case", "shape", "shares"), list(hopper_trials()))
def test_hoppers_kernel_matches_the_reference(
    case: Case, shape: Shape, shares: tuple[Share, ...], device: torch.device, check_plans: Callable[..., None]
) -> None:
    problem = Problem.decode(**make_inputs(case, device).args, lse=True)
    if reasons := kernel_named(HOPPER).reasons_against(problem, Device.of(device)):
        pytest.skip("; ".join(reasons))
    try:
        check_plans(case, lambda problem, on, share: explicit_plan(problem, on, HOPPER, shape, share), shares, seed=3)
    except UnsupportedError as error:
        if shape.block_n <= 64 and shape.num_warps == 4 and max(case.head_dim, case.head_dim_v) <= 128:
            raise
        pytest.skip(str(error))


def first_that_fits(problem: Problem, on: Device, shapes: tuple[Shape, ...], share: Share) -> DecodePlan:
    """The plan of the first shape that the planner does not refuse."""
    for shape in shapes[:-1]:
        with contextlib.suppress(UnsupportedError):
            return explicit_plan(problem, on, HOPPER, shape, share)
    return explicit_plan(problem, on, HOPPER, shapes[-1], share)


@pytest.mark.skipif(not on_hopper(), reason="needs a GPU of sm_90")
@pytest.mark.parametrize("shares", SHARES, ids=("unsplit", "splits", "programs"))
@pytest.mark.parametrize("turn", range(len(ROWS)), ids=[case.name for case in ROWS])
def test_several_blocks_of_rows_match_the_reference(turn: int, shares: tuple[Share, ...], check_plans: Callable[..., None]) -> None:
    """By a tile of 16 rows and one of 8, in shapes that take turns; each block of a sequence reads the same keys."""
    for shapes in SHAPES.values():
        at = turn % len(shapes)
        in_turn = (*shapes[at:], *shapes[:at])
        check_plans(ROWS[turn], lambda problem, on, share, shapes=in_turn: first_that_fits(problem, on, shapes, share), shares, seed=9)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
def test_each_kernels_choice_for_many_rows_matches_the_reference(case: Case, kernel: str, check_plans: Callable[..., None]) -> None:
    check_plans(case, lambda problem, on, share: kernels_choice(problem, on, kernel), (ONE,), seed=10)


@pytest.mark.skipif(not on_hopper(), reason="needs a GPU of sm_90")
@pytest.mark.parametrize(("seqlen_q", "kernel"), [(6, HOPPER), (8, HOPPER), (16, HOPPER), (17, PORTABLE)])
def test_many_rows_of_a_large_batch_are_the_same_bits_each_time(seqlen_q: int, kernel: str, device: torch.device) -> None:
    """As planned: up to 64 rows by Hopper's kernel, whose blocks of one sequence run side by side."""
    for lengths in (LARGE.seqlens_k, (4097, 2000), (5000,)):
        inputs = make_inputs(replace(LARGE, seqlens_k=lengths, seqlens_q=seqlen_q), device, seed=11)
        assert plan_decode(Problem.decode(**inputs.args, lse=True), Device.of(device)).kernel == kernel
        out, lse = flashtile.decode_with_lse(**inputs.args)
        assert_close(out, lse, *reference.decode(**inputs.args, dtype=torch.float32), what=f"{lengths}")
        for _ in range(5):
            again, lse_again = flashtile.decode_with_lse(**inputs.args)
            assert torch.equal(again, out) and torch.equal(lse_again, lse)


@pytest.mark.skipif(not on_hopper(), reason="needs a GPU of sm_90")
def test_hoppers_kernel_takes_many_small_cases(device: torch.device) -> None:
    problems = [Problem.decode(**make_inputs(case, device).args) for case in QUANTISED_CASES]
    assert sum(not kernel_named(HOPPER).reasons_against(problem, Device.of(device)) for problem in problems) >= 50


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("page_size", [0, 1, 16, 64, 256])
@pytest.mark.parametrize("stored", ["float8_e4m3fn", "int8"])
def test_full_size(stored: str, page_size: int, kernel: str, device: torch.device) -> None:
    for dtype, granularity, seqlen_q in (("bfloat16", "head", 1), ("float16", "sequence", 4), ("bfloat16", "tensor", 16)):
        case = replace(LARGE, dtype=dtype, dtype_kv=stored, page_size=page_size, k_scales=granularity, seqlens_q=seqlen_q)
        inputs = make_inputs(case, device, seed=5)
        out, lse = run(kernel, inputs.args)
        expected = reference.decode(**inputs.args, dtype=torch.float32)
        assert_close(out, lse, *expected, what=f"{dtype} {granularity}")
        for _ in range(5):
            again, lse_again = run(kernel, inputs.args)
            assert torch.equal(again, out) and torch.equal(lse_again, lse)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("exponent", [-130, -100, 100])
def test_scales_that_q_makes_up_for(exponent: int, kernel: str, device: torch.device) -> None:
    """What leaves float16's range, on the side of q, of keys or of values, comes back by the scales."""
    inputs = make_inputs(LARGE, device, seed=6)
    expected, expected_lse = reference.decode(**inputs.args, dtype=torch.float32)
    q = inputs.args["q"].sign() if exponent < -110 else inputs.args["q"]  # bfloat16's subnormals have few bits
    if exponent < -110:
        expected, expected_lse = reference.decode(**inputs.args | {"q": q}, dtype=torch.float32)
    k_scale = (inputs.args["k_scale"].double() * 2.0**-exponent).float()
    if exponent < -110:  # beyond float32's range: by the scale of scores
        k_scale, scale = inputs.args["k_scale"] * 2.0**100, 128**-0.5 * 2.0 ** (-exponent - 100)
    else:
        scale = 128**-0.5
    out, lse = run(kernel, inputs.args | {"q": q * 2.0**exponent, "k_scale": k_scale, "scale": scale})
    assert_close(out, lse, expected, expected_lse, what=f"2**{exponent}")


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_graph_replays_with_other_scales_and_codes(kernel: str, device: torch.device) -> None:
    first, second = make_inputs(LARGE, device, seed=7), make_inputs(LARGE, device, seed=8)
    plan = kernels_choice(Problem.decode(**first.args), Device.of(device), kernel)
    flashtile.decode(**first.args, plan=plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashtile.decode(**first.args, plan=plan)
    for name in ("q", "k_scale", "v_scale"):
        first.args[name].copy_(second.args[name])
    for name in ("k_cache", "v_cache"):
        first.args[name].view(torch.uint8).copy_(second.args[name].view(torch.uint8))
    graph.replay()
    assert_close(out, None, reference.decode(**second.args, dtype=torch.float32)[0], None)


def test_calls_that_come_again_with_scales_that_lie_elsewhere(device: torch.device) -> None:
    for seed in range(6):
        inputs = make_inputs(LARGE, device, seed=seed)
        out, lse = flashtile.decode_with_lse(**inputs.args)
        assert_close(out, lse, *reference.decode(**inputs.args, dtype=torch.float32), what=f"call {seed}")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("lengths", [(4097,), (2048,) * 16], ids=("two_kernels", "one_kernel"))
def test_calls_over_codes_are_repeated_without_the_longer_way(
    lengths: tuple[int, ...], kernel: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the fourth on, whatever lies where; with the bits of the longer way."""
    replay = pytest.importorskip("flashtile.kernels.replay", reason="needs Triton")
    replays = replay.cuda_replays(DecodeCall)
    assert replays is not None, "the C module was not built"
    case = replace(LARGE, seqlens_k=lengths, scale=0.125 + 2.0**-20)  # of a kind that no other test has recorded
    first, second = (make_inputs(case, device, seed=seed).args for seed in (12, 13))
    plan = kernels_choice(Problem.decode(**first), Device.of(device), kernel)
    expected = flashtile.decode(**second, plan=plan).clone()
    before = len(replays)
    for _ in range(replay.RECORDED_CALL):
        flashtile.decode(**first, plan=plan)
    assert len(replays) == before + 1

    def longer_way(*args: Any) -> None:
        raise AssertionError("the call was not repeated")

    monkeypatch.setattr("flashtile.ops.decode.decode_key", longer_way)
    assert torch.equal(flashtile.decode(**second, plan=plan), expected)
