"""Programs that share the line of all key tiles, in Triton's interpreter against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from flashtile import UnsupportedError, reference
from flashtile.planner.plans import DecodePlan
from flashtile.testing.bound import run_plan
from flashtile.testing.cases import SMALL_CASES, Case
from flashtile.testing.inputs import make_inputs
from flashtile.testing.tolerance import assert_close

pytest.importorskip("triton")
# NumPy computes both branches of a select, log2(0) and 1/0 of rows without keys among them
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton 3.6 with NumPy 2
]


@pytest.fixture(autouse=True)
def few_programs_of_combine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time for each program, so one takes all rows of a unit."""
    monkeypatch.setattr("flashtile.kernels.combine._PROGRAMS_ON_LINE", 1)


TILES = ((16, False), (8, True), (1, False), (16, True), (32, False))
PROGRAMS = (3, 7, 1, 13)
BLOCK_NS = (16, 32, 64)


def plan_of(num_programs: int, block_m: int = 16, swapped: bool = False, block_n: int = 16, **fields: Any) -> DecodePlan:
    return DecodePlan("triton.decode", block_m, block_n, swapped, num_programs=num_programs, **{"combine_block_d": 128} | fields)


def check(case: Case, plan: DecodePlan) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = make_inputs(case, seed=3)
    out, lse = run_plan(inputs.args, plan)
    assert_close(out, lse, *reference.decode(**inputs.args), dtype=inputs.dtype, what=case.name)
    return out, lse


def trials() -> Iterator[Any]:
    for turn, case in enumerate(case for case in SMALL_CASES if case.batch):
        if case.dtype == "bfloat16":
            case = replace(case, dtype="float16")
        block_m, swapped = TILES[turn % len(TILES)]
        block_n = BLOCK_NS[turn % len(BLOCK_NS)]
        num_programs = PROGRAMS[turn % len(PROGRAMS)]
        name = f"{case.name}-m{block_m}{'s' if swapped else ''}-n{block_n}-programs{num_programs}"
        yield pytest.param(case, plan_of(num_programs, block_m, swapped, block_n), id=name)


@pytest.mark.parametrize(("case", "plan"), list(trials()))
def test_every_case_matches_the_reference(case: Case, plan: DecodePlan) -> None:
    check(case, plan)


UNLIKE = Case("unlike", (3, 230, 0, 17, 40), num_heads_q=6, num_heads_kv=2, head_dim=16)


@pytest.mark.parametrize(("page_size", "num_programs"), [(0, 1), (0, 2), (0, 7), (0, 60), (1, 7), (16, 3), (64, 7)])
def test_one_long_sequence_among_short_ones(page_size: int, num_programs: int) -> None:
    check(replace(UNLIKE, page_size=page_size), plan_of(num_programs, 8, True, 64 if page_size == 1 else 16))


@pytest.mark.parametrize("num_programs", [1, 5, 16])
def test_several_row_blocks_with_sinks_and_a_window(num_programs: int) -> None:
    case = Case(
        "blocks", (70, 0, 33, 50), (9, 4, 0, 20), num_heads_q=4, num_heads_kv=2, head_dim=16, head_dim_v=40, ragged_q=True,
        spare_rows=7, window=(25, 0), softcap=8.0, sinks=True, logit_scale=4.0, dtype="float32",
    )  # fmt: skip
    out, lse = check(case, plan_of(num_programs, 8, True, combine_block_d=16))
    assert (out[33:] == 0).all()
    assert (lse[:, 33:] == float("-inf")).all()


def test_the_line_of_a_batch_without_queries_leaves_unowned_rows_empty() -> None:
    case = Case("nobody", (70, 5), (0, 0), head_dim=16, ragged_q=True, spare_rows=5, sinks=True)
    out, lse = check(case, plan_of(3))
    assert out.shape[0] == 5
    assert (out == 0).all()
    assert (lse == float("-inf")).all()


