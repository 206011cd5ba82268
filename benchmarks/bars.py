"""Bars: how fast, against whom, on which problems of a grid; and whether the measured rows reach them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.targets import Goal, Row, geometric_mean, microseconds, ratio


@dataclass(frozen=True)
class Bar:
    """How many times as fast as the fastest of some peers: at least ``each`` on every problem, ``mean`` in geometric mean.

    ``figure`` tells how many times that is, of one problem.
    """

    what: str
    grid: str
    against: tuple[str, ...]
    whom: str
    each: float | None = None
    mean: float | None = None
    of: Callable[[Row], bool] = lambda row: True
    figure: Callable[[Row, tuple[str, ...]], float | None] = ratio

    @property
    def words(self) -> str:
        each = "" if self.each is None else f">= {self.each:.2f}x" + (" on each" if self.mean is not None else "")
        mean = "" if self.mean is None else f">= {self.mean:.2f}x in geometric mean"
        return ", ".join(part for part in (each, mean) if part)

    def judge(self, rows: list[Row]) -> Goal:
        ratios = {row["name"]: value for row in rows if self.of(row) and (value := self.figure(row, self.against))}
        what = f"{self.what}, {self.whom}"
        if not ratios:
            return Goal(what, self.words, "not measured", None, self.grid)
        values = list(ratios.values())
        lowest = min(ratios, key=lambda name: ratios[name])
        average = geometric_mean(values)
        met = (self.each is None or values == [value for value in values if value >= self.each]) and (
            self.mean is None or average >= self.mean
        )
        where = f"lowest {ratios[lowest]:.3f}x at {lowest}"
        reached = f"{ratios[lowest]:.3f}x" if len(values) == 1 else f"{average:.3f}x over {len(values)}, {where}"
        absent = [name for name in self.against if not any(self.of(row) and microseconds(row, name) for row in rows)]
        return Goal(what, self.words, reached + (f"; {', '.join(absent)} not measured" if absent else ""), met, self.grid)

    def misses(self, rows: list[Row]) -> list[str]:
        """Problems below ``each``, by name."""
        figures = [(row["name"], self.figure(row, self.against)) for row in rows if self.of(row)]
        below = [(name, value) for name, value in figures if value and value < (self.each or 0)]
        return [f"{name}: {value:.3f}x {self.whom}, target {self.each:.2f}x" for name, value in below]


def of_head_dims(*head_dims: int) -> Callable[[Row], bool]:
    """Problems of these head dims alone."""
    return lambda row: row.get("head_dim") in head_dims
