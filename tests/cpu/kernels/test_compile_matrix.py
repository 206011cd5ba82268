"""Kernels compiled for GPUs that need not be here, and what the planner promised of them (flashtile/testing/matrix.py)."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest

from flashtile.planner.catalog import TRITON
from flashtile.planner.explain import explain
from flashtile.planner.plans import DecodePlan
from flashtile.testing.matrix import COLUMNS, Outcome, claims, compile_all, row_of, store
from flashtile.testing.matrix_points import AXES, Point, cover, full
from flashtile.testing.pairwise import pairwise

SEED = 0  # of the pairwise cover; any other must pass as well
JOBS = 2
MMA_ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_pairwise_cover_covers_every_pair(seed: int) -> None:
    axes = {"a": (1, 2, 3), "b": ("x", "y"), "c": (False, True), "d": tuple(range(5))}
    rows = pairwise(axes, seed)
    for first, second in combinations(axes, 2):
        assert {(row[first], row[second]) for row in rows} == {(i, j) for i in axes[first] for j in axes[second]}
    assert len(rows) < 30
    assert rows == pairwise(axes, seed)


def test_the_cover_of_the_matrix_is_small_and_the_full_matrix_affordable() -> None:
    assert len(cover(SEED)) <= 120
    assert len(cover(SEED, 150)) == 150
    assert 1000 <= len(full()) <= 1500
    assert set(cover(SEED)) <= set(full())


@pytest.mark.parametrize(
    ("planned", "compiled", "same"),
    [
        ("mma.sync m16n8k16", "mma.sync m16n8k16", True),
        ("mma.sync m16n8k16", "mma.sync m16n8k8", False),
        ("wgmma m64n64k16", "wgmma m64n128k16", True),
        ("wgmma m64n64k16", "mma.sync m16n8k16", False),
        ("tcgen05.mma m64n64k16", "tcgen05.mma", True),
        ("mfma m32n32k8", "v_mfma_f32_32x32x8_bf16_1k", True),
        ("mfma m32n32k8", "v_mfma_f32_16x16x16_bf16_1k", False),
        ("FMA on the vector units", "", True),
        ("the vector units", "mma.sync m16n8k16", False),
    ],
)
def test_names_of_matrix_instructions_are_compared(planned: str, compiled: str, same: bool) -> None:
    assert claims(planned, compiled) is same


def point(arch: str, block_m: int, *, swapped: bool = False, **changes: object) -> Point:
    values = {
        "kernel": TRITON, "head_dims": (128, 128), "dtype": "bfloat16", "page_size": 0, "features": "causal", "batch": 1, "splits": 1,
        "group": 4, "aligned": True,
    }  # fmt: skip
    return Point(arch=arch, tile=(block_m, swapped), **(values | changes))


@pytest.mark.slow
@pytest.mark.compiles
def test_plans_of_a_pairwise_cover_keep_their_promises() -> None:
    """No plan spills or exceeds shared memory, estimates bound the compiler's, and the matrix instruction is the one named."""
    outcomes = list(compile_all(cover(SEED), JOBS))
    broken = {str(outcome.point): outcome.broken_promises() for outcome in outcomes if outcome.broken_promises()}
    assert not broken
    assert sum(outcome.decode is not None for outcome in outcomes) > len(outcomes) // 2
    assert any(outcome.combine is not None for outcome in outcomes)
    for outcome in outcomes:
        if outcome.plan is not None:
            explained = explain(outcome.point.problem, outcome.point.device, outcome.plan)
            assert claims(explained.mma, outcome.decode.mma), outcome.point


@pytest.mark.slow
@pytest.mark.compiles
def test_warps_and_instructions_follow_the_rows() -> None:
    """Warps without rows of their own split the keys; operands swapped, keys take the instruction's large side."""
    few = [point(arch, block_m) for arch in MMA_ARCHS for block_m in (16, 32)]
    swapped = [point(arch, 8, swapped=True) for arch in MMA_ARCHS]
    many = [point(arch, block_m) for arch in ("sm_90", "sm_100") for block_m in (64, 128)]
    none = [point("sm_75", 8, swapped=True, head_dims=(64, 64)), point("sm_90", 1)]
    compiled = {outcome.point: outcome for outcome in compile_all([*few, *swapped, *many, *none], JOBS)}

    def facts(at: Point) -> Outcome:
        assert not compiled[at].broken_promises()
        return compiled[at]

    for at in few:
        assert facts(at).decode.mma == "mma.sync m16n8k16", at
        assert facts(at).plan.num_warps > 1
        assert facts(at).decode.warps_per_cta == (1, facts(at).plan.num_warps), at
    for at in swapped:
        assert facts(at).decode.mma == "mma.sync m16n8k16", at
        assert facts(at).decode.warps_per_cta == (facts(at).plan.num_warps, 1), at
    for at in many:
        kind = "wgmma m64n" if at.arch == "sm_90" else "tcgen05.mma"
        assert facts(at).decode.mma.startswith(kind), at
    for at in none:
        assert facts(at).decode.mma == "", at


def test_an_infeasible_point_has_reasons_with_numbers() -> None:
    at = point("sm_75", 128, head_dims=(256, 256), dtype="float32")
    reasons = at.plan()
    assert not isinstance(reasons, DecodePlan)
    assert reasons
    assert all(any(letter.isdigit() for letter in reason) for reason in reasons)
    assert Outcome(at, reasons=tuple(reasons)).broken_promises() == []
    assert Outcome(at).broken_promises() == ["no plan, and no reason"]


def test_a_failing_compiler_is_a_broken_promise() -> None:
    at = point("sm_90", 16)
    plan = at.plan()
    assert isinstance(plan, DecodePlan)
    assert "out of luck" in Outcome(at, plan, failure="out of luck").broken_promises()[0]


def test_the_result_is_one_row_a_point(tmp_path: Path) -> None:
    outcomes = [Outcome(at, reasons=("why not",)) for at in cover(SEED)]
    path = tmp_path / "matrix.json"
    store(outcomes, path)
    document = json.loads(path.read_text())
    assert tuple(document["columns"]) == COLUMNS
    assert document["points"] == [json.loads(json.dumps(row_of(outcome))) for outcome in outcomes]
    assert all(len(row) == len(COLUMNS) == len(AXES) + 12 for row in document["points"])
