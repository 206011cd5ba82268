"""How a study's file writes plans: a row of numbers each, named by COLUMNS."""

from __future__ import annotations

from typing import Any, NamedTuple

from flashtile.planner.plans import DecodePlan
from flashtile.planner.tiles import Tile

TILE_COLUMNS = ("kernel", "block_m", "swapped", "block_n", "num_warps", "num_stages")
COLUMNS = (*TILE_COLUMNS, "num_splits", "num_programs", "us", "spread", "predicted_us")


class Row(NamedTuple):
    """One plan of an entry. ``us`` is measured, and ``spread`` half the distance of its quartiles over it; where nothing was measured
    ``us`` is predicted too, and ``spread`` 0."""

    kernel: str
    block_m: int
    swapped: bool
    block_n: int
    num_warps: int
    num_stages: int
    num_splits: int
    num_programs: int
    us: float
    spread: float
    predicted_us: float

    @classmethod
    def of(cls, plan: DecodePlan, us: float, spread: float, predicted_us: float) -> Row:
        return cls(**facts_of(plan), us=round(us, 3), spread=round(spread, 4), predicted_us=round(predicted_us, 3))

    @property
    def tile(self) -> Tile:
        return Tile(self.block_m, self.swapped, self.block_n, self.num_warps, self.num_stages, self.kernel)

    def is_plan(self, facts: dict[str, Any]) -> bool:
        """Whether it is the plan with these facts, as ``facts_of`` gives them."""
        return all(getattr(self, name) == value for name, value in facts.items())


def facts_of(plan: DecodePlan) -> dict[str, Any]:
    """What a row has of a plan."""
    return {name: getattr(plan, name) for name in COLUMNS[:8]}
