"""``flashtile replay`` over a trace of a few requests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flashtile.cli.app import app

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    rows = ["00.0000000,70,4", "00.0100000,33,3", "00.0300000,5,6", "09.5000000,20,2"]
    path.write_text(HEADER + "".join(f"2023-11-16 18:15:{row}\n" for row in rows))
    return path


def test_a_whole_trace_is_replayed(trace: Path) -> None:
    result = CliRunner().invoke(app, ["replay", str(trace), "--device", "cpu", "--chunk", "32", "--json"])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["requests"] == {"in_trace": 4, "finished": 4, "running": 0, "refused": 0}
    # Each prompt token once, and each token of an answer but the first, which the prompt's last step gives.
    assert document["queries"] == 70 + 33 + 5 + 20 + (3 + 2 + 5 + 1)
    assert {"decode", "prefill"} <= set(document["attention"])
    assert sum(row["steps"] for row in document["tiles"]) == document["steps"]
    assert sum(row["steps"] for row in document["splits"]) == document["steps"]
    fixed = document["fixed_tile"]
    assert fixed["block_m"] == 64
    assert fixed["steps_compared"] == document["steps"]
    assert fixed["ratio"] >= 1.0
    assert "predicted, not measured" in fixed["basis"]


def test_steps_bound_it(trace: Path) -> None:
    document = json.loads(CliRunner().invoke(app, ["replay", str(trace), "--device", "cpu", "--steps", "3", "--json"]).stdout)
    assert document["steps"] == 3


def test_the_budget_bounds_it(trace: Path) -> None:
    path = trace.with_name("long.csv")
    path.write_text(HEADER + "".join(f"2023-11-16 18:15:00.{i:07d},4000,900\n" for i in range(50)))
    document = json.loads(CliRunner().invoke(app, ["replay", str(path), "--device", "cpu", "--budget", "0.3", "--json"]).stdout)
    assert document["requests"]["finished"] < 50
    assert document["seconds"] < 10


def test_the_gpu_whose_plans_are_counted_can_be_chosen(trace: Path) -> None:
    result = CliRunner().invoke(app, ["replay", str(trace), "--device", "cpu", "--steps", "4", "--model-device", "t4"])
    assert result.exit_code == 0, result.stderr
    assert "Chosen for T4" in result.stdout
    assert "Attention a step" in result.stdout


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "TIMESTAMP"),
        ("a,b\n1,2\n", "ContextTokens"),
        (HEADER, "no rows"),
        (HEADER + "2023-11-16 18:15:00,12\n", "line 2"),
        (HEADER + "2023-11-16 18:15:00,12,3\nyesterday,12,3\n", "line 3"),
        (HEADER + "2023-11-16 18:15:00,0,3\n", "line 2"),
        (HEADER + "2023-11-16 18:15:00,twelve,3\n", "twelve"),
    ],
)
def test_a_bad_trace_is_one_clear_error(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    result = CliRunner().invoke(app, ["replay", str(path), "--device", "cpu"])
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize("name", ["missing.csv", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    result = CliRunner().invoke(app, ["replay", str(tmp_path / name), "--device", "cpu"])
    assert result.exit_code == 2
    assert str(tmp_path / name) in result.stderr.replace("\n", "")


def test_an_unknown_model_device_is_refused(trace: Path) -> None:
    result = CliRunner().invoke(app, ["replay", str(trace), "--device", "cpu", "--model-device", "abacus"])
    assert result.exit_code == 2
    assert "abacus" in result.stderr
