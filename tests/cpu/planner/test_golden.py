"""The planner's choices against the golden tables; ``golden*.py`` say how to regenerate them after a deliberate change."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from tests.cpu.planner import golden, golden_backward, golden_forward

TABLES = (golden, golden_forward, golden_backward)
EXPECTED = [table.TABLE.read_text(encoding="utf-8").splitlines() for table in TABLES]
ROWS = [(table, row, line) for table, lines in zip(TABLES, EXPECTED) for row, line in zip(table.PROBLEMS, lines)]


@pytest.mark.parametrize(("table", "lines"), list(zip(TABLES, EXPECTED)), ids=["decode", "forward", "backward"])
def test_every_problem_has_a_line(table: ModuleType, lines: list[str]) -> None:
    assert len(lines) == len(table.PROBLEMS)


@pytest.mark.parametrize(("table", "row", "expected"), ROWS, ids=[line.partition("|")[0].strip() for _, _, line in ROWS])
def test_choice(table: ModuleType, row: tuple[Any, ...], expected: str) -> None:
    assert table.line_of(row) == expected
