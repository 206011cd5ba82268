"""Left padding of a cache: the same as a cache that begins behind it, and nothing that lies there reaches a result."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashtile
from flashtile import reference
from flashtile.errors import ArgumentError, DtypeError, ShapeError
from flashtile.planner.plans import DecodePlan
from flashtile.testing.bound import run_plan
from flashtile.testing.cases import Case
from flashtile.testing.inputs import hide_unseen, make_inputs
from flashtile.testing.tolerance import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")

CASES = (
    Case("contiguous", (130, 40, 65), leftpad_k=(70, 0, 64), seqlens_q=2, alibi=True),
    Case("pages_of_16", (130, 40, 65), leftpad_k=(70, 40, 17), page_size=16),
    Case("one_page_each", (90, 40), leftpad_k=(31, 5), page_size=96, window=(70, 0)),
)


def plans() -> list[DecodePlan]:
    shape: dict[str, Any] = {"kernel": "triton.decode", "block_m": 16, "block_n": 16}
    return [DecodePlan(**shape), DecodePlan(**shape, num_splits=3), DecodePlan(**shape, num_programs=5)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("plan", [*plans(), DecodePlan(kernel="cpu.decode", block_m=64)], ids=("one", "split", "line", "cpu"))
def test_padding_is_not_read(case: Case, plan: DecodePlan) -> None:
    if plan.kernel != "cpu.decode":
        pytest.importorskip("triton")
    hidden = hide_unseen(make_inputs(case, seed=2))
    out, lse = run_plan(hidden.args, plan)
    expected = reference.decode(**make_inputs(case, seed=2).args)
    assert_close(out, lse, *expected, dtype=hidden.dtype, what=case.name, cpu_engine=plan.kernel == "cpu.decode")


def test_padding_is_a_cache_that_begins_later() -> None:
    args = make_inputs(Case("shifted", (60, 33), leftpad_k=(20, 20), seqlens_q=3, alibi=True, window=(25, None), dtype="float32")).args
    later = {name: args[name][:, 20:] for name in ("k_cache", "v_cache")} | {"seqlens_k": args["seqlens_k"] - 20}
    out, lse = flashtile.decode_with_lse(**args)
    expected, expected_lse = flashtile.decode_with_lse(**{name: value for name, value in (args | later).items() if name != "leftpad_k"})
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_compilers_see_it() -> None:
    args = make_inputs(Case("compiled", (60, 33), leftpad_k=(20, 3), dtype="float32")).args
    compiled = torch.compile(flashtile.decode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**args), flashtile.decode(**args))


def test_calls_with_padding_and_without_are_told_apart() -> None:
    args = make_inputs(Case("kinds", (60, 33), leftpad_k=(20, 3), dtype="float32")).args
    without = {name: value for name, value in args.items() if name != "leftpad_k"}
    for _ in range(2):
        for given in (args, without):
            torch.testing.assert_close(flashtile.decode(**given).double(), reference.decode(**given)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("leftpad", "error"),
    [(torch.zeros(2), DtypeError), (torch.zeros(3, dtype=torch.int32), ShapeError), (torch.zeros(2, 1, dtype=torch.int32), ShapeError),
     (torch.zeros(2, dtype=torch.int32, device="meta"), ArgumentError), ([0, 0], DtypeError)],
)  # fmt: skip
def test_wrong_padding(leftpad: object, error: type[Exception]) -> None:
    args = make_inputs(Case("wrong", (60, 33))).args
    for _ in range(2):
        with pytest.raises(error, match="leftpad_k"):
            flashtile.decode(**args, leftpad_k=leftpad)


def test_checked_calls_say_what_is_wrong() -> None:
    args = make_inputs(Case("checked", (60, 33))).args
    with flashtile.checked(), pytest.raises(ArgumentError, match=r"leftpad_k\[1\]"):
        flashtile.decode(**args, leftpad_k=torch.tensor([0, 34], dtype=torch.int32))
