"""The Triton kernels in Triton's interpreter against the reference: every small case, over tiles and splits.

The cases take turns at the tiles: each case meets three, with one, three and seven splits, and any seven neighbours
meet every tile with every number of splits. bfloat16 cases run as float16: the interpreter's product of bfloat16 is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from flashtile import reference
from flashtile.planner.plans import DecodePlan
from flashtile.testing.bound import run_plan
from flashtile.testing.cases import SMALL_CASES, Case
from flashtile.testing.inputs import Inputs, make_inputs
from flashtile.testing.tolerance import assert_close

pytest.importorskip("triton")
# NumPy computes both branches of a select, log2(0) and 1/0 of rows without keys among them
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton 3.6 with NumPy 2
]

TILES = ((1, False), (8, True), (16, False), (16, True), (32, False), (64, False), (128, False))
SPLITS = (1, 3, 7)
BLOCK_NS = (16, 32, 64)


def plan_of(block_m: int = 16, swapped: bool = False, block_n: int = 16, num_splits: int = 1, **fields: Any) -> DecodePlan:
    return DecodePlan(kernel="triton.decode", block_m=block_m, swapped=swapped, block_n=block_n, num_splits=num_splits, **fields)


def check(inputs: Inputs, plan: DecodePlan, what: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = run_plan(inputs.args, plan)
    assert_close(out, lse, *reference.decode(**inputs.args), dtype=inputs.dtype, what=what or inputs.case.name)
    return out, lse


def trials() -> Iterator[Any]:
    # a call without sequences runs no kernel
    for turn, case in enumerate(case for case in SMALL_CASES if case.batch):
        if case.dtype == "bfloat16":
            case = replace(case, dtype="float16")
        for pick, num_splits in enumerate(SPLITS):
            block_m, swapped = TILES[(3 * turn + pick) % len(TILES)]
            block_n = BLOCK_NS[(turn + 2 * pick) % len(BLOCK_NS)]
            name = f"{case.name}-m{block_m}{'s' if swapped else ''}-n{block_n}-splits{num_splits}"
            yield pytest.param(case, plan_of(block_m, swapped, block_n, num_splits), id=name)


@pytest.mark.parametrize(("case", "plan"), list(trials()))
def test_every_case_matches_the_reference(case: Case, plan: DecodePlan) -> None:
    check(make_inputs(case, seed=3), plan)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(("block_m", "swapped"), TILES[:4])
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_of_any_sign(block_m: int, swapped: bool, num_splits: int, scale: float) -> None:
    plain = Case("scale", (40,), 2, num_heads_q=2, num_heads_kv=1, head_dim=16, scale=scale)
    for case in (plain, replace(plain, softcap=9.0), replace(plain, alibi=True)):
        check(make_inputs(case), plan_of(block_m, swapped, num_splits=num_splits))


@pytest.mark.parametrize("num_splits", [1, 3])
def test_float32_results_of_float16_inputs_are_partials(num_splits: int) -> None:
    inputs = make_inputs(Case("partials", (90, 4), 3, head_dim=32))
    out, lse = run_plan(inputs.args, plan_of(num_splits=num_splits), out_dtype=torch.float32)
    assert out.dtype == torch.float32
    expected, expected_lse = reference.decode(**inputs.args)
    assert_close(out, lse, expected, expected_lse, dtype=torch.float16)
    assert (out - expected).norm() < (out.half() - expected).norm()


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("ragged", [False, True])
def test_an_lse_that_is_not_wanted_is_not_written(num_splits: int, ragged: bool) -> None:
    inputs = make_inputs(Case("no lse", (50, 9), 2, head_dim=16, sinks=True, ragged_q=ragged, spare_rows=2 * ragged))
    out, lse = run_plan(inputs.args, plan_of(num_splits=num_splits), lse=False)
    assert_close(out, None, reference.decode(**inputs.args)[0], None)
    assert lse.isnan().all()


def test_splits_cut_at_key_positions_alone_give_the_same_bits_in_any_company() -> None:
    lengths = (120, 48, 17)
    plan = plan_of(16, num_splits=5, keys_per_split=48, min_keys_per_split=48)
    inputs = make_inputs(Case("company", lengths, num_heads_q=2, num_heads_kv=1, head_dim=32))
    out, lse = check(inputs, plan)
    for i, length in enumerate(lengths):
        alone = {name: inputs.args[name][i : i + 1] for name in ("q", "k_cache", "v_cache", "seqlens_k")}
        for num_splits in (7, -(-length // 48)):
            out_alone, lse_alone = run_plan(inputs.args | alone, plan.with_(num_splits=num_splits))
            assert torch.equal(out_alone[0], out[i])
            assert torch.equal(lse_alone[0], lse[i])


def test_keys_beyond_what_was_planned_for_are_read_all_the_same() -> None:
    plan = plan_of(16, num_splits=2, keys_per_split=16, min_keys_per_split=16)
    check(make_inputs(Case("longer", (150, 33), head_dim=16)), plan)


@pytest.mark.parametrize("sinks", [False, True])
def test_splits_without_keys_take_no_part(sinks: bool) -> None:
    case = Case("many", (1, 0), num_heads_q=1, num_heads_kv=1, head_dim=8, head_dim_v=40, sinks=sinks)
    check(make_inputs(case), plan_of(1, num_splits=70))


@pytest.mark.parametrize("block_d", [8, 16, 64])
def test_combine_takes_any_block_of_columns(block_d: int) -> None:
    check(make_inputs(Case("columns", (70, 2), 2, head_dim=8, head_dim_v=40)), plan_of(num_splits=3, combine_block_d=block_d))


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("sinks", [False, True])
def test_spare_rows_of_a_packed_q_are_empty(num_splits: int, sinks: bool) -> None:
    case = Case("spare", (40, 25), (2, 0), head_dim=16, ragged_q=True, spare_rows=9, sinks=sinks)
    for block_m, swapped in TILES[:3]:
        out, lse = check(make_inputs(case), plan_of(block_m, swapped, num_splits=num_splits))
        assert (out[2:] == 0).all()
        assert (lse[:, 2:] == float("-inf")).all()


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("starts", [(0, -5), (-4, 2), (0, 2**30), (5, 3), (-(2**31), 2**31 - 1)])
def test_starts_of_packed_queries_that_make_no_sense_write_nothing_outside(starts: tuple[int, int], num_splits: int) -> None:
    inputs = make_inputs(Case("starts", (40,), (4,), head_dim=16, ragged_q=True))
    inputs.args["cu_seqlens_q"] = torch.tensor(starts, dtype=torch.int32)
    guarded = torch.full((300, 4, 16), 7.0, dtype=torch.float16)
    written = guarded[100:104]
    run_plan(inputs.args, plan_of(num_splits=num_splits), out=written)
    assert (guarded[:100] == 7.0).all()
    assert (guarded[104:] == 7.0).all()


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(("page_size", "block_n"), [(16, 16), (64, 16), (16, 64), (5, 32)])
@pytest.mark.parametrize("seqlen_q", [1, 6])
def test_freed_pages_left_of_a_window_are_never_read(page_size: int, block_n: int, num_splits: int, seqlen_q: int) -> None:
    length, left = 200, 40
    case = Case("freed", (length, 50), seqlen_q, num_heads_q=2, num_heads_kv=1, head_dim=16, page_size=page_size, window=(left, 0))
    inputs = make_inputs(case)
    plan = plan_of(16, block_n=block_n, num_splits=num_splits)
    out, lse = check(inputs, plan)
    table = inputs.args["page_table"]
    free = (length - seqlen_q - left) // page_size
    for cache in ("k_cache", "v_cache"):
        inputs.args[cache][table[0, :free].long()] = float("nan")
    unowned = sorted(set(range(inputs.args["k_cache"].shape[0])) - set(table[table >= 0].tolist()))
    for filler in (unowned[0], 2**31 - 1):
        table[0, :free] = filler
        again, lse_again = run_plan(inputs.args, plan)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("bad", [2**31 - 1, -(2**31), -1])
def test_page_ids_outside_the_cache_hide_their_keys(bad: int, num_splits: int) -> None:
    for page_size, block_n in ((16, 16), (16, 64), (5, 32)):
        inputs = make_inputs(Case("hidden", (60, 40, 5), 2, num_heads_q=2, num_heads_kv=1, head_dim=16, page_size=page_size))
        inputs.args["page_table"][0, 1], inputs.args["page_table"][1, 0], inputs.args["page_table"][2] = bad, bad, bad
        out, _ = check(inputs, plan_of(16, block_n=block_n, num_splits=num_splits))
        assert (out[2] == 0).all()


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("page_size", [0, 5, 16])
def test_lengths_that_make_no_sense_are_clamped(page_size: int, num_splits: int) -> None:
    inputs = make_inputs(Case("clamped", (80,) * 4, head_dim=16, page_size=page_size, capacity=80))
    wild = torch.tensor([2**31 - 1, -(2**31), 81, -1], dtype=torch.int32)
    out, lse = run_plan(inputs.args | {"seqlens_k": wild}, plan_of(num_splits=num_splits))
    tame = torch.tensor([80, 0, 80, 0], dtype=torch.int32)
    assert_close(out, lse, *reference.decode(**inputs.args | {"seqlens_k": tame}))


@pytest.mark.parametrize("window", [(2**31 - 1, 0), (2**31 - 1, 2**31 - 1), (None, 2**31 - 1), (2**40, None), (3, 2**31 - 2)])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_windows_wider_than_any_cache(window: tuple[int | None, int | None], num_splits: int) -> None:
    case = Case("wide", (40, 3), 5, head_dim=16, causal=False, window=window)
    check(make_inputs(case), plan_of(num_splits=num_splits))


def test_queries_and_caches_are_read_by_their_strides() -> None:
    inputs = make_inputs(Case("strided", (40, 20), 2, head_dim=24, layout="HND", offset_elements=3, page_size=5))
    wide = torch.full((2, 3, 7, 24), float("nan"), dtype=torch.float16)
    inputs.args["q"] = wide[:, 1:, 2:6].copy_(inputs.args["q"])
    check(inputs, plan_of(num_splits=3))
    check(inputs, plan_of(1))
