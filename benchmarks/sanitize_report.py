"""What compute-sanitizer said, for docs/performance.md and in a cell of the README's table."""

from __future__ import annotations

from typing import Any

from benchmarks import markdown

NOT_YET = "Not measured yet.\n"
_MOST_KINDS = 12  # kinds of reports that are listed for a tool


def table(data: dict[str, Any]) -> str:
    """What each tool found, in how many launches of which kernels, and what its reports name."""
    cells = []
    for tool, summary in data["tools"].items():
        launches = ", ".join(f"{count} of {name}" for name, count in summary["launches"].items())
        cells.append([tool, _found(summary), launches or "none", f"{summary['ended']} of {summary['trials']}"])
    trouble = [*data["failed"], *(line for summary in data["tools"].values() for line in summary["failed"])]
    parts = [
        markdown.table(["tool", "errors or hazards found", "launches inspected", "calls checked"], cells),
        *(_kinds(tool, summary.get("kinds", {})) for tool, summary in data["tools"].items()),
        _controls(data),
        f"{data['unprepared']} of {data['trials']} calls were not reached in the time given.\n" if data["unprepared"] else "",
        f"{len(data['refused'])} variants are refused by the planner.\n" if data["refused"] else "",
        markdown.items("Failures", trouble),
        markdown.provenance(data),
    ]
    return "\n".join(part for part in parts if part)


def cell(data: dict[str, Any]) -> str:
    """How many reports in how many of all calls."""
    words = [f"{tool}: {_reports(summary)} in {summary['ended']} of {data['trials']} calls" for tool, summary in data["tools"].items()]
    return f"{', '.join(words)} ({data['commit']}); [what they are](docs/performance.md#memory-checks)"


def _found(summary: dict[str, Any]) -> str:
    return "did not end" if summary["found"] is None else str(summary["found"])


def _reports(summary: dict[str, Any]) -> str:
    return _found(summary) if summary["found"] is None else f"{summary['found']} reports"


def _kinds(tool: str, kinds: dict[str, int]) -> str:
    """A tool's reports by the lines of source that they name."""
    most = [f"{count} at {places or 'no line of ours'}" for places, count in list(kinds.items())[:_MOST_KINDS]]
    if len(kinds) > _MOST_KINDS:
        most.append(f"{sum(list(kinds.values())[_MOST_KINDS:])} at {len(kinds) - _MOST_KINDS} other places")
    return markdown.items(f"Reports of {tool}, by the lines that they name", most)


def _controls(data: dict[str, Any]) -> str:
    """What the tools said of two kernels of which it is known whether they are right."""
    wrong = f"The control, a kernel that writes out of bounds, was reported {data['control_errors'] or 0} times."
    races = data.get("control_races")
    right = "" if races is None else f" A kernel whose warps hand numbers over by a barrier, rightly, was reported for {races} races."
    return f"{wrong}{right}\n"
