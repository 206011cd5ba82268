"""Tuned tables: tiles measured to be best, kept as JSON beside the code and reviewed like it.

The user's own (``user_tables.py``), of the very GPU, come before the shipped ones, of an architecture.

``tuned/<arch>.json`` holds ``{"arch": ..., "rows": [{"key": [...], "tile": {...}}, ...]}``. A key is ``key_of(problem)``
of any problem of its bucket. A decode tile names its kernel, block_m, swapped, block_n, num_warps and num_stages, and
num_splits where the rule for splits is to be overruled too, by a grid; a forward tile has the fields of ForwardTile, a backward
tile those of a BackwardPlan.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources
from typing import Any

from flashtile.planner.device import Device, nearest_architecture
from flashtile.planner.user_tables import user_table
from flashtile.problem import Problem

Key = tuple[str | int, ...]
TILE_FIELDS = ("kernel", "block_m", "swapped", "block_n", "num_warps", "num_stages")


def key_of(problem: Problem) -> Key:
    """What a tile hangs on, without the rest; lengths and counts as the powers of two at or above them.

    Decode: (dtype, head dims, rows, units, keys). Forward and backward: (operation, dtype, head dims, mask, queries, keys,
    sequences x heads).
    """
    if problem.operation != "decode":
        band = problem.band
        mask = "full" if band.is_full else "causal" if band.left is None and band.right == 0 else "window"
        lengths = (_octave(problem.seqlen_q), _octave(problem.keys_read), _octave(problem.batch * problem.num_heads_q))
        return (problem.operation, problem.dtype_k, problem.head_dim, problem.head_dim_v, mask, *lengths)
    units, keys = _octave(problem.units), _octave(problem.keys_read)
    return problem.dtype_k, problem.head_dim, problem.head_dim_v, problem.rows, units, keys


def tuned_tile(problem: Problem, device: Device) -> dict[str, Any] | None:
    """The measured tile for the problem's bucket, if the device's architecture has a table with one."""
    table = tuned_table(nearest_architecture(device.arch)) if device.is_gpu else {}
    return _held_by_pages(problem, table.get(key_of(problem)))


def own_tile(problem: Problem, device: Device) -> dict[str, Any] | None:
    """The same from the user's table of this GPU."""
    table = user_table(device.name, device.arch) if device.is_gpu and problem.operation == "decode" else {}
    return _held_by_pages(problem, table.get(key_of(problem)))


def _held_by_pages(problem: Problem, tile: dict[str, Any] | None) -> dict[str, Any] | None:
    """A decode tile was measured without pages: they have to hold its key tiles whole, or else it says nothing."""
    if tile is not None and problem.operation == "decode" and problem.page_size % tile["block_n"]:
        return None
    return tile


@lru_cache(maxsize=64)
def tuned_table(arch: str) -> dict[Key, dict[str, Any]]:
    """The rows of an architecture's table by key; empty where there is none."""
    file = resources.files("flashtile.planner") / "tuned" / f"{arch}.json"
    if not file.is_file():
        return {}
    return read_table(file.read_text(encoding="utf-8"))


def read_table(text: str) -> dict[Key, dict[str, Any]]:
    """A table's JSON text as a mapping; the last of several rows with one key wins."""
    return {tuple(row["key"]): row["tile"] for row in json.loads(text)["rows"]}


def _octave(count: int) -> int:
    return 1 << (count - 1).bit_length() if count > 0 else 0
