"""``flashtile bench forward`` on a CPU."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import flashtile
from flashtile.cli.app import app

TINY = ["bench", "forward", "--device", "cpu", "--heads", "2/1", "--seqlen", "48", "--head-dim", "32"]


def test_every_pair_of_sizes_is_checked_and_timed_with_both_masks() -> None:
    result = CliRunner().invoke(app, [*TINY, "--seqlen", "33", "--batch", "2", "--json"])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    sizes = {(row["batch"], row["seqlen"], row["causal"]) for row in document["results"]}
    assert sizes == {(2, n, causal) for n in (48, 33) for causal in (True, False)}
    for row in document["results"]:
        assert row["check"] == "passed"
        assert set(row["seconds"]) == {"flashtile", "SDPA"}
        assert row["plan"]["kernel"] == "cpu.forward"
        flops = 4 * 2 * 2 * row["seqlen"] ** 2 * 32 / (2 if row["causal"] else 1)
        assert row["tflops"] == pytest.approx(flops / row["seconds"]["flashtile"] * 1e-12)


def test_one_mask_alone_without_peers() -> None:
    document = json.loads(CliRunner().invoke(app, [*TINY, "--full", "--no-peers", "--json"]).stdout)
    assert [(row["causal"], set(row["seconds"])) for row in document["results"]] == [(False, {"flashtile"})]


def test_a_wrong_lse_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = flashtile.attention_with_lse

    def wrong(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right(*args, **kwargs)
        return out, lse + 0.01

    monkeypatch.setattr(flashtile, "attention_with_lse", wrong)
    result = CliRunner().invoke(app, [*TINY, "--full"])
    assert result.exit_code == 1
    assert "WRONG" in result.stdout
