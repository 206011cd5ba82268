"""The planner's choices against the golden table; ``golden.py`` says how to regenerate it after a deliberate change."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("planner_golden", Path(__file__).with_name("golden.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
golden = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(golden)

EXPECTED = golden.TABLE.read_text(encoding="utf-8").splitlines()


def test_every_problem_has_a_line() -> None:
    assert len(EXPECTED) == len(golden.PROBLEMS)


@pytest.mark.parametrize(("row", "expected"), list(zip(golden.PROBLEMS, EXPECTED)))
def test_choice(row: tuple[str, int, int, int, str, int, str, str], expected: str) -> None:
    assert golden.line_of(row) == expected
