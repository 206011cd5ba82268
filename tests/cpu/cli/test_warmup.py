"""``flashtile warmup`` on a CPU, where it only plans."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from flashtile.cli.app import app

TINY = ["warmup", "--device", "cpu"]


def test_every_pair_of_shapes_is_planned() -> None:
    line = [*TINY, "--batch", "1", "--batch", "2", "--seqlen-k", "512", "--seqlen-k", "1024", "--json"]
    document = json.loads(CliRunner().invoke(app, line).stdout)
    assert {(row["batch"], row["seqlen_k"]) for row in document["problems"]} == {(1, 512), (1, 1024), (2, 512), (2, 1024)}
    assert {row["kernel"] for row in document["problems"]} == {"cpu.decode"}
    assert document["seconds"] >= 0


def test_on_a_cpu_it_says_that_nothing_is_compiled() -> None:
    result = CliRunner().invoke(app, TINY)
    assert result.exit_code == 0
    assert "nothing to compile" in result.stdout


def test_bad_shapes_are_refused() -> None:
    result = CliRunner().invoke(app, [*TINY, "--head-dim", "300"])
    assert result.exit_code == 2
    assert "head_dim" in result.stderr
    assert result.stdout == ""


def test_forward_shapes_are_planned_too() -> None:
    document = json.loads(CliRunner().invoke(app, ["warmup", "forward", "--device", "cpu", "--seqlen-k", "256", "--json"]).stdout)
    (row,) = document["problems"]
    assert (row["kernel"], row["seqlen_q"], row["seqlen_k"]) == ("cpu.forward", 256, 256)
    assert "num_splits" not in row
