"""The forward tables of docs/performance.md."""

from __future__ import annotations

from typing import Any

from benchmarks import forward_targets
from benchmarks.forward_grids import GRID_NAMES
from benchmarks.speed_tables import EVERYONE, LABELS, Columns, grid_table, host_times, mean_in_words, measured, speeds, tables_of
from benchmarks.targets import Row

NAMES = LABELS | {"beside": "without pages"}
TABLES = ("forward-targets", *(f"forward-{grid}" for grid in GRID_NAMES))


def tables(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Markdown of each forward table; ``results`` has the files by the tables' names."""
    return tables_of("forward", GRID_NAMES, results, forward_targets.goals, _table)


def _table(grid: str, data: dict[str, Any]) -> str:
    rivals = forward_targets.RIVALS_OF.get(grid, ())
    rows = measured(data)
    summary = mean_in_words(rows, rivals, NAMES) if grid != "chunked" else ""
    return grid_table(data, lambda rows: _columns(grid, rows), summary, forward_targets.misses(grid, rows))


def _columns(grid: str, rows: list[Row]) -> Columns:
    if grid == "host":
        return host_times(rows)
    return speeds(rows, forward_targets.RIVALS_OF.get(grid, EVERYONE), ("tile, warps, stages, programs", _tile), NAMES)


def _tile(row: Row) -> str:
    if not (plan := row.get("plan")):
        return "-"
    kernel = plan["kernel"].partition(".")[0]
    return f"{kernel} {plan['block_m']} x {plan['block_n']}, {plan['num_warps']}, {plan['num_stages']}, {plan['num_programs'] or '-'}"
