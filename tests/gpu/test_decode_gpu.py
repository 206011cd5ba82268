"""Every small case on the GPU, over tiles and splits, on NaN-poisoned outputs and workspace.

The cases take turns at the tiles: each case meets four (two in float16, two in bfloat16), each tile meets every kind of
case, and the number of kernels to compile stays near 250.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import flashtile
from flashtile import DecodePlan, UnsupportedError, reference
from flashtile.planner.device import Device
from flashtile.problem import Problem
from flashtile.testing import poison
from flashtile.testing.cases import SMALL_CASES, Case
from flashtile.testing.inputs import Inputs, make_inputs
from flashtile.testing.tolerance import assert_close
from flashtile.testing.variants import PORTABLE, PORTABLE_TILES, PROGRAMS, Shape, Share, explicit_plan, fitting_plan

SPLITS = (1, 3, 7)


def trials() -> Iterator[Any]:
    for turn, case in enumerate(SMALL_CASES):
        dtypes = ("float32",) if case.dtype == "float32" else ("float16", "bfloat16")
        for d, dtype in enumerate(dtypes):
            for pick in range(2):
                tile = PORTABLE_TILES[(2 * turn + 3 * d + 4 * pick) % len(PORTABLE_TILES)]
                splits = SPLITS[(turn + d + pick) % len(SPLITS)]
                name = f"m{tile[0]}{'s' if tile[1] else ''}"
                yield pytest.param(replace(case, dtype=dtype), *tile, splits, id=f"{case.name}-{dtype}-{name}-splits{splits}")


def shared_trials() -> Iterator[Any]:
    """Each case with one tile: its key tiles walked by 1, 3, 7 and 132 programs."""
    for turn, case in enumerate(SMALL_CASES):
        tile = PORTABLE_TILES[turn % len(PORTABLE_TILES)]
        yield pytest.param(case, tile, id=f"{case.name}-m{tile[0]}{'s' if tile[1] else ''}")


def check(inputs: Inputs, host: Inputs, **forced: Any) -> None:
    """Runs a call whose outputs and workspace start as NaN, and compares with float64 on the host."""
    out, _ = poison.outputs(inputs.args["q"], inputs.case.head_dim_v)
    with poison.allocations():
        got, lse = flashtile.decode_with_lse(**inputs.args, out=out, **forced)
    assert got is out
    expected = reference.decode(**host.args)
    assert_close(out.cpu(), lse.cpu(), *expected, dtype=inputs.dtype, what=inputs.case.name)


def may_be_refused(case: Case, block_m: int) -> bool:
    """Where registers or shared memory do not hold the tile; 16-bit tiles of 64 rows and less always fit."""
    return case.dtype == "float32" or block_m == 128 or max(case.head_dim, case.head_dim_v) > 128


@pytest.mark.parametrize(("case", "block_m", "swapped", "num_splits"), list(trials()))
def test_every_tile_matches_the_reference(case: Case, block_m: int, swapped: bool, num_splits: int, device: torch.device) -> None:
    inputs, host = make_inputs(case, device, seed=3), make_inputs(case, "cpu", seed=3)
    problem = Problem.decode(**inputs.args, lse=True)
    try:
        plan = fitting_plan(problem, Device.of(device), PORTABLE, (block_m, swapped), Share(num_splits))
    except UnsupportedError as error:
        if not may_be_refused(case, block_m):
            raise
        pytest.skip(str(error))
    assert (plan.block_m, plan.swapped) == (block_m, swapped)
    check(inputs, host, plan=plan)


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_the_planners_choice_matches_the_reference(case: Case, device: torch.device) -> None:
    check(make_inputs(case, device, seed=4), make_inputs(case, "cpu", seed=4))


@pytest.mark.parametrize(
    ("batch", "seqlen_k", "heads"),
    [(1, 777, (32, 8)), (8, 5001, (32, 8)), (1, 777, (16, 1)), (8, 5001, (16, 1)), (3, 8191, (64, 8)), (2, 1, (32, 32))],
)
@pytest.mark.parametrize("page_size", [0, 16])
def test_odd_lengths_at_full_size(
    batch: int, seqlen_k: int, heads: tuple[int, int], page_size: int, device: torch.device, library: Any
) -> None:
    lengths = tuple(max(1, seqlen_k - 13 * i) for i in range(batch))
    case = Case("odd", lengths, 1, *heads, head_dim=128, dtype="bfloat16", page_size=page_size)
    inputs = make_inputs(case, device, seed=5)
    out, lse = library.decode_with_lse(**inputs.args)
    assert_close(out, lse, *reference.decode(**inputs.args, dtype=torch.float32), what=case.name)


@pytest.mark.parametrize("seqlen_q", [2, 4, 8, 16, 64])
def test_speculative_queries_at_full_size(seqlen_q: int, device: torch.device, library: Any) -> None:
    case = Case("speculative", (4096, 1003), seqlen_q, 32, 8, head_dim=128, dtype="bfloat16")
    inputs = make_inputs(case, device, seed=6)
    out, lse = library.decode_with_lse(**inputs.args)
    assert_close(out, lse, *reference.decode(**inputs.args, dtype=torch.float32), what=case.name)


@pytest.mark.parametrize("num_splits", [2, 13, 132, 300])
def test_many_splits_match_one(num_splits: int, device: torch.device, library: Any) -> None:
    inputs = make_inputs(Case("many", (20_000, 33, 4000), 1, 16, 1, head_dim=128, dtype="bfloat16"), device, seed=7)
    one, lse_one = library.decode_with_lse(**inputs.args, num_splits=1)
    out, lse = library.decode_with_lse(**inputs.args, num_splits=num_splits)
    assert_close(out, lse, one, lse_one, what=f"{num_splits} splits")


def test_twenty_repeats_are_bit_identical(device: torch.device, library: Any) -> None:
    inputs = make_inputs(Case("repeats", (5001, 777, 64), 1, 32, 8, head_dim=128, dtype="bfloat16", page_size=16), device, seed=8)
    first, first_lse = library.decode_with_lse(**inputs.args, num_splits=9)
    for _ in range(20):
        out, lse = library.decode_with_lse(**inputs.args, num_splits=9)
        assert torch.equal(out, first)
        assert torch.equal(lse, first_lse)


@pytest.mark.parametrize(("case", "tile"), list(shared_trials()))
def test_programs_that_share_all_keys_match_the_reference(case: Case, tile: tuple[int, bool], check_plans: Callable[..., None]) -> None:
    def plan_of(problem: Problem, on: Device, share: Share) -> DecodePlan:
        return fitting_plan(problem, on, PORTABLE, tile, share)

    try:
        check_plans(case, plan_of, PROGRAMS, seed=3)
    except UnsupportedError as error:
        if not may_be_refused(case, tile[0]):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("num_programs", [1, 7, 132, 500])
@pytest.mark.parametrize("page_size", [0, 16])
def test_programs_share_a_ragged_batch(num_programs: int, page_size: int, device: torch.device) -> None:
    lengths = (512,) * 10 + (20_000,) + (0, 1, 65, 512, 777)
    inputs = make_inputs(Case("shared", lengths, 1, 16, 2, head_dim=128, dtype="bfloat16", page_size=page_size), device, seed=9)
    problem = Problem.decode(**inputs.args, lse=True)
    plan = explicit_plan(problem, Device.of(device), PORTABLE, Shape(16, 64, 4, 3), Share(1, num_programs))
    first, first_lse = flashtile.decode_with_lse(**inputs.args, plan=plan)
    assert_close(first, first_lse, *reference.decode(**inputs.args, dtype=torch.float32), what=f"{num_programs} programs")
    for _ in range(20):
        out, lse = flashtile.decode_with_lse(**inputs.args, plan=plan)
        assert torch.equal(out, first)
        assert torch.equal(lse, first_lse)
