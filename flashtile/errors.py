"""What flashtile raises.

AttentionError
├── ArgumentError(ValueError)       a value is out of range, or tensors lie on different devices
│   └── ShapeError                  a tensor's rank, shape, strides or layout is wrong
├── DtypeError(TypeError)           a tensor's dtype is wrong, or dtypes do not go together
├── UnsupportedError(NotImplementedError)   no kernel can run this problem, or not with the plan asked for
├── OutOfPagesError(MemoryError)    a page cache has too few free pages
├── CommunicationError(RuntimeError)  another process has died, or did not come in time
└── ToolchainError(RuntimeError)    the machine lacks what a kernel needs to be compiled or launched

Every message names the argument, what was expected, what came, and what would work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class AttentionError(Exception):
    """Base of every error that flashtile raises on purpose."""


class ArgumentError(AttentionError, ValueError):
    """A value is out of range, or tensors lie on devices that differ."""


class ShapeError(ArgumentError):
    """A tensor's rank, shape, strides or layout is wrong."""


class DtypeError(AttentionError, TypeError):
    """A tensor's dtype is wrong, or dtypes do not go together."""


class UnsupportedError(AttentionError, NotImplementedError):
    """No kernel can run the problem, or none with the plan asked for.

    ``reasons`` maps each kernel's name to why it cannot run.
    """

    def __init__(self, summary: str, reasons: Mapping[str, Sequence[str]] | None = None) -> None:
        self.reasons = {name: list(why) for name, why in (reasons or {}).items()}
        lines = [summary]
        for name, why in self.reasons.items():
            lines += [f"  {name}: {reason}" for reason in why]
        super().__init__("\n".join(lines))


class OutOfPagesError(AttentionError, MemoryError):
    """A page cache has too few free pages for what was asked; it is as it was before."""


class CommunicationError(AttentionError, RuntimeError):
    """Another process of the group has died, or did not get to a transfer within the group's timeout."""


class ToolchainError(AttentionError, RuntimeError):
    """The machine lacks what a kernel needs to be compiled or launched (a C compiler, Python headers, Triton)."""


def message(argument: str, expected: str, got: object, fix: str) -> str:
    """One sentence form for every complaint about an argument."""
    return f"{argument}: expected {expected}, got {got}. {fix}"
