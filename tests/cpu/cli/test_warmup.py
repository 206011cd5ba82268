"""``flashtile warmup`` on a CPU, where it only plans; tests/cpu/test_warmup.py has what it compiles for other devices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

import flashtile
from flashtile.cli.app import app
from flashtile.ops.ahead import Compilation, Kernel
from flashtile.planner.device import Device

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


def test_a_training_steps_forward_keeps_its_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr("flashtile.cli.warmup.distinct_kernels", lambda planned: asked.extend(p.lse for p, _ in planned) or [])
    for line in (["forward"], ["forward", "--lse"], ["backward"]):
        assert CliRunner().invoke(app, ["warmup", *line, "--device", "cpu", "--seqlen-k", "256"]).exit_code == 0
    assert asked == [False, True, True]


def test_where_the_gpu_is_here_kernels_are_compiled_and_then_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from flashtile.kernels.on_disk import Stored

    noted: list[Any] = []

    def compile_ahead(kernels: list[Kernel], arch: str, jobs: int) -> Iterator[Compilation]:
        noted.append((len(kernels), arch, jobs))
        yield Compilation(2, Stored("combine_kernel", True, 2_000_000, 0.5))
        yield Compilation(0, Stored("decode_kernel", False, 1_000_000, 0.25))

    monkeypatch.setattr(Device, "of", lambda where: Device.named("t4"))
    monkeypatch.setattr("flashtile.cli.warmup.compile_ahead", compile_ahead)
    monkeypatch.setattr(flashtile, "warmup", lambda problems, device: noted.append((problems[0].seqlen_k, str(device))))
    line = [*TINY, "--seqlen-k", "64", "--seqlen-k", "8192", "--head-dim", "16"]
    document = json.loads(CliRunner().invoke(app, [*line, "--jobs", "3", "--json"]).stdout)
    assert noted == [(3, "sm_75", 3), (64, "cpu"), (8192, "cpu")]
    assert {name: document["cache"][name] for name in ("kernels", "compiled", "bytes")} == {"kernels": 2, "compiled": 1, "bytes": 3_000_000}
    first, second = document["problems"]
    assert 0.25 <= first["seconds"] < 0.5 <= second["seconds"]
    shown = CliRunner().invoke(app, line).stdout
    assert noted[3] == (3, "sm_75", 1)
    assert "2 kernels, 3.0 MB, in " in shown
    assert "1 compiled now, 1 there before" in shown
