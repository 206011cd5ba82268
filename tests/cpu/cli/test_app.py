"""What all commands share: version, help, one line and exit code 2 for an error."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from flashtile.cli.app import app

COMMANDS = (["demo"], ["replay"], ["explain"], ["bench", "decode"], ["env"], ["warmup"])


def test_python_m_prints_the_version() -> None:
    done = subprocess.run([sys.executable, "-m", "flashtile", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("flashtile 0.")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_json(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0
    assert "--json" in result.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_an_unknown_flag_is_one_error(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--no-such-flag"])
    assert result.exit_code == 2
    assert "--no-such-flag" in result.stderr
    assert result.stdout == ""


def test_an_unknown_command_is_an_error() -> None:
    result = CliRunner().invoke(app, ["trian"])
    assert result.exit_code == 2
    assert "trian" in result.stderr


@pytest.mark.parametrize("device", ["cuda:99", "mps", "gpu"])
@pytest.mark.parametrize("command", [["demo"], ["bench", "decode"], ["warmup"]], ids=" ".join)
def test_a_device_that_is_not_here_is_refused(command: list[str], device: str) -> None:
    result = CliRunner().invoke(app, [*command, "--device", device])
    assert result.exit_code == 2
    assert "--device" in result.stderr
    assert "cpu" in result.stderr
    assert result.stdout == ""


def test_an_attention_error_is_one_line_without_traceback() -> None:
    result = CliRunner().invoke(app, ["explain", "--device", "h200", "--head-dim", "13"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "head_dim" in result.stderr
    assert "multiple of 8" in result.stderr


def test_reasons_follow_their_summary_in_one_sentence() -> None:
    result = CliRunner().invoke(app, ["explain", "--device", "h200", "--block-m", "12"])
    assert result.exit_code == 2
    assert result.stderr.startswith("flashtile: block_m cannot be obeyed: gluon.decode_sm90: block_m 12 is not one of")
