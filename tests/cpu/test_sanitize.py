"""The sanitizer's script, tried without a GPU: trials run, counts add up, and a finding or an empty watch is no success."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import typer

from benchmarks import report, sanitize

CLEAN = {
    "memcheck": "========= ERROR SUMMARY: 0 errors\n",
    "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
}


@pytest.fixture(scope="module")
def left_behind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two tools leave where nothing was found, one of them in two parts."""
    folder = tmp_path_factory.mktemp("sanitize")
    sanitize.prepare(folder, device="cpu", workers=1)
    for tool, parts in (("memcheck", 2), ("racecheck", 1)):
        for part in range(1, parts + 1):
            sanitize.watch(tool, folder, device="cpu", part=f"{part}/{parts}")
            (folder / f"{tool}_{part}.log").write_text(CLEAN[tool])
    (folder / "control.log").write_text("========= ERROR SUMMARY: 1 error\n")
    return folder


@pytest.fixture
def watched(left_behind: Path, tmp_path: Path) -> Path:
    return shutil.copytree(left_behind, tmp_path / "watched")


def test_every_trial_is_counted_once_for_each_tool(watched: Path) -> None:
    sanitize.collect(watched, device="cpu", commit="abc")
    data = json.loads((watched / "sanitize.json").read_text())
    count = len(sanitize.trials("cpu"))
    assert data["trials"] == count
    assert data["commit"] == "abc"
    for tool in CLEAN:
        assert data["tools"][tool] == {"found": 0, "launches": {"cpu.decode": count}, "ended": count, "trials": count, "failed": []}


@pytest.mark.parametrize(
    ("log", "text"),
    [
        ("memcheck_2.log", "========= ERROR SUMMARY: 2 errors\n"),
        ("racecheck_1.log", "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n"),
        ("racecheck_1.log", "stopped before its end\n"),
        ("control.log", "========= ERROR SUMMARY: 0 errors\n"),
    ],
)
def test_findings_and_tools_that_did_not_end_fail(watched: Path, log: str, text: str) -> None:
    (watched / log).write_text(text)
    with pytest.raises(typer.Exit):
        sanitize.collect(watched, device="cpu")


def test_a_tool_that_watched_nothing_fails(watched: Path) -> None:
    for path in watched.glob("watched_racecheck_*.json"):
        path.write_text(json.dumps({"of": 0, "ended": {}}))
    with pytest.raises(typer.Exit):
        sanitize.collect(watched, device="cpu")


def test_the_report_states_the_launches(watched: Path) -> None:
    sanitize.collect(watched, device="cpu", commit="abc")
    count = len(sanitize.trials("cpu"))
    table = report.tables(report.load(watched))["sanitize"]
    assert f"| memcheck | 0 | {count} of cpu.decode | {count} of {count} |" in table
    assert "was reported 1 times" in table
    assert "commit abc" in table
