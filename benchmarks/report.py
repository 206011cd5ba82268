"""Turns results/*.json into the tables of docs/performance.md: ``python -m benchmarks.report [--check]``.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is a grid's (``forward-NAME`` of forward's, ``backward-NAME``
of backward's), or ``targets`` for what decode is held to, ``forward-targets`` for forward, ``backward-targets`` for backward; or
``transformers`` and ``distributed`` for whole systems, ``sanitize`` for compute-sanitizer, ``gpu-tests`` for the tests on a GPU.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import (
    backward_report,
    choices,
    forward_report,
    gpu_tests_report,
    kvcache_targets,
    markdown,
    sanitize_report,
    speed_tables,
    system_report,
    targets,
)
from benchmarks.markdown import times, us
from benchmarks.targets import Row

GRIDS = ("seqlen1", "speculative", "paged", "ragged", "fp8", "kvcache", "floor", "search", "sweep", "host", "cpu")
TABLES = ("targets", *GRIDS, *forward_report.TABLES, *backward_report.TABLES, *system_report.TABLES, "sanitize", "gpu-tests")
HERE = Path(__file__).parent
LABELS = {
    "flashtile": "flashtile", "fa2": "FA2", "fa3": "FA3", "flashinfer_tc": "FlashInfer tc", "flashinfer_cc": "FlashInfer cc",
    "cudnn": "cuDNN", "torch_flash": "torch flash", "sdpa": "torch SDPA",
}  # fmt: skip
_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


class StaleReport(Exception):
    """A document does not show what the results say."""


def line(row: Row) -> str:
    """One entry's outcome in one line of a terminal."""
    name = row["name"]
    if "failed" in row:
        return f"{name:32} FAILED {row['failed'][:160]}"
    if "regret" in row:
        found = f"best found {row['best_us']:9.2f} us, regret {row['regret']:.1%} ({row['searched']['timed']} timed)"
        return f"{name:32} {row['planner_us']:9.2f} us, {found}"
    own = row["results"].get("flashtile", {})
    if "gpu_us" not in own:
        return f"{name:32} flashtile {targets.outcome(own)}"
    words = [f"{name:32} {own['gpu_us']:9.2f} us"]
    if (share := targets.of_floor(row)) is not None:
        words.append(f"{share:6.1%} of the floor")
    sooner = targets.sooner_than_beside(row) if row.get("dtype_kv") else None
    if sooner is not None:
        words.append(f"{sooner:.2f}x as fast as in 16 bits")
    elif (beside := targets.beside_ratio(row)) is not None:
        words.append(f"{beside:.2f}x beside")
    rivals = (*targets.RIVALS, "sdpa")
    if (rival := targets.best_rival(row, rivals)) is not None:
        words.append(f"best peer {rival[0]} {rival[1]:.2f} us ({rival[1] / own['gpu_us']:.2f}x)")
    if "host_us" in own:
        words.append(f"host {own['host_us']:.1f} us")
    troubles = [f"{peer} {targets.outcome(result)[:60]}" for peer, result in row["results"].items() if result.keys() & {"wrong", "failed"}]
    return ", ".join(words + troubles)


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Each table's result file, where there is one."""
    files = {grid: folder / f"decode_{grid}.json" for grid in GRIDS}
    others = [name for name in (*forward_report.TABLES, *backward_report.TABLES) if not name.endswith("-targets")]
    files |= {name: folder / f"{name.replace('-', '_')}.json" for name in others}
    files |= {name: folder / f"{name}.json" for name in ("sanitize", "gpu_tests")}
    files |= {name: folder / f"{file}.json" for name, file in system_report.TABLES.items()}
    return {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}


