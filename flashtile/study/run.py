"""Runs a study: task after task until the budget is spent, each written to the file as it is done."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from flashtile.errors import ArgumentError, AttentionError, message
from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan
from flashtile.study import measure, predict
from flashtile.study.candidates import plans_of
from flashtile.study.document import KIND, read_study
from flashtile.study.inputs import bytes_of
from flashtile.study.points import Task, tasks
from flashtile.study.rows import COLUMNS
from flashtile.testing.compilers import Compilers
from flashtile.testing.record import Record

LOOKAHEAD = 24  # tasks whose kernels are compiled while earlier ones are timed
MEMORY_SHARE = 0.8  # of the memory that is free
LEAST_SECONDS = 2.0  # that a task is begun with
PREDICTED_SHARE = 0.3  # of the budget without a GPU goes to predictions, the rest to compiling


@dataclass(frozen=True)
class Study:
    """What is studied, on what: ``device`` is None where there is no GPU, and then ``figures`` are those of any device."""

    figures: Device
    device: torch.device | None = None
    wanted: Callable[[Task], bool] = lambda task: True

    @property
    def basis(self) -> str:
        """ "measured" or "predicted"."""
        return "predicted" if self.device is None else "measured"

    def tasks(self) -> Iterator[Task]:
        return (task for task in tasks() if self.wanted(task))


Progress = Callable[[str], None]
"""Told what is about to be done."""


def opened(path: Path, study: Study, versions: dict[str, str], commit: str = "") -> Record:
    """The study's file, gone on with where it is there; raises ArgumentError for a file of another device, kind or version."""
    head = {
        "what": KIND,
        "basis": study.basis,
        "device": study.figures.name,
        "figures": asdict(study.figures),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit,
        "versions": versions,
        "protocol": predict.PROTOCOL if study.device is None else measure.PROTOCOL,
        "columns": list(COLUMNS),
    }
    if path.exists():
        earlier = read_study(path)
        ours = {name: head[name] for name in ("basis", "device", "columns")}
        if any(earlier[name] != value for name, value in ours.items()):
            expected = f"a study {study.basis} on {study.figures.name}, to go on with"
            came = f"{path}, {earlier['basis']} on {earlier['device']}"
            raise ArgumentError(message("out", expected, came, "Name another file, or remove this one."))
        head |= {name: earlier[name] for name in ("date", "commit", "versions") if name in earlier}
    return Record.open(path, head, resume=True, compact=True)


def run(study: Study, record: Record, seconds: float, jobs: int | None = None, progress: Progress = lambda text: None) -> int:
    """Adds entries until ``seconds`` are over or nothing is left; returns how many tasks were done.

    Raises measure.DeviceLost where the GPU is gone: run again with the same file to go on.
    """
    end = time.monotonic() + seconds
    workers = jobs or max(1, (os.cpu_count() or 1) - 1)
    if study.device is None:
        return _predicted(study, record, end, workers, progress)
    with closing(Compilers(study.device, workers)) as pool:
        return _measured(study, record, pool, end, progress)


def _measured(study: Study, record: Record, pool: Compilers, end: float, progress: Progress) -> int:
    assert study.device is not None
    todo = (task for task in study.tasks() if not record.has(task.name))
    waiting: list[tuple[Task, list[DecodePlan]]] = []
    longest: dict[str, float] = {}
    done = 0
    while time.monotonic() < end - LEAST_SECONDS:
        new = list(_planned(islice(todo, LOOKAHEAD - len(waiting)), study.figures))
        pool.start((task.point.problem, plan) for task, plans in new for plan in plans)
        waiting += new
        if not waiting:
            break
        task, plans = waiting.pop(0)
        if time.monotonic() + 0.8 * longest.get(task.stage, 0.0) > end:
            continue
        progress(task.name)
        pool.wait(max(0.0, end - time.monotonic()), only=[(task.point.problem, plan) for plan in plans])
        if time.monotonic() > end - LEAST_SECONDS:
            break
        began = time.monotonic()
        record.begin(task.name)
        record.add(_entry(task, _fits_or_measured(task, plans, study.device), time.monotonic() - began))
        longest[task.stage] = max(0.7 * longest.get(task.stage, 0.0), time.monotonic() - began)
        done += 1
        torch.cuda.empty_cache()
    return done


def _fits_or_measured(task: Task, plans: list[DecodePlan], device: torch.device) -> dict[str, Any]:
    free, _ = torch.cuda.mem_get_info(device)
    wanted = bytes_of(task.point, device)
    if wanted > MEMORY_SHARE * free:
        return {"failed": f"it takes {wanted / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"}
    try:
        return measure.measured(task, plans, device)
    except measure.DeviceLost:
        raise
    except Exception as error:  # the next task may well run
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}


def _predicted(study: Study, record: Record, end: float, workers: int, progress: Progress) -> int:
    """Predictions for a share of the budget, then compile facts; the file is written now and then, for both are many."""
    began = time.monotonic()
    until = began + PREDICTED_SHARE * (end - began)
    done = 0
    for task, plans in _planned((task for task in study.tasks() if not record.has(task.name)), study.figures):
        progress(task.name)
        record.entries.append(_entry(task, predict.predicted(task, plans, study.figures), 0.0))
        done += 1
        if time.monotonic() > until:
            break
    record.save()
    todo = [point for point in predict.compile_points() if not record.has(_facts_name(predict.known_of(point)))]
    with closing(predict.compiled(todo, workers)) as found:
        for facts in found if todo else ():
            progress(_facts_name(facts))
            record.entries.append({"name": _facts_name(facts), "compiled": facts})
            if time.monotonic() > end:
                break
    record.save()
    return done


def _planned(some: Iterable[Task], figures: Device) -> Iterator[tuple[Task, list[DecodePlan]]]:
    """Tasks with their plans; a point that no kernel can run on the device is left out."""
    for task in some:
        try:
            yield task, plans_of(task, figures)
        except AttentionError:
            continue


def _entry(task: Task, result: dict[str, Any], seconds: float) -> dict[str, Any]:
    point = asdict(task.point)
    return {"name": task.name, "stage": task.stage, **point, "kv_bytes": task.point.kv_bytes, **result, "seconds": round(seconds, 2)}


def _facts_name(facts: dict[str, Any]) -> str:
    swapped = " swapped" if facts["swapped"] else ""
    return f"compiled {facts['kernel']} {facts['arch']} block_m {facts['block_m']}{swapped} d{facts['head_dim']}"
