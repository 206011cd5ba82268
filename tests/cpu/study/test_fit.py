"""The cost model's constants: data that is read back, and a fit that finds what the times were made with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flashtile import ArgumentError
from flashtile.planner.constants import Constants, constants_of, read_constants
from flashtile.study.document import load
from flashtile.study.fit import errors_of, fit, halves, near_the_best, regrets_of
from flashtile.study.points import Point, Task
from flashtile.study.samples import Sample, of_study, of_sweep, of_tuning
from tests.cpu.study.synthetic import H200, TRUTH, write_study

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
POINTS = [Point(1, 512), Point(1, 32768), Point(8, 8192, 4, 4), Point(64, 2048), Point(1, 4096, 8), Point(8, 512, 1, 4)]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    path = tmp_path_factory.mktemp("study") / "study.json"
    return list(of_study(load(write_study(path, [Task("tiles", point) for point in POINTS]))))


def test_constants_are_the_devices_or_the_fallbacks() -> None:
    assert constants_of("NVIDIA H200") == constants_of("H200") == constants_of("NVIDIA Never Seen")
    assert Constants.of_flat(constants_of("H200").flat()) == constants_of("H200")


@pytest.mark.parametrize("text", ["", "{}", '{"constants": {"start_us": {}}}', '{"constants": {"unknown": 1}}'])
def test_constants_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="constants"):
        read_constants(text)


def test_the_constants_that_made_the_times_have_no_error(samples: list[Sample]) -> None:
    errors = errors_of(samples, TRUTH, H200)
    assert errors is not None
    assert errors.percentile_90 < 1e-3
    assert errors.problems == len(POINTS)
    assert max(regrets_of(samples, TRUTH, H200)) < 1e-3


def test_a_fit_finds_what_is_off(samples: list[Sample]) -> None:
    learned, held = halves(samples)
    assert {one.name for one in learned}.isdisjoint(one.name for one in held)
    before = errors_of(held, constants_of("H200"), H200)
    fitted = fit(learned, constants_of("H200"), H200, seconds=20.0)
    after = errors_of(held, fitted, H200)
    assert before is not None
    assert after is not None
    assert after.median < before.median / 2


def test_only_free_constants_move(samples: list[Sample]) -> None:
    start = constants_of("H200")
    fitted = fit(samples, start, H200, seconds=5.0, free=["matrix_iteration_us", "start_us"])
    moved = {name for name, number in fitted.flat().items() if number != start.flat()[name]}
    assert moved
    assert {name.partition(" ")[0] for name in moved} <= {"matrix_iteration_us", "start_us"}
    assert fit(samples, start, H200, seconds=5.0, free=[]) == start


def test_a_fit_is_no_worse_than_where_it_starts(samples: list[Sample]) -> None:
    errors = errors_of(samples, fit(samples, TRUTH, H200, seconds=5.0), H200)
    assert errors is not None
    assert errors.percentile_90 < 1e-2


def test_plans_near_the_best_are_by_problem(samples: list[Sample]) -> None:
    near = near_the_best(samples, 1.1)
    assert {one.name for one in near} == {one.name for one in samples}
    assert len(near) < len(samples)
    fastest = {name: min(one.us for one in samples if one.name == name) for name in {one.name for one in samples}}
    assert all((one in near) == (one.us <= 1.1 * fastest[one.name]) for one in samples)


def test_without_samples_there_is_no_error() -> None:
    assert errors_of([], TRUTH, H200) is None


def test_earlier_sweeps_are_samples() -> None:
    sweep = list(of_sweep(json.loads((RESULTS / "decode_sweep.json").read_text()), H200))
    tuning = list(of_tuning(json.loads((RESULTS / "hopper_tuning.json").read_text()), H200))
    assert len(sweep) > 1000
    assert {one.tile.kernel for one in tuning} == {"triton.decode", "gluon.decode_sm90"}
    errors = errors_of(sweep, constants_of("H200"), H200)
    assert errors is not None
    assert errors.median < 0.15, "the model that plans is one of this machine"


def test_the_command_keeps_constants_that_are_read_back(tmp_path: Path) -> None:
    import typer

    from benchmarks.fit import main

    study = write_study(tmp_path / "study.json", [Task("tiles", point) for point in POINTS[:3]])
    app = typer.Typer()
    app.command()(main)
    out = tmp_path / "H200.json"
    result = CliRunner().invoke(app, ["--study", str(study), "--only-study", "--seconds", "3", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "fitted constants, held out" in result.output
    assert read_constants(out.read_text()).flat().keys() == constants_of("H200").flat().keys()
