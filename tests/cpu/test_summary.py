"""The README's table of speeds: lines of the tables of targets, and fresh."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import report, summary

ROOT = Path(__file__).parents[2]


def test_the_readme_shows_the_results_in_the_tree() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- table: summary -->" in text
    assert report.rendered(text, summary.tables(report.load(ROOT / "benchmarks" / "results"))) == text, "run python -m benchmarks.summary"


def test_a_target_of_another_name_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "LINES", {"targets": {"decode": "a target that there was once"}})
    with pytest.raises(report.StaleReport, match="a target that there was once"):
        summary.tables(report.load(ROOT / "benchmarks" / "results"))
