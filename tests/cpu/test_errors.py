"""The error tree is what documents draw, and each error can be caught as Python's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flashtile import errors
from flashtile.errors import (
    ArgumentError,
    AttentionError,
    CommunicationError,
    DtypeError,
    OutOfPagesError,
    ShapeError,
    ToolchainError,
    UnsupportedError,
)

ROOT = Path(__file__).resolve().parents[2]
BUILTINS = {
    ArgumentError: ValueError,
    ShapeError: ValueError,
    DtypeError: TypeError,
    UnsupportedError: NotImplementedError,
    OutOfPagesError: MemoryError,
    CommunicationError: RuntimeError,
    ToolchainError: RuntimeError,
}


@pytest.mark.parametrize("error", BUILTINS, ids=lambda error: error.__name__)
def test_each_is_one_of_pythons_own(error: type[AttentionError]) -> None:
    assert issubclass(error, (AttentionError,)) and issubclass(error, BUILTINS[error])


@pytest.mark.parametrize(
    "drawing", [errors.__doc__, (ROOT / "docs" / "contracts.md").read_text(encoding="utf-8")], ids=["module", "contracts"]
)
def test_the_tree_is_drawn_as_it_is(drawing: str) -> None:
    drawn = dict(re.findall(r"─ (\w+Error)(?:\((\w+)\))?", drawing))
    made = {error.__name__: error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, AttentionError)}
    assert set(drawn) == set(made) - {"AttentionError"}
    for name, builtin in drawn.items():
        assert not builtin or builtin in [base.__name__ for base in made[name].__bases__], name


def test_reasons_are_kept_and_printed() -> None:
    error = UnsupportedError("Nothing runs.", {"a": ["too long", "too wide"], "b": ["absent"]})
    assert error.reasons == {"a": ["too long", "too wide"], "b": ["absent"]}
    assert str(error).splitlines() == ["Nothing runs.", "  a: too long", "  a: too wide", "  b: absent"]
