"""``flashtile explain``: any shape, any named device, no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

import flashtile.cli.explain as command
from flashtile.cli.app import app


def explain(*options: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["explain", "--json", *options])
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_options_reach_the_problem() -> None:
    document = explain(
        "--device", "a100", "--batch", "3", "--seqlen-q", "4", "--seqlen-k", "2048", "--heads", "64", "--kv-heads", "8", "--head-dim", "64",
        "--head-dim-v", "32", "--dtype", "float16", "--page-size", "16", "--window", "1023,0", "--softcap", "--alibi", "--sinks",
    )  # fmt: skip
    problem = document["problem"]
    assert document["device"]["arch"] == "sm_80"
    assert (problem["batch"], problem["seqlen_q"], problem["seqlen_k"]) == (3, 4, 2048)
    assert (problem["num_heads_q"], problem["num_heads_kv"]) == (64, 8)
    assert (problem["head_dim"], problem["head_dim_v"], problem["dtype_q"], problem["page_size"]) == (64, 32, "float16", 16)
    assert problem["band"] == {"left": 1023, "right": 0}
    assert problem["softcap"] and problem["alibi"] and problem["sinks"]


@pytest.mark.parametrize(
    ("options", "band"),
    [
        (["--no-causal"], {"left": None, "right": None}),
        (["--no-causal", "--window", "7,3"], {"left": 7, "right": 3}),
        (["--window", "7,"], {"left": 7, "right": 0}),
        (["--no-causal", "--window", "none,3"], {"left": None, "right": 3}),
    ],
)
def test_masks(options: list[str], band: dict[str, int | None]) -> None:
    assert explain("--device", "h200", "--seqlen-q", "4", *options)["problem"]["band"] == band


def test_a_forced_tile_is_explained_and_the_others_are_listed() -> None:
    document = explain("--device", "h200", "--block-m", "64", "--num-splits", "5")
    assert document["plan"]["block_m"] == 64
    assert document["plan"]["num_splits"] == 5
    assert document["plan"]["source"] == "explicit"
    others = {(other["block_m"], other["swapped"]) for other in document["alternatives"]}
    assert {(1, False), (8, True), (16, False), (32, False), (128, False)} <= others


def test_without_a_device_it_says_which_one_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    document = explain()
    assert document["device"]["name"] == "H200"
    assert any("no GPU" in note for note in document["notes"])


def test_a_length_between_buckets_is_said_to_be_rounded() -> None:
    document = explain("--device", "h200", "--seqlen-k", "777")
    assert document["problem"]["seqlen_k"] == 832
    assert any("777" in note and "832" in note for note in document["notes"])


def test_the_text_has_the_words_and_the_table() -> None:
    result = CliRunner().invoke(app, ["explain", "--device", "t4"])
    assert result.exit_code == 0
    assert "T4" in result.stdout
    assert "why it lost" in result.stdout
    assert "kBlockM" in result.stdout


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--device", "h900"], "h900"),
        (["--device", "h200", "--block-m", "24"], "block_m"),
        (["--device", "h200", "--kv-heads", "5"], "num_heads"),
        (["--device", "h200", "--window", "5"], "--window"),
        (["--device", "h200", "--window", "-5,0"], "window"),
        (["--device", "h200", "--dtype", "int8"], "--dtype"),
        (["--device", "h200", "--batch", "-1"], "--batch"),
        (["--device", "h200", "--num-splits", "0"], "num_splits"),
        (["--device", "cpu", "--compile"], "--compile"),
    ],
)
def test_bad_values_are_named(options: list[str], named: str) -> None:
    result = CliRunner().invoke(app, ["explain", *options])
    assert result.exit_code == 2
    assert named in result.stderr
    assert result.stdout == ""


def test_compile_without_triton_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["explain", "--device", "h200", "--compile"])
    assert result.exit_code == 2
    assert "Triton" in result.stderr
    assert result.stdout == ""


@pytest.mark.compiles
def test_compile_states_what_the_kernel_takes() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    line = [sys.executable, "-m", "flashtile", "explain", "--device", "h200", "--head-dim", "64", "--compile", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)["compiled"]
    assert compiled["arch"] == "sm_90"
    assert compiled["spilled_bytes"] == 0
    assert 0 < compiled["registers"] <= 255
    assert "m16n8" in compiled["mma"] or "m64" in compiled["mma"]


def test_forward_has_as_many_queries_as_keys_unless_told() -> None:
    document = explain("forward", "--device", "h200", "--batch", "4", "--seqlen-k", "4096", "--heads", "16", "--kv-heads", "16")
    assert document["problem"]["operation"] == "forward"
    assert (document["problem"]["seqlen_q"], document["problem"]["seqlen_k"]) == (4096, 4096)
    assert document["plan"]["kernel"] == "gluon.forward_sm90"
    assert document["bound"] == "matrix"
    assert {other["kernel"] for other in document["alternatives"]} == {"gluon.forward_sm90", "triton.forward"}
    assert explain("forward", "--device", "h200", "--seqlen-q", "512", "--seqlen-k", "16384")["problem"]["seqlen_q"] == 512


def test_forward_lengths_are_planned_in_steps_which_is_said() -> None:
    document = explain("forward", "--device", "a100", "--seqlen-q", "1001", "--seqlen-k", "4100")
    assert document["problem"]["seqlen_q"] > 1001
    assert any("1001 queries are planned as" in note for note in document["notes"])


def test_forward_obeys_block_m_and_has_no_splits() -> None:
    document = explain("forward", "--device", "a100", "--block-m", "64")
    assert (document["plan"]["block_m"], document["plan"]["source"]) == (64, "explicit")
    refused = CliRunner().invoke(app, ["explain", "forward", "--num-splits", "4"])
    assert refused.exit_code == 2
    assert "forward splits no keys" in refused.stderr


def test_backward_has_two_passes_and_neither_block_m_nor_splits() -> None:
    document = explain("backward", "--device", "a100", "--batch", "4", "--heads", "16", "--kv-heads", "4", "--head-dim", "64")
    assert document["problem"]["operation"] == "backward"
    assert (document["problem"]["seqlen_q"], document["problem"]["lse"]) == (4096, True)
    assert document["plan"]["kernel"] == "triton.backward"
    assert document["keys"]["tiles"] == 4 * 4 * 4096 // document["plan"]["block_n"]
    assert document["queries"]["tiles"] == 4 * 16 * 4096 // document["plan"]["dq_block_m"]
    for option in ("--block-m", "--num-splits"):
        refused = CliRunner().invoke(app, ["explain", "backward", option, "64"])
        assert refused.exit_code == 2
        assert option in refused.stderr


def test_backward_is_told_to_a_person_with_a_table_of_the_other_tiles() -> None:
    result = CliRunner().invoke(app, ["explain", "backward", "--device", "h200", "--head-dim", "256", "--softcap"])
    assert result.exit_code == 0
    assert "Pass over keys (dK and dV)" in result.stdout
    assert "Pass over queries (dQ)" in result.stdout
    assert "64 keys" in result.stdout
    assert "any of gluon.backward_sm90" in result.stdout


def test_gradients_may_have_to_be_the_same_each_time() -> None:
    asked = ("backward", "--device", "h200", "--head-dim", "128")
    assert explain(*asked)["problem"]["deterministic"] is False
    document = explain(*asked, "--deterministic")
    assert document["problem"]["deterministic"] is True
    [one_pass] = [row for row in document["alternatives"] if row["passes"] == 1]
    assert (one_pass["feasible"], one_pass["predicted_us"]) == (False, None)
    result = CliRunner().invoke(app, ["explain", *asked, "--deterministic"])
    assert "one pass" in result.stdout
    assert explain("forward", "--device", "h200", "--deterministic")["problem"]["deterministic"] is False


def test_forward_is_told_to_a_person_with_a_table_of_the_other_tiles() -> None:
    result = CliRunner().invoke(app, ["explain", "forward", "--device", "h200", "--head-dim", "64"])
    assert result.exit_code == 0
    assert "kernel gluon.forward_sm90, chosen by the rule" in result.stdout
    assert "Bound by exp" in result.stdout
    assert "16 of triton.forward" in result.stdout


@pytest.mark.parametrize(("stored", "scales"), [("float8_e4m3fn", "head"), ("int8", "none")])
def test_a_quantised_cache_is_explained(stored: str, scales: str) -> None:
    flags = ["explain", "--device", "h200", "--batch", "32", "--dtype-kv", stored, "--kv-scales", scales]
    result = CliRunner().invoke(app, flags)
    assert result.exit_code == 0, result.stderr
    assert f"bfloat16 over {stored} keys and values on H200" in " ".join(result.stdout.split())
    document = json.loads(CliRunner().invoke(app, [*flags, "--json"]).stdout)
    assert document["problem"]["k_scales"] == document["problem"]["v_scales"] == scales
    plain = json.loads(CliRunner().invoke(app, ["explain", "--device", "h200", "--batch", "32", "--json"]).stdout)
    assert document["bytes_read"] * 2 == plain["bytes_read"]
    assert document["predicted_us"] * 1.6 < plain["predicted_us"]


def test_a_quantised_cache_is_for_decode() -> None:
    result = CliRunner().invoke(app, ["explain", "forward", "--device", "h200", "--dtype-kv", "int8"])
    assert result.exit_code != 0


@pytest.mark.parametrize("options", [["--batch", str(10**18)], ["--seqlen-q", str(10**20)]])
def test_more_than_a_grid_holds_is_refused_with_reasons(options: list[str]) -> None:
    result = CliRunner().invoke(app, ["explain", "--device", "h200", *options])
    assert result.exit_code == 2, result.output
    assert "a grid holds 2147483647" in result.stderr