def tables(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Markdown of each table."""
    made = {grid: _table(grid, results[grid]) if grid in results else "Not measured yet.\n" for grid in GRIDS}
    checks = {
        "sanitize": sanitize_report.table(results["sanitize"]) if "sanitize" in results else sanitize_report.NOT_YET,
        "gpu-tests": gpu_tests_report.tables(results)["gpu-tests"],
    }
    others = (forward_report.tables(results), backward_report.tables(results), system_report.tables(results))
    return {"targets": _targets(results), **made, **{name: table for some in others for name, table in some.items()}, **checks}


def _targets(results: dict[str, dict[str, Any]]) -> str:
    rows = {grid: speed_tables.measured(results[grid]) for grid in GRIDS if grid in results}
    return speed_tables.targets_table([*targets.goals(rows), *kvcache_targets.goals(rows.get(kvcache_targets.GRID, []))], results)


def _table(grid: str, data: dict[str, Any]) -> str:
    rows = choices.held_against_today(grid, [row for row in data["entries"] if not row.get("skipped")], data["device"])
    header, cells = _COLUMNS.get(grid, _against_peers)(rows)
    parts = []
    judged = kvcache_targets.verdict(rows) if grid == kvcache_targets.GRID else targets.verdict(grid, rows)
    if judged is not None:
        parts.append(f"**{judged.figure}.**" + ("" if judged.misses else " No miss.") + "\n")
    if cells:
        parts.append(markdown.table(header, cells))
    lists = (markdown.items("Misses", judged.misses if judged else ()), markdown.items("Failures", targets.failures(rows)))
    parts += [part for part in lists if part]
    if any(row.get("replanned") for row in rows):
        parts.append("† The planner chooses otherwise by now; the figure is that of the plan shown.\n")
    skipped = len(data["entries"]) - len(rows)
    if skipped:
        parts.append(f"Not reached in the time given: {skipped} problems.\n")
    parts.append(markdown.provenance(data))
    return "\n".join(parts)


def _tile(plan: dict[str, Any] | None) -> str:
    if not plan:
        return "-"
    kernel = plan.get("kernel", "").partition(".")[0]
    tile = f"{kernel} {plan['block_m']}{'s' if plan['swapped'] else ''} x {plan['block_n']}".strip()
    share = f"p{plan['num_programs']}" if plan.get("num_programs") else str(plan["num_splits"])
    return f"{tile}, {plan['num_warps']}, {plan['num_stages']}, {share}"


def _against_peers(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    shown = [name for name in LABELS if name != "flashtile" and any(targets.microseconds(row, name) for row in rows)]
    header = [
        "problem",
        "tile, warps, stages, splits",
        "read floor",
        "flashtile",
        *(LABELS[name] for name in shown),
        "best peer / flashtile",
    ]
    cells = []
    for row in rows:
        peers = [us(targets.microseconds(row, name)) for name in shown]
        best = targets.ratio(row, (*targets.RIVALS, "sdpa"))
        plan = _tile(row.get("plan")) + (" †" if row.get("replanned") else "")
        cells.append([row["name"], plan, us(row.get("floor_us")), us(targets.microseconds(row)), *peers, times(best)])
    return header, cells


def _against_beside(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    header = ["problem", "MB", "flashtile", "beside", "its MB", "its time", "speed / beside's", "of the read floor"]
    cells = []
    for row in rows:
        beside = row.get("beside", {})
        share = targets.of_floor(row)
        cells.append([
            row["name"], _megabytes(row), us(targets.microseconds(row)), beside.get("name", "-"), _megabytes(beside),
            us(targets.microseconds(row, "beside")), times(targets.beside_ratio(row)), "-" if share is None else f"{share:.1%}",
        ])  # fmt: skip
    return header, cells


def _against_16_bits(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    beside_ours = {"portable": "by the portable kernel", "hopper": "by Hopper's kernel"} | LABELS
    peers = ("portable", "hopper", "flashinfer_tc", "flashinfer_cc")
    shown = [name for name in peers if any(targets.microseconds(row, name) for row in rows)]
    labels = [beside_ours[name] for name in shown]
    header = ["problem", "MB", "tile, warps, stages, splits", "read floor", "flashtile", "TB/s", "in 16 bits", "times as fast", *labels]
    cells = []
    for row in rows:
        own = targets.microseconds(row)
        cells.append([
            row["name"], _megabytes(row), _tile(row.get("plan")), us(row.get("floor_us")), us(own),
            f"{row['kv_bytes'] / own * 1e-6:.2f}" if own else "-", us(targets.microseconds(row, "beside")),
            times(targets.sooner_than_beside(row)), *(us(targets.microseconds(row, name)) for name in shown),
        ])  # fmt: skip
    return header, cells


def _megabytes(row: Row) -> str:
    return f"{row['kv_bytes'] / 1e6:.0f}" if "kv_bytes" in row else "-"


def _against_floor(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    header = ["problem", "MB", "read floor", "flashtile", "of the floor", "TB/s"]
    cells = []
    for row in rows:
        own, share = targets.microseconds(row), targets.of_floor(row)
        rate = f"{row['kv_bytes'] / own * 1e-6:.2f}" if own else "-"
        cells.append([row["name"], _megabytes(row), us(row.get("floor_us")), us(own), "-" if share is None else f"{share:.1%}", rate])
    return header, cells


def _against_search(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    header = ["problem", "planner's choice", "us", "best found", "us", "regret", "plans timed"]
    cells = []
    for row in [row for row in rows if "regret" in row]:
        timed = str(row["searched"]["timed"]) + ("" if row["searched"]["complete"] else " (out of time)")
        choice = [_tile(row["plan"]), us(row["planner_us"])]
        cells.append([row["name"], *choice, _tile(row["best_plan"]), us(row["best_us"]), f"{row['regret']:.1%}", timed])
    return header, cells


def _against_sweep(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    header = ["problem", "planner's choice today", "us", "best of the sweep", "us", "regret", "plans timed"]
    cells = []
    for row in rows:
        choice = [_tile(row["plan"]), us(row["planner_us"])] if "regret" in row else ["not in the sweep", "-"]
        regret = f"{row['regret']:.1%}" if "regret" in row else "-"
        cells.append([row["name"], *choice, _tile(row["best_plan"]), us(row["best_us"]), regret, str(len(row["timed"]))])
    return header, cells


def _host_times(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    shown = [name for name in LABELS if any("host_us" in row.get("results", {}).get(name, {}) for row in rows)]
    header = ["problem", "kernels", *(f"{LABELS[name]} GPU / host" for name in shown)]
    cells = []
    for row in rows:
        of = [row.get("results", {}).get(name, {}) for name in shown]
        pairs = [f"{us(result.get('gpu_us'))} / {us(result.get('host_us'))}" for result in of]
        cells.append([row["name"], str(targets.kernels_launched(row)), *pairs])
    return header, cells


_COLUMNS: dict[str, Callable[[list[Row]], tuple[list[str], list[list[str]]]]] = {
    "paged": _against_beside,
    "ragged": _against_beside,
    "fp8": _against_16_bits,
    "kvcache": kvcache_targets.columns,
    "floor": _against_floor,
    "search": _against_search,
    "sweep": _against_sweep,
    "host": _host_times,
}


def rendered(text: str, made: dict[str, str]) -> str:
    """The document with every table between its markers; raises StaleReport for a marker that names no grid."""

    def fill(match: re.Match[str]) -> str:
        if match[2] not in made:
            raise StaleReport(f"there is no table called {match[2]}; there are {', '.join(made)}")
        return f"{match[1]}\n{made[match[2]]}\n{match[4]}"

    return _TABLE.sub(fill, text)


def refresh(docs: Path, made: dict[str, str], check: bool, command: str) -> None:
    """Fills a document's tables, or with ``check`` writes nothing and exits with 1 where they are stale."""
    text = docs.read_text(encoding="utf-8")
    fresh = rendered(text, made)
    if check and fresh != text:
        print(f"{docs} does not show what the results say; run {command}")
        raise typer.Exit(1)
    if not check and fresh != text:
        docs.write_text(fresh, encoding="utf-8")
        print(f"{docs} written")


def main(
    results: Annotated[Path, typer.Option(help="Folder of decode_*.json, forward_*.json and backward_*.json.")] = HERE / "results",
    docs: Annotated[Path, typer.Option(help="The document with the markers.")] = HERE.parent / "docs" / "performance.md",
    check: Annotated[bool, typer.Option(help="Write nothing; exit with 1 if the document is stale.")] = False,
) -> None:
    """Fills the document's tables from the results."""
    refresh(docs, tables(load(results)), check, "python -m benchmarks.report")


if __name__ == "__main__":
    typer.run(main)
