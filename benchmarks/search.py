"""Regret: the planner's choice held against plans found by search, all forced through ``plan=``.

The space is (block_m, swapped) x block_n x warps x stages x split counts. By default a coordinate descent starts at the
planner's choice, walks one coordinate at a time, then tries random points; ``full`` walks the whole product. The final
figure times the planner's choice and the best candidates again, in turn, so that a lucky sample wins nothing.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from math import ceil
from typing import Any

import torch

import flashtile
from benchmarks import timing
from benchmarks.check import Oracle, poisoned
from benchmarks.grids import Entry
from benchmarks.measure import ours, planned
from benchmarks.refusals import WrongResult
from benchmarks.sets import InputSets, num_sets
from benchmarks.trials import ensure_alive
from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan
from flashtile.planner.tiles import LIMITS
from flashtile.problem import Problem
from flashtile.testing.compilers import Compilers

BLOCK_NS, WARPS, STAGES = (32, 64, 128), (2, 4, 8), (2, 3, 4)
QUICK_ROUNDS, FINAL_ROUNDS, FINALISTS = 5, 15, 3


def forced_splits(plan: DecodePlan, seqlen_k: int, num_splits: int) -> DecodePlan:
    """The plan with about ``num_splits`` splits of ``seqlen_k`` keys, whole tiles each."""
    keys = max(plan.block_n, ceil(seqlen_k / num_splits / plan.block_n) * plan.block_n)
    splits = max(1, ceil(seqlen_k / keys))
    warps = plan.combine_warps if splits <= 64 else max(4, plan.combine_warps)
    return plan.with_(
        keys_per_split=keys, min_keys_per_split=min(plan.min_keys_per_split, keys), num_splits=splits, num_programs=0, combine_warps=warps
    )


def split_counts(plan: DecodePlan, problem: Problem, num_sms: int) -> list[int]:
    """Eight counts: one, the planner's, and those that fill a half to four waves of the device."""
    units = problem.units * ceil(problem.rows / plan.block_m)
    waves = [round(share * num_sms / units) for share in (0.5, 1, 1.5, 2, 3, 4)]
    most = max(1, problem.seqlen_k // 32)
    counts = dict.fromkeys(max(1, min(most, n)) for n in (plan.num_splits, 1, *waves))
    for extra in (2, 4, 8, 16, 32, 64):
        if len(counts) < 8 and extra <= most:
            counts.setdefault(extra)
    return list(counts)[:8]


def neighbours(plan: DecodePlan, problem: Problem, num_sms: int) -> list[list[DecodePlan]]:
    """For each coordinate the plans that differ in it alone; the splits keep their count where the tile changes."""
    resplit = lambda p: p if p.num_programs else forced_splits(p, problem.seqlen_k, plan.num_splits)  # noqa: E731
    streams = [plan.with_(num_programs=num_sms * wave) for wave in (1, 2)] if problem.batch > 1 else []
    return [
        [forced_splits(plan, problem.seqlen_k, n) for n in split_counts(plan, problem, num_sms)] + streams,
        [resplit(plan.with_(block_m=m, swapped=swapped)) for m, swapped in LIMITS[plan.kernel].variants],
        [resplit(plan.with_(block_n=n, num_stages=stages)) for n, stages in product(BLOCK_NS, STAGES)],
        [plan.with_(num_warps=warps) for warps in WARPS],
    ]


def whole_product(plan: DecodePlan, problem: Problem, num_sms: int) -> Iterable[DecodePlan]:
    for (m, swapped), n, warps, stages in product(LIMITS[plan.kernel].variants, BLOCK_NS, WARPS, STAGES):
        tile = plan.with_(block_m=m, swapped=swapped, block_n=n, num_warps=warps, num_stages=stages)
        for splits in split_counts(tile.with_(num_splits=plan.num_splits), problem, num_sms):
            yield forced_splits(tile, problem.seqlen_k, splits)


def random_plan(plan: DecodePlan, problem: Problem, num_sms: int, draw: random.Random) -> DecodePlan:
    m, swapped = draw.choice(LIMITS[plan.kernel].variants)
    n, warps, stages = draw.choice(BLOCK_NS), draw.choice(WARPS), draw.choice(STAGES)
    tile = plan.with_(block_m=m, swapped=swapped, block_n=n, num_warps=warps, num_stages=stages)
    return forced_splits(tile, problem.seqlen_k, draw.choice(split_counts(tile, problem, num_sms)))


@dataclass
class Search:
    """One entry's search: every plan tried with its time (microseconds) or the reason that it was not."""

    sets: InputSets
    oracle: Oracle
    problem: Problem
    chosen: DecodePlan
    deadline: float
    compilers: Compilers
    tried: dict[DecodePlan, float] = field(default_factory=dict)
    refused: dict[DecodePlan, str] = field(default_factory=dict)

    @property
    def best(self) -> DecodePlan:
        return self.fastest(1)[0]

    def fastest(self, count: int) -> list[DecodePlan]:
        return sorted(self.tried, key=lambda plan: self.tried[plan])[:count]

    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline

    def trial(self, plans: Iterable[DecodePlan]) -> None:
        """Times plans that are new, in turn with the best so far, and scales by it so that drift between trials cancels."""
        new = [plan for plan in dict.fromkeys(plans) if plan not in self.tried and plan not in self.refused]
        self.compilers.compile((self.problem, plan) for plan in new)
        fns = {plan: fn for plan in new if not self.out_of_time() and (fn := self._checked(plan)) is not None}
        if not fns:
            return
        anchor = self.best if self.tried else None
        if anchor is not None:
            fns[anchor] = ours(self.sets, anchor)
        times = self._time(fns, QUICK_ROUNDS)
        scale = 1.0 if anchor is None or anchor not in times else self.tried[anchor] / times[anchor]
        self.tried |= {plan: us * scale for plan, us in times.items() if plan != anchor}

    def final(self) -> dict[DecodePlan, float]:
        """The planner's choice and the best found, timed in turn once more."""
        finalists = dict.fromkeys([self.chosen, *self.fastest(FINALISTS)])
        return self._time({plan: ours(self.sets, plan) for plan in finalists}, FINAL_ROUNDS)

    def _checked(self, plan: DecodePlan) -> timing.Contestant | None:
        try:
            self.oracle.error(poisoned(lambda args: flashtile.decode(**args, plan=plan), self.sets))
            return ours(self.sets, plan)
        except WrongResult as error:
            self.refused[plan] = f"WRONG: {error}"
        except Exception as error:  # infeasible by the planner, the compiler or the launch: each is a reason
            self.refused[plan] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        ensure_alive(self.sets.device)
        return None

    def _time(self, fns: dict[DecodePlan, timing.Contestant], rounds: int) -> dict[DecodePlan, float]:
        names = {str(i): plan for i, plan in enumerate(fns)}
        count = self.sets.count
        if self.sets.device.type == "cpu":
            timed = timing.wall_time({name: fns[plan] for name, plan in names.items()}, count, rounds)
        else:
            calls = timing.calls_per_graph(count, self.sets.entry.kv_bytes)
            captured = {}
            for name, plan in names.items():
                try:
                    captured[name] = timing.capture(fns[plan], count, calls)
                except Exception as error:
                    self.refused[plan] = f"capture: {error}".splitlines()[0][:300]
                    ensure_alive(self.sets.device)
            timed = timing.replay_in_turn(captured, rounds)
        return {names[name]: clocked.median_us for name, clocked in timed.items()}


def regret(
    entry: Entry, device: torch.device, seconds: float, compilers: Compilers, full: bool = False, random_points: int = 12
) -> dict[str, Any]:
    """The entry's facts, the planner's time over the best found, and what was tried."""
    deadline = time.monotonic() + seconds
    sets = InputSets(entry, device, num_sets(entry, device))
    problem, chosen = planned(sets)
    num_sms = Device.of(device).num_sms
    search = Search(sets, Oracle(sets), problem, chosen, deadline, compilers)
    search.trial([chosen])
    if chosen not in search.tried:
        return entry.facts() | {"failed": search.refused.get(chosen, "the planner's choice was not timed")}
    if full:
        _walk_all(search, num_sms)
    else:
        _descend(search, num_sms, random_points)
    complete = not search.out_of_time()
    final = search.final()
    best = min(final, key=lambda plan: final[plan])
    wrong = [f"{plan.to_json()}: {why}" for plan, why in search.refused.items() if why.startswith("WRONG")]
    return entry.facts() | {
        "plan": json.loads(chosen.to_json()),
        "best_plan": json.loads(best.to_json()),
        "planner_us": round(final[chosen], 3),
        "best_us": round(final[best], 3),
        "regret": round(final[chosen] / final[best] - 1, 4),
        "searched": {
            "mode": "product" if full else "descent and random points",
            "timed": len(search.tried),
            "refused": len(search.refused),
            "complete": complete,
            "wrong": wrong,
        },
        "top": [{"us": round(search.tried[plan], 3), **_coordinates(plan)} for plan in search.fastest(8)],
    }


def _descend(search: Search, num_sms: int, random_points: int) -> None:
    draw = random.Random(7)
    for sweep in range(3):
        before = search.best
        for coordinate in range(4):
            if search.out_of_time():
                return
            search.trial(neighbours(search.best, search.problem, num_sms)[coordinate])
        if sweep == 0:
            search.trial([random_plan(search.chosen, search.problem, num_sms, draw) for _ in range(random_points)])
        elif search.best == before:
            return


def _walk_all(search: Search, num_sms: int) -> None:
    plans = list(whole_product(search.chosen, search.problem, num_sms))
    for at in range(0, len(plans), 24):
        if search.out_of_time():
            return
        search.trial(plans[at : at + 24])


def _coordinates(plan: DecodePlan) -> dict[str, Any]:
    names = ("kernel", "block_m", "swapped", "block_n", "num_warps", "num_stages", "num_splits", "num_programs")
    return {name: getattr(plan, name) for name in names}
