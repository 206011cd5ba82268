"""Tuned tables: tiles measured to be best, kept as JSON beside the code and reviewed like it.

``tuned/<arch>.json`` holds ``{"arch": ..., "rows": [{"key": [...], "tile": {...}}, ...]}``. A key is ``key_of(problem)``
of any problem of its bucket; a tile names its kernel, block_m, swapped, block_n, num_warps and num_stages, and num_splits
where the rule for splits is to be overruled too, by a grid.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources
from typing import Any

from flashtile.planner.device import Device, nearest_architecture
from flashtile.problem import Problem

Key = tuple[str, int, int, int, int, int]
TILE_FIELDS = ("kernel", "block_m", "swapped", "block_n", "num_warps", "num_stages")


def key_of(problem: Problem) -> Key:
    """(dtype, head dims, rows, and the powers of two at or above units and keys): what a tile hangs on, without the rest."""
    units, keys = _octave(problem.units), _octave(problem.keys_read)
    return problem.dtype_k, problem.head_dim, problem.head_dim_v, problem.rows, units, keys


def tuned_tile(problem: Problem, device: Device) -> dict[str, Any] | None:
    """The measured tile for the problem's bucket, if the device's architecture has a table with one."""
    table = tuned_table(nearest_architecture(device.arch)) if device.is_gpu else {}
    return table.get(key_of(problem)) if table else None


@lru_cache(maxsize=64)
def tuned_table(arch: str) -> dict[Key, dict[str, Any]]:
    """The rows of an architecture's table by key; empty where there is none."""
    file = resources.files("flashtile.planner") / "tuned" / f"{arch}.json"
    if not file.is_file():
        return {}
    return read_table(file.read_text(encoding="utf-8"))


def read_table(text: str) -> dict[Key, dict[str, Any]]:
    """A table's JSON text as a mapping; the last of several rows with one key wins."""
    rows: dict[Key, dict[str, Any]] = {}
    for row in json.loads(text)["rows"]:
        dtype, *numbers = row["key"]
        head_dim, head_dim_v, num_rows, units, keys = (int(number) for number in numbers)
        rows[(str(dtype), head_dim, head_dim_v, num_rows, units, keys)] = row["tile"]
    return rows


def _octave(count: int) -> int:
    return 1 << (count - 1).bit_length() if count > 0 else 0
