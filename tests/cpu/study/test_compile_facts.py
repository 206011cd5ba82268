"""The compile facts of a study without a GPU: what is compiled first, and one kernel for real."""

from __future__ import annotations

import pytest

from flashtile.planner.catalog import GLUON_SM90, TRITON
from flashtile.study.predict import compile_points, compiled
from flashtile.testing.matrix_points import DEVICES


def test_every_query_tile_of_every_architecture_is_compiled() -> None:
    points = compile_points()
    assert points[0].arch == "sm_90"
    assert points[0].head_dims == (128, 128)
    assert {(p.kernel, p.arch) for p in points} == {(TRITON, arch) for arch in DEVICES} | {(GLUON_SM90, "sm_90")}
    assert {p.tile for p in points if p.arch == "sm_80"} >= {(1, False), (8, True), (16, False), (32, False), (64, False), (128, False)}
    assert len(set(points)) == len(points)


@pytest.mark.compiles
def test_facts_are_the_compilers() -> None:
    (point,) = [p for p in compile_points() if (p.kernel, p.arch, p.tile, p.head_dims) == (TRITON, "sm_80", (64, False), (64, 64))]
    (facts,) = compiled([point], 1)
    assert facts["mma"] == "mma.sync m16n8k16"
    assert facts["spilled_bytes"] == 0
    assert 0 < facts["registers"] <= 255
    assert 0 < facts["shared_bytes"] <= 163 * 1024
