"""The cost model's constants fitted to measured plans: one number after the other, up or down while the error falls."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from math import exp, log
from statistics import median
from typing import NamedTuple

from flashtile.planner.constants import Constants
from flashtile.planner.cost import cost_of
from flashtile.planner.device import Device
from flashtile.study.analysis import percentile
from flashtile.study.samples import Sample

HELD_OUT = 3  # every third problem is not fitted to
STEPS = (0.3, 0.1, 0.03, 0.01)  # of a number's logarithm
SLOW_WEIGHT = 0.3  # of plans that take more than SLOW times their problem's best: nobody chooses among those
SLOW = 2.0
NEAR = 1.3
RANGES = {  # what a number means bounds it: shares of a rate, and the least that a step can take
    "overlap_loss": (0.0, 0.6), "fma_efficiency": (0.1, 1.0), "dram_latency_us": (0.5, 2.0), "l2_bandwidth_share": (1.0, 6.0),
    "matrix_iteration_us": (0.05, 1.5), "score_operations": (4.0, 24.0), "swapped_score_factor": (1.0, 4.0),
}  # fmt: skip


class Errors(NamedTuple):
    """Relative errors of predicted times over some plans: the median, the 90th percentile, how many plans and problems."""

    median: float
    percentile_90: float
    plans: int
    problems: int

    def __str__(self) -> str:
        counts = f"{self.plans} plans of {self.problems} problems"
        return f"{self.median:.1%} in the median, {self.percentile_90:.1%} at the 90th percentile ({counts})"


def predicted_us(sample: Sample, constants: Constants, device: Device) -> float:
    return cost_of(sample.work, sample.tile, sample.footprint, sample.num_splits, device, sample.num_programs, constants).total_us


def errors_of(samples: Iterable[Sample], constants: Constants, device: Device) -> Errors | None:
    """How far the model is off; None without samples."""
    some = list(samples)
    if not some:
        return None
    off = sorted(abs(predicted_us(one, constants, device) / one.us - 1) for one in some)
    return Errors(median(off), percentile(off, 90), len(off), len({one.name for one in some}))


def regrets_of(samples: Iterable[Sample], constants: Constants, device: Device) -> list[float]:
    """For each problem, ascending, what the plan of the least predicted time loses against the fastest that was timed."""
    problems: dict[str, list[Sample]] = {}
    for one in samples:
        problems.setdefault(one.name, []).append(one)
    chosen = (min(some, key=lambda one: predicted_us(one, constants, device)) for some in problems.values())
    return sorted(choice.us / min(one.us for one in problems[choice.name]) - 1 for choice in chosen)


def near_the_best(samples: Iterable[Sample], share: float = NEAR) -> list[Sample]:
    """The plans that somebody may choose: those that take at most ``share`` times as long as their problem's fastest."""
    some = list(samples)
    best: dict[str, float] = {}
    for one in some:
        best[one.name] = min(one.us, best.get(one.name, one.us))
    return [one for one in some if one.us <= share * best[one.name]]


def halves(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """(fitted to, held out): by problem, so that no problem is in both."""
    held = set(sorted({one.name for one in samples})[1::HELD_OUT])
    return [one for one in samples if one.name not in held], [one for one in samples if one.name in held]


def fit(
    samples: Sequence[Sample], start: Constants, device: Device, seconds: float = 120.0, free: Collection[str] | None = None
) -> Constants:
    """The constants with the least mean error of the predictions' logarithms; no worse than ``start``. Needs no solver: 21 numbers.

    A number that no sample depends on stays as it is, and so does one that is not among ``free``: names of Constants, None for all.
    """
    end = time.monotonic() + seconds
    best: dict[str, float] = {}
    for one in samples:
        best[one.name] = min(one.us, best.get(one.name, one.us))
    weights = [SLOW_WEIGHT if one.us > SLOW * best[one.name] else 1.0 for one in samples]

    def loss(numbers: dict[str, float]) -> float:
        constants = Constants.of_flat(numbers)
        off = (abs(log(predicted_us(one, constants, device) / one.us)) for one in samples)
        return sum(weight * error for weight, error in zip(weights, off)) / sum(weights)

    numbers = start.flat()
    moving = [name for name in numbers if free is None or name.partition(" ")[0] in free]
    least = loss(numbers)
    for step in STEPS:
        improved = True
        while improved and time.monotonic() < end:
            improved = False
            for name in moving:
                for sign in (1, -1):
                    while time.monotonic() < end:
                        tried = numbers | {name: _moved(name, numbers[name], sign * step)}
                        found = loss(tried)
                        if found >= least * (1 - 1e-5):
                            break
                        numbers, least, improved = tried, found, True
    return Constants.of_flat({name: float(f"{number:.4g}") for name, number in numbers.items()})


def _moved(name: str, number: float, step: float) -> float:
    least, most = RANGES.get(name.partition(" ")[0], (1e-4, 1e3))
    return min(most, max(least, number * exp(step) if number else 0.01))
