"""``flashtile env``: what is here, and what is missing."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
import torch
from typer.testing import CliRunner

from flashtile.cli.app import app


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

    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("importlib.metadata.version", version)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    document = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)
    assert document["versions"]["triton"] == "not installed"
    assert document["toolchain"]["c_compiler_found"] is False
    assert "install gcc" in document["toolchain"]["c_compiler"]
    assert document["toolchain"]["python_headers_found"] is False
    assert "python3-dev" in document["toolchain"]["python_headers"]


def test_the_text_lists_kernels() -> None:
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0
    assert "cpu.decode" in result.stdout
    assert "C compiler" in result.stdout
