"""The figure: drawn from a small record, the same file each time, and true to the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import concept_figures, figure


def entry(name: str, kv_bytes: int, floor_us: float | None, **us: float) -> dict[str, Any]:
    return {"name": name, "kv_bytes": kv_bytes, "floor_us": floor_us, "results": {who: {"gpu_us": value} for who, value in us.items()}}


ROWS = [
    entry("1x512 32/8", 2_000_000, 2.0, flashtile=4.0, cudnn=8.0),
    entry("1x4096 32/8", 17_000_000, 5.0, flashtile=8.0, cudnn=11.0, fa3=13.0),
    entry("1x4096 64/8", 17_000_000, 5.0, flashtile=10.0),
    entry("not timed", 10**9, None),
]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    head = {"device": "a GPU", "commit": "abc", "date": "2026-01-01"}
    (tmp_path / "decode_seqlen1.json").write_text(json.dumps({**head, "entries": [*ROWS, {"name": "late", "skipped": "no time left"}]}))
    return tmp_path


def test_rates_and_shares_are_those_of_the_rows() -> None:
    assert figure.points(ROWS, "flashtile") == [(2_000_000, 0.5), (17_000_000, 1.7), (17_000_000, pytest.approx(2.125))]
    assert figure.shares(ROWS, "cudnn") == [(2_000_000, 25.0), (17_000_000, pytest.approx(100 * 5 / 11))]
    assert figure.medians(figure.shares(ROWS, "flashtile")) == [(2_000_000, 50.0), (17_000_000, 56.25)]
    assert figure.points(ROWS, "fa2") == []


@pytest.mark.parametrize("name", concept_figures.PICTURES)
def test_pictures_are_what_their_script_draws(name: str) -> None:
    drawn = concept_figures.PICTURES[name]()
    assert (concept_figures.FOLDER / f"{name}.svg").read_text(encoding="utf-8") == drawn.svg()


def test_the_command_draws_the_same_file_each_time(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "figures" / "first.svg", tmp_path / "second.svg"
    figure.main(results, first)
    figure.main(results, second)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_text().startswith("<?xml")


def test_problems_of_another_commit_are_not_mixed_in(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    floor = {"entries": [entry("8x2048 32/8", 67_000_000, 17.0, flashtile=19.0)]}
    for commit, count in (("abc", 5), ("def", 4)):
        (results / "decode_floor.json").write_text(json.dumps({**floor, "commit": commit}))
        figure.main(results, results / "out.svg")
        assert f"{count} problems" in capsys.readouterr().out
