"""What the CPU benchmarks share: calls timed in turn with a peer's, the machine they ran on, and a table."""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

WORTH_COMPARING_US = 100.0
TARGET = 0.95


def in_turn(ours: Callable[[], torch.Tensor], peer: Callable[[], torch.Tensor], seconds: float) -> list[tuple[float, float]]:
    """Median and fastest tenth, in microseconds, of calls that alternate for about ``seconds``, at least five of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for call in (ours, peer):
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for taken, call in zip(times, (ours, peer)):
            start = time.perf_counter()
            call()
            taken.append((time.perf_counter() - start) * 1e6)
    return [(statistics.median(taken), sorted(taken)[len(taken) // 10]) for taken in times]


def machine() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),  # processes that wanted a core, this one's threads included: far above the threads, medians mean little
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    )
    return names[0] if names else platform.processor()


def report(title: str, rows: list[dict[str, Any]]) -> None:
    """A table, and how many problems miss the target by the median and by the fastest tenth."""
    table = Table("problem", "flashtile us", "SDPA us", "speedup", "fastest tenth", title=title)
    compared = [row for row in rows if row["sdpa_fastest_tenth_us"] >= WORTH_COMPARING_US]
    for row in rows:
        style = "red" if row in compared and row["speedup"] < TARGET else None
        times = f"{row['flashtile_us']:.0f}", f"{row['sdpa_us']:.0f}"
        table.add_row(row["name"], *times, f"{row['speedup']:.2f}x", f"{row['speedup_fastest_tenth']:.2f}x", style=style)
    console = Console()
    console.print(table)
    for key in ("speedup", "speedup_fastest_tenth") if compared else ():
        mean = math.exp(statistics.fmean(math.log(row[key]) for row in compared))
        missed = sum(row[key] < TARGET for row in compared)
        console.print(f"{key}: {len(compared)} problems of {WORTH_COMPARING_US:.0f} us or more, mean {mean:.2f}x, {missed} below {TARGET}x")
