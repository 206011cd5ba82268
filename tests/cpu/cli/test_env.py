"""``flashtile env``: what is here, and what is missing."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
import torch
from typer.testing import CliRunner

from flashtile.cli.app import app
from flashtile.cli.env import c_compiler


def test_versions_devices_and_kernels() -> None:
    document = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)
    assert document["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    cpu = document["devices"][0]
    assert cpu["device"] == "cpu"
    assert cpu["figures"]["num_sms"] >= 1
    assert cpu["kernels"]["cpu.decode"] == []
    assert cpu["kernels"]["triton.decode"] != []


def test_what_is_missing_is_said_with_its_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    def version(name: str) -> str:
        if name == "triton":
            raise metadata.PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("importlib.metadata.version", version)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    document = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)
    assert document["versions"]["triton"] == "not installed"
    assert document["toolchain"]["c_compiler_found"] is False
    assert "install gcc" in document["toolchain"]["c_compiler"]
    assert document["toolchain"]["python_headers_found"] is False
    assert "python3-dev" in document["toolchain"]["python_headers"]


@pytest.mark.parametrize("configured", [None, "", "clang", "nowhere"])
@pytest.mark.parametrize("here", [(), ("gcc", "cc"), ("clang", "cc"), ("gcc", "clang")], ids=str)
def test_the_c_compiler_is_the_one_that_triton_takes(
    configured: str | None, here: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = pytest.importorskip("flashtile.kernels.launch", exc_type=ImportError)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}" if name in here else None)
    if configured is None:
        monkeypatch.delenv("CC", raising=False)
    else:
        monkeypatch.setenv("CC", configured)
    assert c_compiler() == launch.c_compiler()


def test_a_compiler_that_cc_names_and_is_not_here_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "nowhere")
    toolchain = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)["toolchain"]
    assert toolchain["c_compiler_found"] is False
    assert "CC names nowhere" in toolchain["c_compiler"]


def test_the_text_lists_kernels() -> None:
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0
    assert "cpu.decode" in result.stdout
    assert "C compiler" in result.stdout
