"""Running a study: without a GPU, with a GPU's clock replaced, cut off and gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flashtile import ArgumentError, Device
from flashtile.cli.app import app
from flashtile.planner.catalog import TRITON
from flashtile.planner.choose import plan_decode
from flashtile.planner.plans import DecodePlan
from flashtile.study import measure, predict
from flashtile.study.document import load
from flashtile.study.points import Point, Task
from flashtile.study.run import Study, opened, run
from flashtile.testing.graphs import Timing

H200 = Device.named("h200")


@pytest.fixture(autouse=True)
def few_compile_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compiler would say of a kernel or two: compiling itself is another test's subject."""

    def compiled(points: list[Any], jobs: int) -> Generator[dict[str, Any], None, None]:
        some = [predict.known_of(p) for p in points if p.arch in ("sm_90", "sm_80") and p.tile == (16, False) and p.head_dims == (64, 64)]
        yield from (known | {"registers": 90, "spilled_bytes": 0} for known in some if known["kernel"] == TRITON)

    monkeypatch.setattr(predict, "compiled", compiled)


def command(out: Path, *more: str) -> Any:
    options = ["--device", "cpu", "--budget", "30", "--head-dim", "128", "--batch", "1", "--keys", "4096", "--dtype-kv", "bfloat16"]
    return CliRunner().invoke(app, ["study", "--out", str(out), *options, *more])


def test_without_a_gpu_it_predicts_compiles_and_says_so(tmp_path: Path) -> None:
    result = command(tmp_path / "study.json", "--json")
    assert result.exit_code == 0, result.output
    assert "No GPU" in result.stderr
    printed = json.loads(result.stdout)
    assert printed["basis"] == "predicted"
    assert printed["device"] == "H200"
    assert {facts["arch"] for facts in printed["compiled"]} == {"sm_90", "sm_80"}
    document = load(tmp_path / "study.json")
    assert {entry.point.seqlen_q for entry in document.entries} == {1, 2, 4, 8, 16, 32, 64}
    assert all(row.us == row.predicted_us > 0 for entry in document.entries for row in entry.rows)


def test_the_same_command_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "study.json"
    assert command(out, "--seqlen-q", "1", "--group", "8").exit_code == 0
    first = load(out)
    assert command(out, "--seqlen-q", "4", "--group", "8").exit_code == 0
    both = load(out)
    assert both.entries[: len(first.entries)] == first.entries
    assert {entry.point.seqlen_q for entry in both.entries} == {1, 4}
    assert len(both.compiled) == 2, "what was compiled is not compiled again"


def test_a_file_of_another_device_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "study.json"
    assert command(out, "--seqlen-q", "1").exit_code == 0
    refused = command(out, "--seqlen-q", "1", "--model", "a100")
    assert refused.exit_code == 2
    assert "predicted on H200" in refused.stderr


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"what": "flashtile study", "schema": 99, "columns": []}'])
def test_files_that_are_no_study_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ArgumentError, match=r"other\.json"):
        load(tmp_path / "other.json")


@pytest.mark.parametrize("option", [("--stage", "tile"), ("--dtype-kv", "fp8")])
def test_unknown_words_are_refused(tmp_path: Path, option: tuple[str, str]) -> None:
    result = command(tmp_path / "study.json", *option)
    assert result.exit_code == 2
    assert option[0] in result.stderr


class FakeGraph:
    """Calls that a test may look into, in the place of a captured graph."""

    def __init__(self, fn: Callable[[int], torch.Tensor]) -> None:
        self.fn, self.output = fn, fn(0)

    def replay(self) -> None:
        self.output.copy_(self.fn(0))


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that is timed as a GPU is: a graph is a call, and the first plan takes 10 us, the second 9, ..."""
    monkeypatch.setattr(measure, "capture", lambda fn, sets, calls: FakeGraph(fn))
    monkeypatch.setattr(
        measure, "replay_in_turn", lambda graphs, rounds, seconds: {name: Timing((10.0 - int(name),) * 3) for name in graphs}
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)


SMALL = Task("tiles", Point(2, 64, 2, 4, 64))


def plans(*rows: int) -> list[DecodePlan]:
    choice = plan_decode(SMALL.point.problem, Device.named("cpu"))
    return [choice, *(choice.with_(block_m=block_m, source="explicit") for block_m in rows)]


def test_measured_rows_are_checked_and_sorted(fake_gpu: None) -> None:
    entry = measure.measured(SMALL, plans(16, 32), torch.device("cpu"))
    assert [row[8] for row in entry["timed"]] == [8.0, 9.0, 10.0]
    assert [row[1] for row in entry["timed"]] == [32, 16, 8]
    assert entry["choice"]["block_m"] == 8
    assert entry["refused"] == []


def test_a_plan_that_cannot_run_is_refused_with_its_reason(fake_gpu: None) -> None:
    wrong = plans()[0].with_(kernel="triton.decode", source="explicit")
    entry = measure.measured(SMALL, [*plans(), wrong], torch.device("cpu"))
    assert len(entry["timed"]) == 1
    ((facts, why),) = entry["refused"]
    assert facts["kernel"] == "triton.decode"
    assert "UnsupportedError" in why


def test_a_wrong_result_is_never_timed(fake_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import flashtile

    right = flashtile.decode
    monkeypatch.setattr(flashtile, "decode", lambda **args: right(**args).mul_(1.0 + 0.1 * (args["plan"].block_m == 16)))
    entry = measure.measured(SMALL, plans(16), torch.device("cpu"))
    assert [row[1] for row in entry["timed"]] == [8]
    assert entry["refused"][0][1].startswith("WRONG: relative L2 error 0.1")


def test_a_graph_that_goes_wrong_later_is_seen(fake_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeGraph, "replay", lambda self: None)
    entry = measure.measured(SMALL, plans(), torch.device("cpu"))
    assert entry["timed"] == []
    assert entry["refused"][0][1].startswith("WRONG after it was timed")


def test_a_measured_study_is_resumed_after_a_crash(fake_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 10**12))
    small = [SMALL, Task("tiles", Point(1, 32, 1, 2, 64))]
    monkeypatch.setattr("flashtile.study.run.tasks", lambda: iter(small))
    study = Study(Device.named("cpu"), torch.device("cpu"))
    out = tmp_path / "study.json"
    record = opened(out, study, {})
    record.begin(small[0].name)  # and then the process dies
    done = run(study, opened(out, study, {}), 30.0)
    assert done == 1
    entries = json.loads(out.read_text())["entries"]
    assert "died" in entries[0]["failed"]
    assert [entry.point for entry in load(out).entries] == [small[1].point]


def test_a_problem_that_memory_cannot_hold_is_left_out(fake_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 10**12))
    monkeypatch.setattr("flashtile.study.run.tasks", lambda: iter([SMALL]))
    study = Study(Device.named("cpu"), torch.device("cpu"))
    out = tmp_path / "study.json"
    run(study, opened(out, study, {}), 30.0)
    (entry,) = json.loads(out.read_text())["entries"]
    assert "GB are free" in entry["failed"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--head-dim", "77"), "77 is none of 64, 128, 256"),
        (("--seqlen-q", "3"), "3 is none of 1, 2, 4, 8, 16, 32, 64"),
        (("--stage", "splits", "--seqlen-q", "2"), "no problem of the study is all that was asked for at once"),
    ],
)
def test_a_selection_of_nothing_is_refused(options: tuple[str, ...], named: str, tmp_path: Path) -> None:
    out = tmp_path / "study.json"
    result = CliRunner().invoke(app, ["study", "--out", str(out), *options], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert named in result.stderr
    assert not out.exists()
