"""The sanitizer's script, tried without a GPU: trials run, counts add up, and a finding or an empty watch is no success."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import typer

from benchmarks import report, sanitize, sanitize_backward, sanitize_forward
from flashtile import Device, Problem, UnsupportedError
from flashtile.planner.catalog import GLUON_BACKWARD_SM90, GLUON_FORWARD_SM90
from flashtile.planner.plans import BackwardPlan
from flashtile.testing.backward_inputs import backward_problem
from flashtile.testing.forward_inputs import make_forward_inputs

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
    (folder / "control_memcheck.log").write_text("========= ERROR SUMMARY: 1 error\n")
    return folder


@pytest.fixture
def watched(left_behind: Path, tmp_path: Path) -> Path:
    return shutil.copytree(left_behind, tmp_path / "watched")


def test_every_trial_is_counted_once_for_each_tool(watched: Path) -> None:
    sanitize.collect(watched, device="cpu", commit="abc")
    data = json.loads((watched / "sanitize.json").read_text())
    counts = {f"cpu.{operation}": len(sanitize.trials("cpu", operation)) for operation in sanitize.OPERATIONS}
    count = sum(counts.values())
    assert data["trials"] == count
    assert data["commit"] == "abc"
    for tool in CLEAN:
        assert data["tools"][tool] == {"found": 0, "launches": counts, "kinds": {}, "ended": count, "trials": count, "failed": []}


@pytest.mark.parametrize(
    ("log", "text"),
    [
        ("memcheck_2.log", "========= ERROR SUMMARY: 2 errors\n"),
        ("racecheck_1.log", "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n"),
        ("racecheck_1.log", "stopped before its end\n"),
        ("control_memcheck.log", "========= ERROR SUMMARY: 0 errors\n"),
    ],
)
def test_findings_and_tools_that_did_not_end_fail(watched: Path, log: str, text: str) -> None:
    (watched / log).write_text(text)
    with pytest.raises(typer.Exit):
        sanitize.collect(watched, device="cpu")


RACES = """========= Error: Race reported between Write access at forward_kernel+0x1fd0 in scores.py:151
=========     and Read access at forward_kernel+0xa6c0 in scores.py:160 [1536 hazards]
=========     and Read access at forward_kernel+0xa6d0 in scores.py:151 [2 hazards]
=========
========= Error: Race reported between Write access at forward_kernel+0x1fd0 in scores.py:151
=========     and Read access at forward_kernel+0xa6c0 in scores.py:160 [1536 hazards]
=========
========= Error: Race reported between Read access at forward_kernel+0x130 in rows.py:24
=========     and Write access at forward_kernel+0x92d0 in rows.py:39 [19 hazards]
=========
========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)
"""


def test_reports_are_counted_by_the_lines_that_they_name(watched: Path) -> None:
    (watched / "racecheck_1.log").write_text(RACES)
    (watched / "control_racecheck.log").write_text(RACES)
    with pytest.raises(typer.Exit):
        sanitize.collect(watched, device="cpu")
    data = json.loads((watched / "sanitize.json").read_text())
    assert data["tools"]["racecheck"]["kinds"] == {"scores.py:151, scores.py:160": 2, "rows.py:24, rows.py:39": 1}
    assert data["control_races"] == 3


def test_a_tool_that_watched_nothing_fails(watched: Path) -> None:
    for path in watched.glob("watched_racecheck_*.json"):
        path.write_text(json.dumps({"of": 0, "ended": {}}))
    with pytest.raises(typer.Exit):
        sanitize.collect(watched, device="cpu")


def test_the_report_states_the_launches(watched: Path) -> None:
    sanitize.collect(watched, device="cpu", commit="abc")
    decode, forward, backward = (len(sanitize.trials("cpu", operation)) for operation in ("decode", "forward", "backward"))
    table = report.tables(report.load(watched))["sanitize"]
    every = decode + forward + backward
    launches = f"{backward} of cpu.backward, {decode} of cpu.decode, {forward} of cpu.forward"
    assert f"| memcheck | 0 | {launches} | {every} of {every} |" in table
    assert "was reported 1 times" in table
    assert "commit abc" in table


def test_the_report_says_what_reports_name_and_what_the_controls_got(watched: Path) -> None:
    (watched / "racecheck_1.log").write_text(RACES)
    (watched / "control_racecheck.log").write_text(RACES)
    with pytest.raises(typer.Exit):
        sanitize.collect(watched, device="cpu", commit="abc")
    table = report.tables(report.load(watched))["sanitize"]
    assert (
        "Reports of racecheck, by the lines that they name:\n\n- 2 at scores.py:151, scores.py:160\n- 1 at rows.py:24, rows.py:39" in table
    )
    assert "Reports of memcheck" not in table
    assert "A kernel whose warps hand numbers over by a barrier, rightly, was reported for 3 races." in table
    assert "were not reached" not in table


def test_one_operation_can_be_watched_alone(tmp_path: Path) -> None:
    sanitize.prepare(tmp_path, device="cpu", workers=1, operation="forward")
    sanitize.watch("memcheck", tmp_path, device="cpu")
    ended = json.loads((tmp_path / "watched_memcheck_1.json").read_text())["ended"]
    assert len(ended) == len(sanitize.trials("cpu", "forward"))
    assert all(outcome == {"ok": True} for outcome in ended.values())


def test_every_forward_tile_of_hopper_serves_some_trial() -> None:
    device = Device.named("h200")
    served = set()
    for case in sanitize_forward.CASES:
        problem = Problem.forward(**make_forward_inputs(case).args, lse=True)
        for tile in sanitize_forward.HOPPER_TILES:
            trial = sanitize_forward.Trial(case, GLUON_FORWARD_SM90, tile.block_m, tile, 2)
            try:
                plan = trial._plan(problem, device)
            except UnsupportedError:
                continue
            assert plan.num_programs == 2
            served.add(tile)
    assert served == set(sanitize_forward.HOPPER_TILES)


def test_every_backward_plan_of_hopper_serves_some_trial() -> None:
    device = Device.named("h200")
    problems = [(case, backward_problem(make_forward_inputs(case))) for case in sanitize_backward.CASES]

    def serves(plan: BackwardPlan | None, kernel: str) -> bool:
        for case, problem in problems:
            try:
                sanitize_backward.Trial(case, kernel, plan).chosen(problem, device)
            except UnsupportedError:
                continue
            return True
        return False

    assert len(sanitize_backward.CASES) == len(sanitize_backward.NAMES)
    assert all(serves(plan, plan.kernel) for plan in (*sanitize_backward.HOPPER_PLANS, *sanitize_backward.PORTABLE_PLANS))
    assert serves(None, GLUON_BACKWARD_SM90)
