"""Tables that ``flashtile tune`` wrote for this machine's GPUs: in the user's cache directory, a file for each GPU by its driver's name.

A file that cannot be used is passed over with one warning that says why; nothing else changes.
"""

from __future__ import annotations

import json
import re
import warnings
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flashtile.planner.catalog import kernels_of

KIND = "flashtile tuned table"
VERSION = 1  # to be raised where kernels change so much that tiles measured before no longer hold
TILE_TYPES = {"kernel": str, "block_m": int, "swapped": bool, "block_n": int, "num_warps": int, "num_stages": int}
KEY_TYPES = (str, int, int, int, int, int)

Table = dict[tuple[str | int, ...], dict[str, Any]]


class TunedTableWarning(UserWarning):
    """A tuned table in the user's cache directory is passed over."""


def folder() -> Path | None:
    """Where the user's tables lie; None where platformdirs is not installed (sources that are run without what they depend on)."""
    if find_spec("platformdirs") is None:
        return None
    from platformdirs import user_cache_path

    return user_cache_path("flashtile", appauthor=False) / "tuned"


def path_of(device_name: str) -> Path | None:
    """The file of the GPU of that name, whether it is there or not; None where there is no place for one."""
    place = folder()
    return None if place is None else place / f"{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


@lru_cache(maxsize=64)
def user_table(device_name: str, arch: str) -> Table:
    """The rows of a GPU's table by key; empty where there is none, or none that can be used: then with a TunedTableWarning."""
    path = path_of(device_name)
    if path is None or not path.is_file():
        return {}
    try:
        return read(path.read_text(encoding="utf-8"), device_name, arch)
    except (OSError, ValueError) as error:
        advice = "Run flashtile tune to make it anew, or remove it."
        warnings.warn(f"The tuned table {path} is passed over: {error}. {advice}", TunedTableWarning, stacklevel=2)
        return {}


def read(text: str, device_name: str, arch: str) -> Table:
    """A table's JSON text as a mapping; raises ValueError that says why it cannot be used."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"it is no JSON ({error})") from error
    if not isinstance(data, dict) or data.get("what") != KIND:
        raise ValueError(f"it is no {KIND}")
    if data.get("version") != VERSION:
        raise ValueError(f"it is of version {data.get('version')}, and these kernels want version {VERSION}")
    if (data.get("device"), data.get("arch")) != (device_name, arch):
        raise ValueError(f"it is of {data.get('device')} ({data.get('arch')}), and this GPU is {device_name} ({arch})")
    rows = data.get("rows")
    if not isinstance(rows, list):
        raise ValueError("it has no rows")
    return dict(_row(index, row) for index, row in enumerate(rows))


def _row(index: int, row: Any) -> tuple[tuple[str | int, ...], dict[str, Any]]:
    """One row's key and tile; ValueError where a field is missing, unknown or of another type, or the kernel is unknown."""
    key, tile = (row.get("key"), row.get("tile")) if isinstance(row, dict) else (None, None)
    if not isinstance(key, list) or len(key) != len(KEY_TYPES) or not all(type(v) is kind for v, kind in zip(key, KEY_TYPES)):
        raise ValueError(f"row {index} has no key of dtype, head dims, rows, units and keys")
    wanted = TILE_TYPES | ({"num_splits": int} if isinstance(tile, dict) and "num_splits" in tile else {})
    if not isinstance(tile, dict) or tile.keys() != wanted.keys() or not all(type(tile[name]) is kind for name, kind in wanted.items()):
        raise ValueError(f"row {index} has no tile of {', '.join(TILE_TYPES)}")
    if tile["kernel"] not in {kernel.name for kernel in kernels_of("decode")}:
        raise ValueError(f"row {index} names the kernel {tile['kernel']!r}, which is not here")
    return tuple(key), tile
