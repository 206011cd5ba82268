"""What explanations of all operations share: a compiler's findings, kernels that cannot run, and a few turns of phrase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from flashtile.planner.plans import Plan

ASKED = {"explicit": "the plan was asked for", "tuned": "a measurement overruled the model"}


class Compiled(Protocol):
    """What a compiler made of the plan's kernel."""

    @property
    def registers(self) -> int: ...
    @property
    def spilled_bytes(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def mma(self) -> str: ...


@dataclass(frozen=True)
class OtherKernel:
    """A kernel for this kind of device that cannot run the problem, or not with the tile that was asked for."""

    kernel: str
    reasons: tuple[str, ...]


def chooser(plan: Plan) -> str:
    """Who chose a plan."""
    return {"rule": "the rule", "tuned": "a tuned table", "explicit": "the caller"}[plan.source]


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 program", "4 programs"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