def test_a_batch_larger_than_one_vector_of_lengths() -> None:
    lengths = tuple(50 + i % 9 for i in range(520))
    queries = tuple(int(i % 70 == 30) for i in range(520))
    check(Case("large batch", lengths, queries, num_heads_q=1, num_heads_kv=1, head_dim=8, ragged_q=True), plan_of(4, 1))


@pytest.mark.parametrize("num_programs", [3, 22])
def test_an_lse_that_is_not_wanted_is_not_written(num_programs: int) -> None:
    inputs = make_inputs(replace(UNLIKE, sinks=True))
    out, lse = run_plan(inputs.args, plan_of(num_programs), lse=False)
    assert_close(out, None, reference.decode(**inputs.args)[0], None)
    assert lse.isnan().all()


@pytest.mark.parametrize("most", [12, 40, 10_000])
def test_combine_may_have_several_programs_a_unit(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr("flashtile.kernels.combine._PROGRAMS_ON_LINE", most)
    check(Case("rows", (150, 40), 5, num_heads_q=2, num_heads_kv=1, head_dim=8), plan_of(3, combine_block_d=8))


def test_lengths_that_make_no_sense_are_clamped() -> None:
    inputs = make_inputs(Case("clamped", (80,) * 4, head_dim=16, page_size=16, capacity=80))
    wild = torch.tensor([2**31 - 1, -(2**31), 81, -1], dtype=torch.int32)
    out, lse = run_plan(inputs.args | {"seqlens_k": wild}, plan_of(6))
    tame = torch.tensor([80, 0, 80, 0], dtype=torch.int32)
    assert_close(out, lse, *reference.decode(**inputs.args | {"seqlens_k": tame}))


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("starts", [(0, -5), (-4, 2), (0, 2**30), (5, 3), (-(2**31), 2**31 - 1)])
def test_starts_of_packed_queries_that_make_no_sense_write_nothing_outside(starts: tuple[int, int]) -> None:
    inputs = make_inputs(Case("starts", (40,), (4,), head_dim=16, ragged_q=True))
    inputs.args["cu_seqlens_q"] = torch.tensor(starts, dtype=torch.int32)
    guarded = torch.full((300, 4, 16), 7.0, dtype=torch.float16)
    run_plan(inputs.args, plan_of(3), out=guarded[100:104])
    assert (guarded[:100] == 7.0).all()
    assert (guarded[104:] == 7.0).all()


@pytest.mark.parametrize("page_size", [16, 5])
def test_freed_pages_left_of_a_window_are_never_read(page_size: int) -> None:
    length, left, seqlen_q = 200, 40, 6
    case = Case("freed", (length, 50), seqlen_q, num_heads_q=2, num_heads_kv=1, head_dim=16, page_size=page_size, window=(left, 0))
    out, lse = check(case, plan_of(5))
    inputs = make_inputs(case, seed=3)
    free = (length - seqlen_q - left) // page_size
    inputs.args["page_table"][0, :free] = 2**31 - 1
    again, lse_again = run_plan(inputs.args, plan_of(5))
    assert torch.equal(again, out)
    assert torch.equal(lse_again, lse)


def test_a_line_too_long_to_count_is_refused_and_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner counts by max_seqlen_k, which is a hint; what the device counts by is the capacity."""
    inputs = make_inputs(Case("long", (40, 20), 1, 4, 2, head_dim=16, dtype="float16", capacity=64), seed=1)
    out = torch.full_like(inputs.args["q"], 7.0)
    monkeypatch.setattr("flashtile.kernels.run._MAX_LINE", 12)
    with pytest.raises(UnsupportedError, match="num_splits"):
        run_plan(inputs.args, plan_of(3), out=out)
    assert (out == 7.0).all()
    monkeypatch.setattr("flashtile.kernels.run._MAX_LINE", 20)
    run_plan(inputs.args, plan_of(3), out=out)
    assert not (out == 7.0).any()
