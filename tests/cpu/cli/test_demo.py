"""``flashtile demo`` at a tiny size: the same path as in full."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import flashtile
from flashtile.cli.app import app

TINY = ["demo", "--device", "cpu", "--batch", "2", "--steps", "2", "--longest", "60"]


def test_every_kind_of_step_is_run_checked_and_timed() -> None:
    result = CliRunner().invoke(app, [*TINY, "--json"])
    assert result.exit_code == 0, result.stdout + result.stderr
    document = json.loads(result.stdout)
    assert document["passed"] is True
    steps = document["steps"]
    assert {"decode", "mixed", "speculative"} <= {step["kind"] for step in steps}
    assert {4} == {n for step in steps if step["kind"] == "speculative" for n in step["seqlens_q"]}
    for step in steps:
        assert step["failure"] is None
        assert 0 < step["error"] < 5e-3
        assert min(step["seconds"].values()) > 0
    assert "ISCA 2024" in document["lengths"]["citation"]


def test_the_seed_decides_the_lengths() -> None:
    def lengths(seed: str) -> list[int]:
        document = json.loads(CliRunner().invoke(app, [*TINY, "--steps", "1", "--json", "--seed", seed]).stdout)
        return [n for step in document["steps"] for n in step["seqlens_k"]]

    first = lengths("3")
    assert lengths("3") == first
    assert lengths("4") != first


def test_a_wrong_result_fails_and_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    right = flashtile.decode_with_lse

    def wrong(**call: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right(**call)
        out.view(-1)[7] += 1.0
        return out, lse

    monkeypatch.setattr(flashtile, "decode_with_lse", wrong)
    result = CliRunner().invoke(app, TINY)
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert "WRONG" in result.stdout


def test_the_text_has_the_table_the_plan_and_the_verdict() -> None:
    result = CliRunner().invoke(app, [*TINY, "--steps", "1"])
    assert result.exit_code == 0
    for words in ("SDPA / ours", "The plan of a decode step", "cpu.decode", "PASSED"):
        assert words in result.stdout


@pytest.mark.parametrize("options", [["--batch", "0"], ["--steps", "0"], ["--seed", "x"], ["--seed", "99999999999999999999"]])
def test_bad_values_are_named(options: list[str]) -> None:
    result = CliRunner().invoke(app, ["demo", *options])
    assert result.exit_code == 2
    assert options[0] in result.stderr
