"""Tables of one operation's grids: targets, speeds beside peers, host times; and one problem's outcome in a line of a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import markdown
from benchmarks.targets import Goal, Row, best_rival, failures, geometric_mean, microseconds, outcome, ratio

LABELS = {"flashtile": "flashtile", "beside": "beside", "cudnn": "cuDNN", "fa3": "FA3", "fa4": "FA4",
          "torch_flash": "FA2 (torch)", "sdpa": "torch SDPA"}  # fmt: skip
EVERYONE = tuple(name for name in LABELS if name not in ("flashtile", "beside"))
Columns = tuple[list[str], list[list[str]]]
"""A table's header and its rows."""


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


def tables_of(
    operation: str,
    grids: Sequence[str],
    results: dict[str, dict[str, Any]],
    goals: Callable[[dict[str, list[Row]]], list[Goal]],
    table_of: Callable[[str, dict[str, Any]], str],
) -> dict[str, str]:
    """Markdown of an operation's targets and of each of its grids; ``results`` has the files by the tables' names."""
    files = {grid: results[f"{operation}-{grid}"] for grid in grids if f"{operation}-{grid}" in results}
    targets = targets_table(goals({grid: measured(data) for grid, data in files.items()}), files)
    made = {f"{operation}-{grid}": table_of(grid, files[grid]) if grid in files else "Not measured yet.\n" for grid in grids}
    return {f"{operation}-targets": targets, **made}


def targets_table(goals: list[Goal], files: dict[str, dict[str, Any]]) -> str:
    """Every target with what was reached, and the commit that the figure is from."""
    if all(goal.met is None for goal in goals):
        return "Not measured yet.\n"
    answers = {True: "yes", False: "**no**", None: "-"}
    commit = lambda goal: "-" if goal.met is None else files[goal.grid]["commit"]  # noqa: E731
    cells = [[goal.what, goal.bar, goal.reached + _unreached(files.get(goal.grid)), answers[goal.met], commit(goal)] for goal in goals]
    return markdown.table(["what, against whom", "target", "reached", "met", "commit"], cells)


def _unreached(data: dict[str, Any] | None) -> str:
    """What has to be said of a grid whose run was cut short."""
    if data is None or len(measured(data)) == len(data["entries"]):
        return ""
    return f" ({len(measured(data))} of the grid's {len(data['entries'])} problems measured)"


def measured(data: dict[str, Any]) -> list[Row]:
    """The rows of a result file that time was left for."""
    return [row for row in data["entries"] if not row.get("skipped")]


def grid_table(data: dict[str, Any], columns_of: Callable[[list[Row]], Columns], summary: str = "", misses: Sequence[str] = ()) -> str:
    """A grid's table with what was missed and what failed, and where it was measured."""
    rows = measured(data)
    header, cells = columns_of(rows)
    skipped = len(data["entries"]) - len(rows)
    parts = [
        f"**{summary}.**\n" if summary else "",
        markdown.table(header, cells) if cells else "",
        markdown.items("Misses", list(misses)),
        markdown.items("Failures", failures(rows)),
        f"Not reached in the time given: {skipped} problems.\n" if skipped else "",
        markdown.provenance(data),
    ]
    return "\n".join(part for part in parts if part)


def mean_in_words(rows: list[Row], against: tuple[str, ...], labels: dict[str, str] = LABELS, figure: Any = ratio) -> str:
    """How many times as fast as the fastest of some peers, over all problems; nothing where none was timed."""
    ratios = [value for row in rows if (value := figure(row, against))]
    if not ratios:
        return ""
    whom = "the fastest" if len(against) > 1 else labels[against[0]]
    return f"{geometric_mean(ratios):.3f}x {whom} (geometric mean of {len(ratios)} problems), {min(ratios):.3f}x to {max(ratios):.3f}x"


def speeds(
    rows: list[Row],
    rivals: tuple[str, ...],
    plan: tuple[str, Callable[[Row], str]],
    labels: dict[str, str] = LABELS,
    figure: Callable[[Row, tuple[str, ...]], float | None] = ratio,
) -> Columns:
    """TFLOP/s of each contestant; microseconds of ours. ``plan`` is the head of its column, and a row's plan in words."""
    shown = [name for name in labels if name != "flashtile" and any(microseconds(row, name) for row in rows)]
    against = tuple(name for name in shown if name in rivals)
    header = ["problem", plan[0], "us", "flashtile", *(labels[name] for name in shown), "against", "x"]
    cells = []
    for row in rows:
        results = row.get("results", {})
        rates = [markdown.rate(results.get(name, {}).get("tflops")) for name in ("flashtile", *shown)]
        rival = best_rival(row, against)
        last = [labels[rival[0]] if rival else "-", markdown.times(figure(row, against), 3)]
        cells.append([row["name"], plan[1](row), markdown.us(microseconds(row)), *rates, *last])
    return header, cells


def host_times(rows: list[Row]) -> Columns:
    """GPU time and host time of each contestant, in microseconds."""
    of = lambda row, name: row.get("results", {}).get(name, {})  # noqa: E731
    shown = [name for name in LABELS if any("host_us" in of(row, name) for row in rows)]
    header = ["problem", *(f"{LABELS[name]} GPU / host" for name in shown)]
    pair = lambda result: f"{markdown.us(result.get('gpu_us'))} / {markdown.us(result.get('host_us'))}"  # noqa: E731
    return header, [[row["name"], *(pair(of(row, name)) for name in shown)] for row in rows]
