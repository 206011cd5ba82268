"""A study on the GPU at hand: plans of every kernel are right, timed, and turned into a table that the planner takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flashtile import Device
from flashtile.cli.app import app
from flashtile.planner import user_tables
from flashtile.planner.choose import plan_decode
from flashtile.study.candidates import plans_of
from flashtile.study.document import load
from flashtile.study.measure import measured
from flashtile.study.points import FP8, Point, Task


@pytest.mark.parametrize("point", [Point(1, 512), Point(8, 512, 4, 4), Point(1, 512, dtype_kv=FP8)], ids=lambda point: point.name)
def test_every_query_tile_is_right_and_timed(point: Point) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    task = Task("tiles", point)
    plans = plans_of(task, Device.of(device))
    entry = measured(task, plans, device)
    assert entry["refused"] == []
    assert len(entry["timed"]) == len(plans)
    assert all(0.5 < row[8] < 1e4 for row in entry["timed"])


def test_the_commands_write_a_study_and_a_table_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_tables, "folder", lambda: tmp_path)
    study = tmp_path / "study.json"
    few = ["--stage", "tiles", "--batch", "1", "--keys", "512", "--seqlen-q", "1", "--group", "8", "--head-dim", "128"]
    result = CliRunner().invoke(app, ["study", "--out", str(study), "--budget", "60", "--jobs", "1", *few])
    assert result.exit_code == 0, result.output
    document = load(study)
    assert document.basis == "measured"
    assert document.entries
    assert CliRunner().invoke(app, ["tune", "--study", str(study)]).exit_code == 0
    (table,) = (path for path in tmp_path.iterdir() if path != study)
    assert user_tables.read(table.read_text(), document.figures.name, document.figures.arch).keys() == {
        tuple(row["key"]) for row in json.loads(table.read_text())["rows"]
    }
    user_tables.user_table.cache_clear()
    plan_decode.cache_clear()
