"""A result file that is written after every entry, so that a run that was cut or killed can be gone on with."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass
class Record:
    """One result file. ``begin`` notes which entry runs, and ``step`` whose turn it is: a resumed run knows what killed the last.

    ``compact`` gives each entry one line, for files with many numbers.
    """

    path: Path
    head: dict[str, Any]
    entries: list[dict[str, Any]] = field(default_factory=list)
    running: str | None = None
    compact: bool = False

    @classmethod
    def open(cls, path: Path, head: dict[str, Any], resume: bool, left_out: Collection[str] = (), compact: bool = False) -> Record:
        """A new file, or an earlier one to go on with; an entry during which one of those ``left_out`` died is measured again."""
        record = cls(path, head, compact=compact)
        if resume and path.exists():
            earlier = json.loads(path.read_text())
            record.entries = [entry for entry in earlier["entries"] if not entry.get("skipped")]
            crashed, step = earlier.get("running"), earlier.get("step")
            if crashed and step not in left_out:
                where = f" ({step})" if step else ""
                record.add({"name": crashed, "failed": f"the process died or was stopped here{where}"})
        return record

    def has(self, name: str) -> bool:
        return any(entry["name"] == name for entry in self.entries)

    def begin(self, name: str) -> None:
        self.running = name
        self._write()

    def step(self, name: str) -> None:
        """Notes whose turn it is in the entry that runs."""
        self._write(name)

    def add(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        self.running = None
        self._write()

    def save(self) -> None:
        """Writes the file as it stands: after entries that were appended at once."""
        self._write()

    def _write(self, step: str | None = None) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = {"schema": SCHEMA, **self.head, "entries": self.entries}
        if self.running:
            data["running"] = self.running
            data["step"] = step
        partial = self.path.with_suffix(".partial")
        partial.write_text((_one_a_line(data) if self.compact else json.dumps(data, indent=1)) + "\n")
        os.replace(partial, self.path)


def _one_a_line(data: dict[str, Any]) -> str:
    head = ",\n ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in data.items() if name != "entries")
    return "{" + head + ',\n "entries": [\n' + ",\n".join(json.dumps(entry) for entry in data["entries"]) + "\n]}"
