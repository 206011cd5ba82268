"""What the cost model is fitted to: plans with their measured times, of a study or of the project's earlier sweeps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from flashtile.planner.catalog import GLUON_SM90, TRITON
from flashtile.planner.cost import Work, work_of
from flashtile.planner.device import Device
from flashtile.planner.footprint import footprint_of
from flashtile.planner.resources import Footprint
from flashtile.planner.tiles import Tile
from flashtile.problem import Problem
from flashtile.rounding import length_bucket
from flashtile.study.document import Document


class Sample(NamedTuple):
    """A plan of a problem, with what the model wants of both at hand, and its measured microseconds."""

    name: str
    work: Work
    tile: Tile
    footprint: Footprint
    num_splits: int
    num_programs: int
    us: float


def sample(name: str, problem: Problem, tile: Tile, num_splits: int, num_programs: int, us: float, device: Device) -> Sample:
    return Sample(name, work_of(problem), tile, footprint_of(problem, tile, device), num_splits, num_programs, us)


def of_study(document: Document) -> Iterator[Sample]:
    """Every plan of a measured study."""
    device = document.figures
    for entry in document.entries:
        problem = entry.point.problem
        for row in entry.rows:
            yield sample(entry.point.name, problem, row.tile, row.num_splits, row.num_programs, row.us, device)


def of_sweep(data: dict[str, Any], device: Device) -> Iterator[Sample]:
    """Every plan of the portable kernel in ``decode_sweep.json``."""
    for entry in data["entries"]:
        problem = _problem(entry["batch"], entry["keys"], entry["num_heads_q"], entry["num_heads_kv"], entry["seqlen_q"])
        for block_m, swapped, block_n, warps, stages, splits, us in entry["timed"]:
            tile = Tile(block_m, bool(swapped), block_n, warps, stages, TRITON)
            yield sample(entry["name"], problem, tile, splits, 0, us, device)


def of_tuning(data: dict[str, Any], device: Device) -> Iterator[Sample]:
    """Every plan in ``hopper_tuning.json`` of problems whose sequences are alike, each with its latest time."""
    latest: dict[tuple[str, str], float] = {}
    for run in data["runs"]:
        for name, plans in run["us"].items():
            latest |= {(name, plan): us for plan, us in plans.items()}
    for (name, plan), us in latest.items():
        shape = re.fullmatch(r"(\d+)x(\d+) (\d+)/(\d+)(?: q(\d+))?(?: page (\d+))?", name)
        numbers = re.match(r"(t:)?(\d+),(\d+),(\d+),(\d+)/([sp])(\d+)", plan)
        if shape is None or numbers is None:
            continue
        batch, keys, heads_q, heads_kv, seqlen_q, page_size = (int(number or 0) for number in shape.groups())
        problem = _problem(batch, keys, heads_q, heads_kv, seqlen_q or 1).with_(page_size=page_size)
        block_m, block_n, warps, stages = (int(number) for number in numbers.groups()[1:5])
        tile = Tile(block_m, False, block_n, warps, stages, TRITON if numbers[1] else GLUON_SM90)
        count = int(numbers[7])
        splits, programs = (count, 0) if numbers[6] == "s" else (max(1, count // problem.units), count)
        yield sample(name, problem, tile, splits, programs, us, device)


def _problem(batch: int, keys: int, heads_q: int, heads_kv: int, seqlen_q: int) -> Problem:
    return Problem(batch=batch, seqlen_q=seqlen_q, seqlen_k=length_bucket(keys), num_heads_q=heads_q, num_heads_kv=heads_kv)
