"""Scripts of benchmarks/ run on shrunk problems."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner


def dry_run(main: Callable[..., None], folder: Path, *flags: str) -> dict[str, Any]:
    """The result files in ``folder`` by their names, once a script has run there on a CPU."""
    app = typer.Typer()
    app.command()(main)
    outcome = CliRunner().invoke(app, ["--device", "cpu", "--dry-run", "--rounds", "1", "--out", str(folder), *flags])
    assert outcome.exit_code == 0, outcome.output
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
