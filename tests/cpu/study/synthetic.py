"""A study file as a GPU would leave it, with times that follow from a formula: what every test of the study reads."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from flashtile.planner.constants import Constants, constants_of
from flashtile.planner.cost import cost_of, work_of
from flashtile.planner.device import Device
from flashtile.planner.footprint import footprint_of
from flashtile.planner.plans import DecodePlan
from flashtile.study.candidates import plans_of
from flashtile.study.points import Task
from flashtile.study.rows import COLUMNS, Row, facts_of
from flashtile.testing.record import Record

H200 = Device.named("h200")
TRUTH = constants_of("H200")._replace(matrix_iteration_us=0.5, dram_latency_us=1.2)
"""The constants of the machine that the synthetic times are of."""


def time_of(task: Task, plan: DecodePlan, constants: Constants = TRUTH, device: Device = H200) -> float:
    problem = task.point.problem
    footprint = footprint_of(problem, plan, device)
    return cost_of(work_of(problem), plan, footprint, plan.num_splits, device, plan.num_programs, constants).total_us


def write_study(path: Path, tasks: list[Task], constants: Constants = TRUTH, device: Device = H200) -> Path:
    """A measured study of these tasks at ``path``."""
    head = {
        "what": "flashtile study", "basis": "measured", "device": device.name, "figures": asdict(device), "date": "2026-01-01 00:00 UTC",
        "commit": "abc", "versions": {}, "protocol": "a formula", "columns": list(COLUMNS),
    }  # fmt: skip
    record = Record(path, head, compact=True)
    for task in tasks:
        plans = plans_of(task, device)
        rows = [Row.of(plan, time_of(task, plan, constants, device), 0.001, time_of(task, plan, constants_of("H200"))) for plan in plans]
        facts = {"name": task.name, "stage": task.stage, **asdict(task.point), "kv_bytes": task.point.kv_bytes, "sets": 4}
        record.add({**facts, "choice": facts_of(plans[0]), "timed": sorted(rows, key=lambda row: row.us), "refused": [], "seconds": 1.0})
    return path
