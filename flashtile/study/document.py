"""A study's file, read back: checked, and its rows as they were written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashtile.errors import ArgumentError, message
from flashtile.planner.device import Device
from flashtile.study.points import Point
from flashtile.study.rows import COLUMNS, Row
from flashtile.testing.record import SCHEMA

KIND = "flashtile study"


@dataclass(frozen=True)
class Entry:
    """One task that was done: its point, its plans with their times (fastest first), and what the planner chooses."""

    stage: str
    point: Point
    rows: tuple[Row, ...]
    choice: dict[str, Any]
    refused: tuple[tuple[dict[str, Any], str], ...]

    @property
    def chosen(self) -> Row | None:
        """The planner's own row, where it was timed."""
        return next((row for row in self.rows if row.is_plan(self.choice)), None)


@dataclass(frozen=True)
class Document:
    """A whole study. ``basis`` is "measured" or "predicted"; ``compiled`` has a mapping for each kernel that was compiled for an
    architecture."""

    head: dict[str, Any]
    entries: tuple[Entry, ...]
    compiled: tuple[dict[str, Any], ...]

    @property
    def basis(self) -> str:
        return str(self.head["basis"])

    @property
    def figures(self) -> Device:
        """The device's figures as they were when it was studied."""
        return Device(**self.head["figures"])

    def of_stage(self, *stages: str) -> Iterator[Entry]:
        return (entry for entry in self.entries if entry.stage in stages)


def read_study(path: Path) -> dict[str, Any]:
    """A study's JSON as it lies in its file; raises ArgumentError where it is none, or of another version."""
    advice = "flashtile study writes one."
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        what, schema, columns = data["what"], data["schema"], data["columns"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(message("study", "a study's JSON file", f"{path} ({type(error).__name__}: {error})", advice)) from error
    if what != KIND or schema != SCHEMA or columns != list(COLUMNS):
        came = f"{path} with {what!r}, schema {schema}"
        raise ArgumentError(message("study", f"{KIND!r} with schema {SCHEMA} and columns {', '.join(COLUMNS)}", came, advice))
    return data


def document_of(data: dict[str, Any]) -> Document:
    """The document of a study's JSON."""
    entries = tuple(_entry(entry) for entry in data["entries"] if "timed" in entry)
    facts = tuple(entry["compiled"] for entry in data["entries"] if "compiled" in entry)
    return Document({name: value for name, value in data.items() if name != "entries"}, entries, facts)


def load(path: Path) -> Document:
    """The document in a file; raises ArgumentError as ``read_study`` does."""
    return document_of(read_study(path))


def _entry(entry: dict[str, Any]) -> Entry:
    names = ("batch", "keys", "seqlen_q", "group", "head_dim", "dtype_kv")
    refused = tuple((facts, why) for facts, why in entry["refused"])
    return Entry(entry["stage"], Point(**{name: entry[name] for name in names}), tuple(Row(*row) for row in entry["timed"]),
                 entry["choice"], refused)  # fmt: skip
