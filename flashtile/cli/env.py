"""``flashtile env``: what is installed, what the hardware is, and which kernels can run here."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import flashtile
from flashtile.cli.device import device_name
from flashtile.cli.output import AsJson, console, print_json, table
from flashtile.planner.catalog import CATALOG
from flashtile.planner.device import Device
from flashtile.problem import Problem

UNITS = {
    "smem_per_block": "bytes",
    "smem_per_sm": "bytes",
    "l2_bytes": "bytes",
    "bandwidth": "bytes/s",
    "matrix_rate": "FLOP/s",
    "vector_rate": "FLOP/s",
    "exp_rate": "exp2/s",
    "launch_us": "us",
}
SAMPLE = Problem(batch=1, seqlen_q=1, seqlen_k=4096, num_heads_q=32, num_heads_kv=8, head_dim=128)
SAMPLE_TEXT = "bfloat16 decode, 32/8 heads, head dim 128"


def env(as_json: AsJson = False) -> None:
    """Say what is installed, what the hardware is, and which kernels can run here."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(num_gpus))]
    facts: dict[str, Any] = {
        "versions": _versions(),
        "platform": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "toolchain": _toolchain(),
        "devices": [_device_facts(device) for device in devices],
    }
    if as_json:
        print_json(facts)
    else:
        _render(facts)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "flashtile": flashtile.__version__}
    for name in ("torch", "triton", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    if torch.version.cuda:
        versions["torch built for"] = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        versions["torch built for"] = f"ROCm {torch.version.hip}"
    else:
        versions["torch built for"] = "CPU"
    return versions


def _toolchain() -> dict[str, str | bool]:
    """Triton builds a small C launcher the first time that it meets a GPU."""
    compiler = c_compiler()
    configured = os.environ.get("CC")
    missing = f"CC names {configured}, which is not found" if configured else "not found"
    cure = "unset CC or correct it" if configured else "install gcc or clang (Debian: apt install gcc)"
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    first = "Triton needs it at its first launch"
    return {
        "c_compiler": compiler or f"{missing}: {first}; {cure}",
        "c_compiler_found": compiler is not None,
        "python_headers": str(headers) if headers.exists() else f"{headers} not found: {first} (Debian: apt install python3-dev)",
        "python_headers_found": headers.exists(),
    }


def c_compiler() -> str | None:
    """What ``kernels.launch.c_compiler`` says, without an import of Triton: CC where it is set, else gcc, else clang."""
    configured = os.environ.get("CC")
    names = (configured,) if configured else ("gcc", "clang")
    return next((path for path in map(shutil.which, names) if path), None)


def _device_facts(device: torch.device) -> dict[str, Any]:
    planned = Device.of(device)
    return {
        "device": str(device),
        "name": device_name(device),
        "driver": _driver() if device.type == "cuda" else None,
        "figures": asdict(planned),
        "kernels": {kernel.name: list(kernel.reasons_against(SAMPLE.with_(operation=kernel.operation), planned)) for kernel in CATALOG},
    }


def _driver() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown (nvidia-smi is not on the path)"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.split()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({error})"
    return lines[0] if lines else "unknown (nvidia-smi says nothing)"


def _render(facts: dict[str, Any]) -> None:
    software = table("Software", "what", "version", left=2)
    for name, version in facts["versions"].items():
        software.add_row(name, version)
    software.add_row("platform", facts["platform"])
    software.add_row("C compiler", facts["toolchain"]["c_compiler"])
    software.add_row("Python headers", facts["toolchain"]["python_headers"])
    console.print(software)
    for device in facts["devices"]:
        figures = table(f"{device['name']}: what the planner reckons with", "figure", "value", "unit", left=1)
        if device["driver"]:
            figures.add_row("driver", device["driver"], "")
        for name, value in device["figures"].items():
            figures.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value), UNITS.get(name, ""))
        console.print(figures)
        kernels = table(f"{device['name']}: kernels ({SAMPLE_TEXT})", "kernel", "can run here", left=2)
        for name, reasons in device["kernels"].items():
            kernels.add_row(name, "; ".join(reasons) or "[green]yes[/green]")
        console.print(kernels)
