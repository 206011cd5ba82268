"""The wheel: built, installed elsewhere, imported from there."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE")

pytest.importorskip("build", reason="building the wheel needs `build`, of the test extra")


def _run(*command: str | Path, **options: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the tree and nothing stale in it is taken."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "flashtile", copy / "flashtile", ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    _run(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", target, wheel)
    return target


def _python(elsewhere: Path, code: str) -> str:
    """Runs code in a process that sees the installed wheel before anything else, and not the source tree."""
    return _run(sys.executable, "-c", code, cwd=elsewhere.parent, env={**os.environ, "PYTHONPATH": str(elsewhere)})


def test_wheel_holds_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    source = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "flashtile").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    with ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert "flashtile/py.typed" in packed
    assert packed == source


def test_metadata(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        (path,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(path))
    assert any(name.endswith("licenses/LICENSE") for name in names)
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert any(line.startswith("torch") for line in needed)
    assert not any(line.startswith(("triton", "numpy")) for line in needed), "torch brings the Triton that it was built with"
    assert metadata["Requires-Python"] == ">=3.10"


def test_installed_wheel_is_imported_and_runs(elsewhere: Path) -> None:
    code = """
import json, torch, flashtile
from importlib import metadata
cache = torch.ones(1, 8, 1, 8)
out = flashtile.decode(torch.ones(1, 1, 1, 8), cache, cache, torch.tensor([5], dtype=torch.int32))
found = {"file": flashtile.__file__, "version": flashtile.__version__, "installed": metadata.version("flashtile"), "out": out.sum().item()}
print(json.dumps(found))
"""
    found = json.loads(_python(elsewhere, code))
    assert Path(found["file"]).is_relative_to(elsewhere)
    assert found["version"] == found["installed"]
    assert found["out"] == pytest.approx(8.0)


def test_data_is_read_from_the_installed_wheel(elsewhere: Path) -> None:
    data = [path.relative_to(elsewhere).as_posix() for path in (elsewhere / "flashtile").rglob("*.json")]
    assert data, "the trace's quantiles are shipped"
    code = "import flashtile; print(len(flashtile.explain(flashtile.Problem(seqlen_k=4096), flashtile.Device.named('h200')).lines()))"
    assert int(_python(elsewhere, code)) > 5


def test_console_script(elsewhere: Path) -> None:
    script = elsewhere / "bin" / "flashtile"
    printed = _run(sys.executable, script, "--version", cwd=elsewhere.parent, env={**os.environ, "PYTHONPATH": str(elsewhere)})
    version = _python(elsewhere, "import flashtile; print(flashtile.__version__)").strip()
    assert printed.split() == ["flashtile", version]
