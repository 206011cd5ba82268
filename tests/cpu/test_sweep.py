"""The sweep over explicit plans: what a spec stands for, and a dry run of the script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import axes, grids, sweep
from benchmarks.measure import planned
from benchmarks.sets import InputSets
from flashtile import DecodePlan, Device
from flashtile.planner.choose import plan_decode
from tests.cpu.dry_runs import dry_run

H200 = Device.named("h200")


def plans(spec: str | dict[str, Any], name: str = "8x2048 32/8") -> list[DecodePlan]:
    (entry,) = grids.named(name)
    problem = entry.problem()
    return sweep.variants(entry, [axes.Variants.of(spec)], problem, H200, plan_decode(problem, H200))


def test_a_spec_is_the_product_of_its_values() -> None:
    found = plans("kernel=triton.decode block_m=16,64 block_n=32,64 num_warps=4 num_stages=2,3 num_splits=1,4")
    assert len(found) == 16
    assert {(plan.block_m, plan.block_n, plan.num_stages, plan.num_splits) for plan in found} == {
        (m, n, stages, splits) for m in (16, 64) for n in (32, 64) for stages in (2, 3) for splits in (1, 4)
    }
    assert {plan.source for plan in found} == {"explicit"}
    assert found == plans(
        {"kernel": "triton.decode", "block_m": [16, 64], "block_n": [32, 64], "num_warps": 4, "num_stages": [2, 3], "num_splits": [1, 4]}
    )


def test_counts_in_waves_follow_the_device() -> None:
    # 8 sequences x 8 key heads on 132 SMs
    assert [plan.num_splits for plan in plans("block_m=16 block_n=64 num_splits=1w,2w")] == [2, 4]
    (programs,) = plans("block_m=16 num_programs=1w")
    assert (programs.num_programs, programs.num_splits) == (132, 3)
    (tiles,) = plans("block_m=16 block_n=64 num_splits=tiles")
    assert tiles.num_splits == 32


def test_swapped_is_what_the_planner_takes() -> None:
    assert [plan.swapped for plan in plans("kernel=triton.decode block_m=8,16 block_n=64 num_warps=8 num_stages=3 num_splits=1")] == [
        True,
        False,
    ]


def test_a_spec_is_confined_to_its_problems() -> None:
    spec = "block_m=16 num_splits=1 problems=2048 32/8"
    assert len(plans(spec)) == 1
    assert plans(spec, "1x512 32/8") == []


@pytest.mark.parametrize("spec", ["block=16", "block_m=16 four", "num_splits=many"])
def test_a_bad_spec_says_so(spec: str) -> None:
    with pytest.raises(axes.BadSpec):
        plans(spec)


@pytest.mark.parametrize(
    "name", ["1x777 16/1", "16x4096 32/8 q8", "3x100 8/2 q2 page 16", "3x100 8/2 page 16 e4m3", "ragged conversation page 16"]
)
def test_an_entry_knows_its_problem_without_tensors(name: str) -> None:
    (entry,) = grids.named(name)
    small = grids.shrunk(entry)
    assert small.problem() == planned(InputSets(small, torch.device("cpu"), 1))[0]


def test_an_unknown_problem_is_refused() -> None:
    with pytest.raises(ValueError, match="no entry"):
        grids.named("8x2048")


def test_a_dry_run_times_what_runs_and_names_what_does_not(tmp_path: Path) -> None:
    specs = tmp_path / "specs.json"
    specs.write_text(
        json.dumps(["kernel=cpu.decode block_m=8,16 num_splits=1", {"kernel": "triton.decode", "block_m": 16, "num_splits": 1}])
    )
    (row,) = dry_run(sweep.main, tmp_path, "--problems", "1x512 32/8", "--plans", str(specs))["sweep"]["entries"]
    assert sorted(timed["plan"]["block_m"] for timed in row["timed"]) == [8, 16]
    assert all(timed["us"] > 0 and timed["error"] < 5e-3 for timed in row["timed"])
    assert [timed["us"] for timed in row["timed"]] == sorted(timed["us"] for timed in row["timed"])
    (refusal,) = row["refused"]
    assert refusal["who"]["kernel"] == "triton.decode"
    assert "2 plans timed, 1 refused, 0 of them WRONG" in sweep.table(row, 9)[0]
