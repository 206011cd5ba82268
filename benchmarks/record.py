"""The head of results/*.json: commit, device, versions and protocol of what was measured."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from flashtile.testing.record import Record as Record


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
