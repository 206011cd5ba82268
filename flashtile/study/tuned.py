"""Tuned tables from a study: for each bucket of problems the plan that beat the planner's choice, where one did by more than noise."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from flashtile.planner.choose import plan_for_tile
from flashtile.planner.device import Device
from flashtile.planner.table import Key, key_of
from flashtile.planner.user_tables import KIND, VERSION
from flashtile.study.document import Document
from flashtile.study.points import Point
from flashtile.study.rows import TILE_COLUMNS, Row

GAIN = 0.02  # what a tile has to gain on average over a bucket's problems: less is noise, or another day's
Plan = tuple[Any, ...]


@dataclass(frozen=True)
class Tuned:
    """One row of a table: the bucket, the tile as tables write it, its time over the planner's on average, and on which problems."""

    key: Key
    tile: dict[str, Any]
    ratio: float
    problems: tuple[str, ...]


def tuned_rows(document: Document) -> list[Tuned]:
    """A row for each bucket in which one plan gained GAIN over the planner's choice on average, and lost beyond the spread nowhere."""
    buckets: dict[Key, dict[Point, list[Row]]] = defaultdict(dict)
    chosen: dict[Point, Row] = {}
    for entry in document.entries:
        if entry.chosen is not None:
            chosen.setdefault(entry.point, entry.chosen)
            rows = buckets[key_of(entry.point.problem)].setdefault(entry.point, [])
            scale = chosen[entry.point].us / entry.chosen.us  # one stage's run against another's
            rows += [row._replace(us=row.us * scale) for row in entry.rows]
    found = []
    for key, points in buckets.items():
        best = _best(document.figures, points, chosen)
        if best is not None:
            found.append(Tuned(key, *best, tuple(point.name for point in points)))
    return found


def _best(device: Device, points: dict[Point, list[Row]], chosen: dict[Point, Row]) -> tuple[dict[str, Any], float] | None:
    """(tile, ratio) of the plan that was timed at every point of a bucket and gained most."""
    ratios: dict[Plan, list[float]] = defaultdict(list)
    tiles: dict[Plan, dict[str, Any]] = {}
    for point, rows in points.items():
        at_point: dict[Plan, float] = {}
        for row in rows:
            tile = as_tile(row, point, device)
            if tile is None or row.us > chosen[point].us * (1 + row.spread + chosen[point].spread):
                continue
            name = tuple(tile.items())
            tiles[name] = tile
            at_point[name] = min(row.us / chosen[point].us, at_point.get(name, 9.0))
        for name, ratio in at_point.items():
            ratios[name].append(ratio)
    everywhere = {name: geometric_mean(some) for name, some in ratios.items() if len(some) == len(points)}
    if not everywhere:
        return None
    name = min(everywhere, key=lambda one: everywhere[one])
    return (tiles[name], everywhere[name]) if everywhere[name] < 1 - GAIN else None


def as_tile(row: Row, point: Point, device: Device) -> dict[str, Any] | None:
    """A row as tables write it: its splits where the rule for its tile has others; None for a schedule that no table can ask for.

    Nor may one ask for a grid where the rule has programs share all key tiles: sequences of a study are of one length, so that a grid is
    the faster there, and with one long sequence among short ones many times the slower.
    """
    tile: dict[str, Any] = {name: getattr(row, name) for name in TILE_COLUMNS}
    plan = plan_for_tile(point.problem, device, row.tile)
    if (plan.num_splits, plan.num_programs) == (row.num_splits, row.num_programs):
        return tile
    return None if row.num_programs or plan.num_programs else tile | {"num_splits": row.num_splits}


def table_of(document: Document, rows: list[Tuned]) -> dict[str, Any]:
    """The table of the device that was studied, as JSON."""
    device = document.figures
    return {
        "what": KIND,
        "version": VERSION,
        "device": device.name,
        "arch": device.arch,
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "from": {name: document.head.get(name) for name in ("basis", "date", "commit", "versions", "protocol")},
        "rows": [{"key": list(row.key), "tile": row.tile, "ratio": round(row.ratio, 4), "problems": list(row.problems)} for row in rows],
    }


def write(table: dict[str, Any], path: Path) -> None:
    """Writes a table in one step, a row a line: whoever reads it meanwhile sees the old one or the new one."""
    rows = ",\n".join(json.dumps(row) for row in table["rows"])
    head = ",\n ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in table.items() if name != "rows")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("{" + head + ',\n "rows": [\n' + rows + "\n]}\n", encoding="utf-8")
    os.replace(partial, path)
