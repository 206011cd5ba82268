"""``flashtile bench backward`` on a CPU."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from flashtile.cli import bench_backward
from flashtile.cli.app import app
from flashtile.testing.backward_peers import BackwardInputs, Grads

TINY = ["bench", "backward", "--device", "cpu", "--heads", "4/2", "--seqlen", "40", "--head-dim", "32"]


def test_every_pair_of_sizes_is_checked_and_timed_with_both_masks() -> None:
    result = CliRunner().invoke(app, [*TINY, "--seqlen", "33", "--batch", "2", "--json"])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    sizes = {(row["batch"], row["seqlen"], row["causal"]) for row in document["results"]}
    assert sizes == {(2, n, causal) for n in (40, 33) for causal in (True, False)}
    for row in document["results"]:
        assert row["check"] == "passed"
        assert set(row["seconds"]) == {"flashtile", "SDPA"}
        assert row["plan"]["kernel"] == "cpu.backward"
        flops = 10 * 2 * 4 * row["seqlen"] ** 2 * 32 / (2 if row["causal"] else 1)
        assert row["tflops"] == pytest.approx(flops / row["seconds"]["flashtile"] * 1e-12)


def test_the_same_bits_each_time_are_asked_for_and_shown_as_a_table() -> None:
    result = CliRunner().invoke(app, [*TINY, "--full", "--no-peers", "--deterministic"])
    assert result.exit_code == 0, result.stderr
    assert "backward on" in result.stdout
    assert "causal" not in result.stdout.replace("heads, mask", "")
    document = json.loads(CliRunner().invoke(app, [*TINY, "--full", "--no-peers", "--deterministic", "--json"]).stdout)
    assert [(row["deterministic"], set(row["seconds"])) for row in document["results"]] == [(True, {"flashtile"})]


@pytest.mark.parametrize(("which", "value"), [(0, 1.05), (1, 0.9), (2, float("nan"))])
def test_a_wrong_gradient_fails(monkeypatch: pytest.MonkeyPatch, which: int, value: float) -> None:
    right = bench_backward._ours

    def wrong(x: BackwardInputs, deterministic: bool, device: torch.device) -> object:
        plan, run = right(x, deterministic, device)

        def off(x: BackwardInputs) -> Grads:
            dq, dk, dv = (grad * (value if i == which else 1.0) for i, grad in enumerate(run(x)))
            return dq, dk, dv

        return plan, off

    monkeypatch.setattr(bench_backward, "_ours", wrong)
    result = CliRunner().invoke(app, [*TINY, "--full", "--no-peers"])
    assert result.exit_code == 1
    assert "WRONG" in result.stdout
