"""The tables of training in docs/performance.md."""

from __future__ import annotations

from typing import Any

from benchmarks import backward_targets
from benchmarks.backward_grids import EVERY_NAME
from benchmarks.backward_targets import FIGURE_OF, RIVALS_OF
from benchmarks.speed_tables import EVERYONE, LABELS, Columns, grid_table, host_times, mean_in_words, measured, speeds, tables_of
from benchmarks.targets import Row, ratio

BESIDE = {"gqa": "32/32 heads", "varlen": "the even batch"}
TABLES = ("backward-targets", *(f"backward-{grid}" for grid in EVERY_NAME))


def tables(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Markdown of each table of training; ``results`` has the files by the tables' names."""
    return tables_of("backward", EVERY_NAME, results, backward_targets.goals, _table)


def _table(grid: str, data: dict[str, Any]) -> str:
    rows, figure = measured(data), FIGURE_OF.get(grid, ratio)
    summary = mean_in_words(rows, RIVALS_OF[grid], _labels(grid), figure) if grid in RIVALS_OF else ""
    summary = _line_in_words(rows) if grid == "memory" else summary
    return grid_table(data, lambda rows: _columns(grid, rows), summary, backward_targets.misses(grid, rows))


def _columns(grid: str, rows: list[Row]) -> Columns:
    if grid == "host":
        return host_times(rows)
    if grid == "memory":
        return _memory(rows)
    plan = ("plan", _plan) if grid != "block" else ("weights", _weights)
    return speeds(rows, RIVALS_OF.get(grid, EVERYONE), plan, _labels(grid), FIGURE_OF.get(grid, ratio))


def _labels(grid: str) -> dict[str, str]:
    return LABELS | {"beside": BESIDE.get(grid, LABELS["beside"])}


def _memory(rows: list[Row]) -> Columns:
    """Peak MiB of a step of each contestant, and KiB a token of ours."""
    shown = [name for name in LABELS if backward_targets.peaks(rows, name)]
    header = ["problem", *(f"{LABELS[name]}, MiB" for name in shown), "KiB a token"]
    cells = []
    for row in rows:
        of = {name: peak for name in shown for _, peak in backward_targets.peaks([row], name)}
        mebibytes = [f"{of[name] / 2**20:.1f}" if name in of else "-" for name in shown]
        own = [f"{peak / tokens / 2**10:.2f}" for tokens, peak in backward_targets.peaks([row])]
        cells.append([row["name"], *mebibytes, *(own or ["-"])])
    return header, cells


def _line_in_words(rows: list[Row]) -> str:
    """The straight line through our peaks; nothing where there are too few."""
    points = backward_targets.peaks(rows)
    if len(points) < 3:
        return ""
    line = backward_targets.line_through(points)
    return f"{line.fixed / 2**20:.1f} MiB and {line.a_token / 2**10:.2f} KiB a token, within {line.off:.1%}"


def _weights(row: Row) -> str:
    return f"{row['num_heads_q']}/{row['num_heads_kv']} heads, {row['hidden']} and {row['mlp']} features" if "mlp" in row else "-"


def _plan(row: Row) -> str:
    """Rows owned x rows a step, warps and stages of each pass, and programs that stay."""
    if not (plan := row.get("plan")):
        return "-"
    kernel, programs = plan["kernel"].partition(".")[0], plan["num_programs"] or "-"
    keys = f"{plan['block_n']} x {plan['block_m']}, {plan['num_warps']}, {plan['num_stages']}"
    if plan.get("one_pass"):
        return f"{kernel} {keys}, one pass; {programs}"
    queries = f"{plan['dq_block_m']} x {plan['dq_block_n']}, {plan['dq_num_warps']}, {plan['dq_num_stages']}"
    return f"{kernel} {keys}; {queries}; {programs}"
