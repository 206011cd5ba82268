"""Tuned tables: made from a study, kept in the user's cache directory, taken by the planner, passed over where they cannot be used."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flashtile import Device
from flashtile.cli.app import app
from flashtile.planner import table, user_tables
from flashtile.planner.choose import plan_as_shipped, plan_decode
from flashtile.planner.device import Device as AnyDevice
from flashtile.planner.user_tables import TunedTableWarning
from flashtile.study.document import load
from flashtile.study.points import Point, Task
from flashtile.study.tuned import table_of, tuned_rows
from tests.cpu.study.synthetic import H200, TRUTH, write_study

GPU = replace(H200, name="NVIDIA H200")  # as its driver calls it
SLOW_GLUON = TRUTH._replace(start_us={"triton.decode": 0.5, "gluon.decode_sm90": 9.0})
POINTS = [Point(1, 4096), Point(1, 32768, 4, 4), Point(8, 8192)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's cache directory of the test's own."""
    monkeypatch.setattr(user_tables, "folder", lambda: tmp_path / "cache")
    forget()
    yield tmp_path / "cache"
    forget()


def forget() -> None:
    user_tables.user_table.cache_clear()
    plan_decode.cache_clear()


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study of a GPU on which the portable kernel is the faster one, whatever the rule thinks."""
    tasks = [Task(stage, point) for point in POINTS for stage in ("tiles", "shapes")]
    return write_study(tmp_path / "study.json", tasks, SLOW_GLUON, GPU)


def tuned(study: Path, *more: str) -> Any:
    result = CliRunner().invoke(app, ["tune", "--study", str(study), *more])
    assert result.exit_code == 0, result.output
    return result


def test_the_planner_takes_what_measured_faster(study: Path, cache: Path) -> None:
    before = [plan_decode(point.problem, GPU) for point in POINTS]
    assert {plan.kernel for plan in before} == {"gluon.decode_sm90"}
    printed = json.loads(tuned(study, "--json").stdout)
    assert Path(printed["file"]) == cache / "nvidia-h200.json"
    for point in POINTS:
        plan = plan_decode(point.problem, GPU)
        rows = [row for entry in load(study).entries if entry.point == point for row in entry.rows]
        assert (plan.kernel, plan.source) == ("triton.decode", "tuned")
        ours = next(row for row in rows if row.is_plan({n: getattr(plan, n) for n in ("kernel", *row._fields[1:8])}))
        assert ours.us <= 1.01 * min(row.us for row in rows)
        assert plan_as_shipped(point.problem, GPU).kernel == "gluon.decode_sm90", "what a study calls the planner's choice stays"


def test_another_gpu_and_other_problems_stay_with_the_rule(study: Path) -> None:
    tuned(study)
    assert plan_decode(POINTS[0].problem, H200).source == "rule", "tables are of the GPU that was measured, not of its model"
    assert plan_decode(POINTS[0].problem.with_(head_dim=64, head_dim_v=64), GPU).source == "rule"
    assert plan_decode(POINTS[0].problem.with_(page_size=16), GPU).source == "rule", "measured without pages"


def test_where_nothing_gains_the_rule_stays(tmp_path: Path) -> None:
    document = load(write_study(tmp_path / "fair.json", [Task("tiles", POINTS[0])], TRUTH, GPU))
    gains = [row.ratio for row in tuned_rows(document)]
    assert all(ratio < 0.98 for ratio in gains)
    level = tuple(replace(entry, rows=tuple(row._replace(us=10.0) for row in entry.rows)) for entry in document.entries)
    assert tuned_rows(replace(document, entries=level)) == []


def test_a_grid_that_trusts_lengths_to_be_alike_is_in_no_table(tmp_path: Path) -> None:
    """However fast it was: the study's sequences are of one length, a caller's may be one long among many short."""
    several = Point(8, 8192)
    document = load(write_study(tmp_path / "even.json", [Task("tiles", several)], TRUTH, GPU))
    assert any(row.num_programs == 0 for entry in document.entries for row in entry.rows)
    grids_win = tuple(
        replace(entry, rows=tuple(row._replace(us=row.us if row.num_programs else 0.5) for row in entry.rows)) for entry in document.entries
    )
    assert all("num_splits" not in row.tile for row in tuned_rows(replace(document, entries=grids_win)))


def test_explain_says_where_a_plan_came_from(study: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned(study)
    monkeypatch.setattr("flashtile.cli.shape.named_device", lambda name: (GPU, "those of this machine's GPU"))
    result = CliRunner().invoke(app, ["explain", "decode", "--seqlen-k", "4096", "--heads", "64", "--kv-heads", "8"])
    assert result.exit_code == 0, result.output
    assert "chosen by a tuned table" in result.stdout
    assert str(cache / "nvidia-h200.json") in result.stdout


def rows_of(cache: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((cache / "nvidia-h200.json").read_text())
    return data


BROKEN: dict[str, tuple[Any, str]] = {
    "no JSON": (lambda data: "{", "no JSON"),
    "another file": (lambda data: json.dumps({"rows": []}), "no flashtile tuned table"),
    "an older version": (lambda data: json.dumps(data | {"version": 0}), "version 0"),
    "another GPU": (lambda data: json.dumps(data | {"device": "NVIDIA A100"}), "NVIDIA A100"),
    "no rows": (lambda data: json.dumps(data | {"rows": None}), "no rows"),
    "a short key": (lambda data: json.dumps(data | {"rows": [data["rows"][0] | {"key": ["bfloat16", 128]}]}), "row 0 has no key"),
    "a field too few": (lambda data: json.dumps(data | {"rows": [data["rows"][0] | {"tile": {"kernel": "triton.decode"}}]}), "row 0"),
    "an unknown kernel": (
        lambda data: json.dumps(data | {"rows": [data["rows"][0] | {"tile": data["rows"][0]["tile"] | {"kernel": "cuda.decode"}}]}),
        "cuda.decode",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_table_that_cannot_be_used_is_passed_over_with_one_warning(study: Path, cache: Path, what: str) -> None:
    tuned(study)
    broken, why = BROKEN[what]
    (cache / "nvidia-h200.json").write_text(broken(rows_of(cache)))
    forget()
    with pytest.warns(TunedTableWarning, match="passed over") as caught:
        plans = [plan_decode(point.problem, GPU) for point in POINTS]
    assert len(caught) == 1
    assert why in str(caught[0].message)
    assert {plan.source for plan in plans} == {"rule"}


def test_a_tile_that_does_not_fit_is_passed_over(study: Path, cache: Path) -> None:
    tuned(study)
    data = rows_of(cache)
    huge = {"kernel": "gluon.decode_sm90", "block_m": 64, "swapped": False, "block_n": 256, "num_warps": 4, "num_stages": 8}
    (cache / "nvidia-h200.json").write_text(json.dumps(data | {"rows": [row | {"tile": huge} for row in data["rows"]]}))
    forget()
    assert plan_decode(POINTS[0].problem, GPU).source == "rule"


def test_without_a_cache_directory_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_tables, "folder", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan_decode(POINTS[0].problem, GPU).source == "rule"


def test_without_a_gpu_tune_says_what_it_wants() -> None:
    result = CliRunner().invoke(app, ["tune", "--device", "cpu"])
    assert result.exit_code == 2
    assert "expected a GPU" in result.stderr


def test_predicted_times_make_no_table(tmp_path: Path) -> None:
    data = json.loads(write_study(tmp_path / "study.json", [Task("tiles", POINTS[0])]).read_text())
    (tmp_path / "study.json").write_text(json.dumps(data | {"basis": "predicted"}))
    result = CliRunner().invoke(app, ["tune", "--study", str(tmp_path / "study.json")])
    assert result.exit_code == 2
    assert "measured" in result.stderr


def test_a_table_can_be_shipped(study: Path) -> None:
    document = load(study)
    written = json.dumps(table_of(document, tuned_rows(document)))
    shipped = table.read_table(written)
    assert shipped == user_tables.read(written, GPU.name, GPU.arch)
    assert table.key_of(POINTS[0].problem) in shipped
    assert isinstance(document.figures, AnyDevice)
    assert Device.named("h200").arch == document.figures.arch
