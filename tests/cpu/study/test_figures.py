"""The study's figures: drawn from a small study, the same files each time, left out where there is nothing to draw."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks import study_figures
from flashtile.study.points import Point, Task, tasks
from tests.cpu.study.synthetic import write_study


def test_every_figure_is_drawn_and_the_same_each_time(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study.json", [*islice(tasks(), 8), Task("splits", Point(1, 4096)), Task("tiles", Point(1, 512))])
    study_figures.main(study, tmp_path / "first")
    study_figures.main(study, tmp_path / "second")
    names = {f"{name}{suffix}" for name in study_figures.FIGURES for suffix in (".svg", ".png")}
    assert {path.name for path in (tmp_path / "first").iterdir()} == names
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_a_figure_without_times_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study_figures.main(write_study(tmp_path / "study.json", [Task("shapes", Point(1, 4096))]), tmp_path / "figures")
    assert capsys.readouterr().out.count("nothing for it") == len(study_figures.FIGURES)
    assert not (tmp_path / "figures").exists()


def test_one_cell_is_no_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study_figures.main(write_study(tmp_path / "study.json", [Task("tiles", Point(1, 4096))]), tmp_path / "figures")
    drawn = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert drawn == {"study_times", "study_waste", "study_roofline"}
