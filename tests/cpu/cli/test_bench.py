"""``flashtile bench decode`` on a CPU."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import flashtile
from flashtile.cli.app import app

TINY = ["bench", "decode", "--device", "cpu", "--heads", "4/1", "--keys", "64", "--head-dim", "32"]


def test_every_pair_of_sizes_is_checked_and_timed() -> None:
    result = CliRunner().invoke(app, [*TINY, "--heads", "2/2", "--batch", "1", "--batch", "3", "--keys", "80", "--json"])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    sizes = {(row["num_heads_q"], row["num_heads_kv"], row["batch"], row["seqlen_k"]) for row in document["results"]}
    assert sizes == {(hq, hk, b, k) for hq, hk in ((4, 1), (2, 2)) for b in (1, 3) for k in (64, 80)}
    for row in document["results"]:
        assert row["check"] == "passed"
        assert set(row["seconds"]) == {"flashtile", "SDPA"}
        assert min(row["seconds"].values()) > 0
    assert "flashtile" in document["versions"]
    assert "in turn" in document["protocol"]


def test_without_peers_only_ours_is_timed() -> None:
    document = json.loads(CliRunner().invoke(app, [*TINY, "--no-peers", "--json"]).stdout)
    assert [set(row["seconds"]) for row in document["results"]] == [{"flashtile"}]


@pytest.mark.parametrize("stored", ["float8_e4m3fn", "int8"])
def test_a_quantised_cache_is_checked_and_timed_without_peers(stored: str) -> None:
    result = CliRunner().invoke(app, [*TINY, "--dtype-kv", stored, "--json"])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["dtype"] == f"bfloat16 over {stored}"
    assert [(row["check"], set(row["seconds"])) for row in document["results"]] == [("passed", {"flashtile"})]


def test_a_wrong_result_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = flashtile.decode_with_lse

    def wrong(**args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right(**args)
        return out * 1.1, lse

    monkeypatch.setattr(flashtile, "decode_with_lse", wrong)
    result = CliRunner().invoke(app, TINY)
    assert result.exit_code == 1
    assert "WRONG" in result.stdout


@pytest.mark.parametrize("heads", ["32/5", "x/8", "0", "8/0"])
def test_bad_heads_are_refused(heads: str) -> None:
    result = CliRunner().invoke(app, ["bench", "decode", "--device", "cpu", "--heads", heads])
    assert result.exit_code == 2
    assert "--heads" in result.stderr
    assert result.stdout == ""
