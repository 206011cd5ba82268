"""The forward tables of docs/performance.md, and one problem's outcome in a line of a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import forward_targets, markdown
from benchmarks.forward_grids import GRID_NAMES
from benchmarks.targets import Goal, Row, best_rival, failures, geometric_mean, microseconds, outcome, ratio

LABELS = {"flashtile": "flashtile", "beside": "without pages", "cudnn": "cuDNN", "fa3": "FA3", "fa4": "FA4",
          "torch_flash": "FA2 (torch)", "sdpa": "torch SDPA"}  # fmt: skip
TARGETS = "forward-targets"
TABLES = (TARGETS, *(f"forward-{grid}" for grid in GRID_NAMES))
EVERYONE = tuple(name for name in LABELS if name not in ("flashtile", "beside"))


def line(row: Row) -> str:
    """One problem's outcome."""
    name = row["name"]
    if "failed" in row:
        return f"{name:34} FAILED {row['failed'][:160]}"
    own = row["results"].get("flashtile", {})
    words = [
        f"{name:34} {own['gpu_us']:9.1f} us {own['tflops']:6.1f} TFLOP/s" if "gpu_us" in own else f"{name:34} flashtile {outcome(own)}"
    ]
    for peer in (*EVERYONE, "beside"):
        result = row["results"].get(peer, {})
        if "gpu_us" in result:
            share = f" ({result['ratio']:.3f}x)" if "ratio" in result else ""
            words.append(f"{peer} {result['tflops']:.1f}{share}{' eager' if 'eager' in result else ''}")
    if "host_us" in own:
        words.append(f"host {own['host_us']:.1f} us")
    words += [f"{peer} {outcome(r)[:80]}" for peer, r in row["results"].items() if peer != "flashtile" and ("failed" in r or "wrong" in r)]
    return ", ".join(words)


def tables(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Markdown of each forward table; ``results`` has the files by the tables' names."""
    by_grid = {grid: results[f"forward-{grid}"] for grid in GRID_NAMES if f"forward-{grid}" in results}
    made = {f"forward-{grid}": _table(grid, by_grid[grid]) if grid in by_grid else "Not measured yet.\n" for grid in GRID_NAMES}
    rows = {grid: measured(data) for grid, data in by_grid.items()}
    return {TARGETS: targets_table(forward_targets.goals(rows), by_grid), **made}


def targets_table(goals: list[Goal], files: dict[str, dict[str, Any]]) -> str:
    """Every target with what was reached, and the commit that the figure is from."""
    if all(goal.met is None for goal in goals):
        return "Not measured yet.\n"
    answers = {True: "yes", False: "**no**", None: "-"}
    commit = lambda goal: "-" if goal.met is None else files[goal.grid]["commit"]  # noqa: E731
    cells = [[goal.what, goal.bar, goal.reached, answers[goal.met], commit(goal)] for goal in goals]
    return markdown.table(["what, against whom", "target", "reached", "met", "commit"], cells)


def measured(data: dict[str, Any]) -> list[Row]:
    """The rows of a result file that time was left for."""
    return [row for row in data["entries"] if not row.get("skipped")]


def _table(grid: str, data: dict[str, Any]) -> str:
    rows = measured(data)
    header, cells = _COLUMNS.get(grid, _speeds)(grid, rows)
    skipped = len(data["entries"]) - len(rows)
    parts = [
        _summary(grid, rows),
        markdown.table(header, cells) if cells else "",
        markdown.items("Misses", forward_targets.misses(grid, rows)),
        markdown.items("Failures", failures(rows)),
        f"Not reached in the time given: {skipped} problems.\n" if skipped else "",
        markdown.provenance(data),
    ]
    return "\n".join(part for part in parts if part)


def _summary(grid: str, rows: list[Row]) -> str:
    against = forward_targets.RIVALS_OF.get(grid, ())
    ratios = [value for row in rows if (value := ratio(row, against))]
    if not ratios:
        return ""
    whom = "the fastest" if len(against) > 1 else LABELS[against[0]]
    shown = f"{geometric_mean(ratios):.3f}x {whom} (geometric mean of {len(ratios)} problems), {min(ratios):.3f}x to {max(ratios):.3f}x"
    return f"**{shown}.**\n" if grid != "chunked" else ""


def _speeds(grid: str, rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """TFLOP/s of each contestant; microseconds of ours."""
    shown = [name for name in LABELS if name != "flashtile" and any(microseconds(row, name) for row in rows)]
    against = [name for name in shown if name in forward_targets.RIVALS_OF.get(grid, EVERYONE)]
    header = ["problem", "tile, warps, stages, programs", "us", "flashtile", *(LABELS[name] for name in shown), "against", "x"]
    cells = []
    for row in rows:
        speeds = [markdown.whole(forward_targets.tflops(row, name)) for name in ("flashtile", *shown)]
        rival = best_rival(row, tuple(against))
        last = [LABELS[rival[0]] if rival else "-", markdown.times(ratio(row, tuple(against)), 3)]
        cells.append([row["name"], _tile(row.get("plan")), markdown.us(microseconds(row)), *speeds, *last])
    return header, cells


def _host_times(grid: str, rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    of = lambda row, name: row.get("results", {}).get(name, {})  # noqa: E731
    shown = [name for name in LABELS if any("host_us" in of(row, name) for row in rows)]
    header = ["problem", *(f"{LABELS[name]} GPU / host" for name in shown)]
    pair = lambda result: f"{markdown.us(result.get('gpu_us'))} / {markdown.us(result.get('host_us'))}"  # noqa: E731
    return header, [[row["name"], *(pair(of(row, name)) for name in shown)] for row in rows]


def _tile(plan: dict[str, Any] | None) -> str:
    if not plan:
        return "-"
    kernel = plan["kernel"].partition(".")[0]
    return f"{kernel} {plan['block_m']} x {plan['block_n']}, {plan['num_warps']}, {plan['num_stages']}, {plan['num_programs'] or '-'}"


_COLUMNS: dict[str, Callable[[str, list[Row]], tuple[list[str], list[list[str]]]]] = {"host": _host_times}
