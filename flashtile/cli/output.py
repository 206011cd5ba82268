"""Where a command's words go: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from flashtile.planner.backward_explain import BackwardExplanation
from flashtile.planner.decode_explain import Explanation
from flashtile.planner.forward_explain import ForwardExplanation

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

# Without a terminal there is no width to keep to, and a wrapped table in a file is hard to read.
console = Console(width=None if sys.stdout.isatty() else 160)
errors = Console(stderr=True)


def print_json(document: dict[str, Any]) -> None:
    """The one JSON document of a ``--json`` run."""
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def progress() -> Progress:
    """A progress bar on stderr that leaves nothing behind."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def table(title: str, *columns: str, left: int = 1) -> Table:
    """A table whose first ``left`` columns hold words and whose others hold numbers."""
    made = Table(title=title, title_justify="left", header_style="bold", min_width=len(title))  # so that the title takes one line
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index < left else "right", no_wrap=index >= left)
    return made


def microseconds(seconds: float) -> str:
    """A time with three figures that matter, in the unit that fits."""
    us = seconds * 1e6
    if us < 1e3:
        return f"{us:.3g} us" if us < 100 else f"{us:.0f} us"
    return f"{us / 1e3:.3g} ms" if us < 1e6 else f"{us / 1e6:.3g} s"


def plan_words(explanation: Explanation | ForwardExplanation | BackwardExplanation) -> list[str]:
    """The plan in sentences, without those about other tiles: they stand in a table or are left out."""
    return [line for line in explanation.lines() if not line.startswith("Not ")]
