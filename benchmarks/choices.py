"""Old measurements held against what the planner chooses today: its rule changes more often than a GPU is at hand."""

from __future__ import annotations

import json
from math import ceil, log
from typing import Any

from benchmarks.targets import Row
from flashtile.errors import ArgumentError
from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem
from flashtile.rounding import length_bucket
from flashtile.testing.variants import PORTABLE, kernels_choice

CAPACITY_STEP = 16  # as benchmarks.sets rounds capacities up
TILE = ("block_m", "swapped", "block_n", "num_warps", "num_stages")


def held_against_today(grid: str, rows: list[Row], device: str) -> list[Row]:
    """The rows with ``replanned`` where the planner would choose otherwise; a sweep's with its regret as well.

    The sweep is of the portable kernel, and held against what the planner chooses among its plans.
    """
    try:
        known = Device.named(device.removeprefix("NVIDIA "))
    except ArgumentError:
        return rows
    if grid == "sweep":
        return [_with_regret(row, known) for row in rows]
    if grid in ("seqlen1", "speculative"):
        return [row | {"replanned": _replanned(row, known)} for row in rows]
    return rows


def _replanned(row: Row, device: Device) -> bool:
    if "plan" not in row:
        return False
    keys = ceil(row["seqlens_k"]["max"] / CAPACITY_STEP) * CAPACITY_STEP
    now = plan_decode(_problem(row["batch"], row["seqlen_q"], keys, row["num_heads_q"], row["num_heads_kv"]), device)
    then = DecodePlan.from_json(json.dumps(row["plan"]))
    return any(getattr(now, name) != getattr(then, name) for name in ("kernel", *TILE, "num_splits", "num_programs"))


def _with_regret(row: Row, device: Device) -> Row:
    """``timed`` holds (block_m, swapped, block_n, warps, stages, splits, us) of each plan in the sweep."""
    problem = _problem(row["batch"], row["seqlen_q"], row["keys"], row["num_heads_q"], row["num_heads_kv"])
    now = kernels_choice(problem, device, PORTABLE)
    best = min(row["timed"], key=lambda plan: plan[-1])
    found = row | {"best_plan": _facts(best), "best_us": best[-1]}
    same = [plan for plan in row["timed"] if tuple(plan[:5]) == tuple(int(getattr(now, name)) for name in TILE)]
    if not same or now.num_programs:
        return found
    nearest = min(same, key=lambda plan: abs(log(plan[5] / now.num_splits)))
    return found | {"plan": _facts(nearest), "planner_us": nearest[-1], "regret": nearest[-1] / best[-1] - 1}


def _problem(batch: int, seqlen_q: int, keys: int, heads_q: int, heads_kv: int) -> Problem:
    return Problem(batch=batch, seqlen_q=seqlen_q, seqlen_k=length_bucket(keys), num_heads_q=heads_q, num_heads_kv=heads_kv)


def _facts(plan: list[Any]) -> dict[str, Any]:
    return dict(zip((*TILE, "num_splits"), plan[:6], strict=True))
