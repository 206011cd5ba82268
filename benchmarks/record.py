"""results/*.json: what was measured, with commit, device, versions and protocol; written after every entry."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1


@dataclass
class Record:
    """One result file. ``begin`` notes which entry runs, and ``step`` whose turn it is: a resumed run knows what killed the last."""

    path: Path
    head: dict[str, Any]
    entries: list[dict[str, Any]] = field(default_factory=list)
    running: str | None = None

    @classmethod
    def open(cls, path: Path, head: dict[str, Any], resume: bool, left_out: Collection[str] = ()) -> Record:
        """A new file, or an earlier one to go on with; an entry during which one of those ``left_out`` died is measured again."""
        record = cls(path, head)
        if resume and path.exists():
            earlier = json.loads(path.read_text())
            record.entries = [entry for entry in earlier["entries"] if not entry.get("skipped")]
            crashed, step = earlier.get("running"), earlier.get("step")
            if crashed and step not in left_out:
                where = f" ({step})" if step else ""
                record.add({"name": crashed, "failed": f"the process died or was stopped here{where}"})
        return record

    def has(self, name: str) -> bool:
        return any(entry["name"] == name for entry in self.entries)

    def begin(self, name: str) -> None:
        self.running = name
        self._write()

    def step(self, name: str) -> None:
        """Notes whose turn it is in the entry that runs."""
        self._write(name)

    def add(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        self.running = None
        self._write()

    def _write(self, step: str | None = None) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = {"schema": SCHEMA, **self.head, "entries": self.entries}
        if self.running:
            data["running"] = self.running
            data["step"] = step
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(data, indent=1) + "\n")
        os.replace(partial, self.path)


def heading(grid: str, device: torch.device, commit: str, protocol: str, peers_missing: dict[str, str]) -> dict[str, Any]:
    """Everything about a run but its numbers."""
    return {
        "grid": grid,
        "commit": commit or _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": _device_name(device),
        "driver": _driver(device),
        "versions": _versions(),
        "protocol": protocol,
        "peers_missing": peers_missing,
    }


def _commit() -> str:
    """The checkout's commit, marked where files differ from it; "unknown" without git."""
    here = Path(__file__).parent
    try:
        run = lambda *args: subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()  # noqa: E731
        changed = run("status", "--porcelain", "--untracked-files=no")
        return run("rev-parse", "--short=12", "HEAD") + (" with local changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def _driver(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    if torch.backends.cudnn.is_available():
        versions["cudnn"] = str(torch.backends.cudnn.version())
    for package in ("triton", "flashinfer-python", "flash-attn-4"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
