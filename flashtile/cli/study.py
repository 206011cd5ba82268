"""``flashtile study``: every query tile on a grid of problems, timed on the GPU at hand, or predicted and compiled without one."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from flashtile.cli import contest
from flashtile.cli.device import RunDevice, device_name, pick_device
from flashtile.cli.output import console, errors, print_json, progress, table
from flashtile.planner.device import Device
from flashtile.study import analysis, findings
from flashtile.study.document import Document, load
from flashtile.study.measure import DeviceLost
from flashtile.study.points import AXES, CACHES, STAGES, Task
from flashtile.study.run import Study, opened, run
from flashtile.testing.record import Record


def study(
    out: Annotated[Path, typer.Option("--out", help="The study's file; one that is there is gone on with.")] = Path("flashtile-study.json"),
    budget: Annotated[float, typer.Option("--budget", min=1, help="Seconds; the most telling problems come first.")] = 240.0,
    device: RunDevice = "auto",
    model: Annotated[str, typer.Option("--model", help="Without a GPU: whose times are predicted (h200, a100, ...).")] = "h200",
    stage: Annotated[list[str] | None, typer.Option("--stage", help=f"Only {', '.join(STAGES)}; repeatable.")] = None,
    head_dim: Annotated[list[int] | None, typer.Option("--head-dim", help="Only this; repeatable.")] = None,
    seqlen_q: Annotated[list[int] | None, typer.Option("--seqlen-q", help="Only this many queries a sequence; repeatable.")] = None,
    group: Annotated[list[int] | None, typer.Option("--group", help="Only this many query heads a key head; repeatable.")] = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", help="Only this many sequences; repeatable.")] = None,
    keys: Annotated[list[int] | None, typer.Option("--keys", help="Only this many keys; repeatable.")] = None,
    dtype_kv: Annotated[list[str] | None, typer.Option("--dtype-kv", help=f"Only caches of {', '.join(CACHES)}; repeatable.")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Processes that compile. Default: a core each, but one.")] = None,
    commit: Annotated[str, typer.Option("--commit", help="Noted in the file: what was measured.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document: what follows from the study.")] = False,
) -> None:
    """Study every query tile: which is the fastest where, and what a fixed one would lose. Stop and go on as you like."""
    where = pick_device(device)
    only = {"stage": stage, "head_dim": head_dim, "seqlen_q": seqlen_q, "group": group, "batch": batch, "keys": keys, "dtype_kv": dtype_kv}
    for name, known in {"stage": STAGES, **AXES}.items():
        _check_known(f"--{name.replace('_', '-')}", only[name], known)
    on_gpu = where.type == "cuda"
    wish = Study(Device.of(where) if on_gpu else Device.named(model), where if on_gpu else None, lambda task: _wanted(task, only))
    if not any(True for _ in wish.tasks()):
        raise typer.BadParameter("no problem of the study is all that was asked for at once: leave one of these options out.")
    if not on_gpu:
        errors.print(
            f"No GPU on {device_name(where)}: times are the model's predictions for {wish.figures.name}, and kernels are only compiled.",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    document = follow(wish, opened(out, wish, contest.versions(), commit), out, budget, jobs)
    if as_json:
        print_json({"file": str(out), "basis": document.basis, "device": document.head["device"], **findings.summary(document)})
    else:
        _render(document, out)


def follow(wish: Study, record: Record, path: Path, budget: float, jobs: int | None) -> Document:
    """Runs a study behind a progress bar, and reads its file back; exit code 3 where the GPU is lost."""
    began = time.monotonic()
    with progress() as bar:
        line = bar.add_task("study", total=round(budget))

        def shown(text: str) -> None:
            bar.update(line, description=f"study: {text}", completed=min(round(budget), round(time.monotonic() - began)))

        try:
            run(wish, record, budget, jobs, shown)
        except DeviceLost as error:
            errors.print(f"flashtile: the GPU was lost ({error}); run the same command again to go on.", markup=False, soft_wrap=True)
            raise typer.Exit(3) from error
        finally:
            record.save()
    return load(path)


def _check_known(option: str, given: list[Any] | None, known: tuple[Any, ...]) -> None:
    if unknown := sorted(set(given or ()) - set(known)):
        raise typer.BadParameter(f"{_listed(unknown)} is none of {_listed(known)}.", param_hint=option)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(str(value) for value in values)


def _wanted(task: Task, only: dict[str, list[Any] | None]) -> bool:
    return all(values is None or (task.stage if name == "stage" else getattr(task.point, name)) in values for name, values in only.items())


def _render(document: Document, out: Path) -> None:
    best = table(
        f"The best query tile, {document.basis} on {document.head['device']}", "problem", "best tile", "time", "planner", "fixed 64", left=2
    )
    for row in analysis.verdicts(document)[:40]:
        planner = "-" if row.planner_loss is None else f"{row.planner_loss:+.1%}"
        fixed = "-" if row.fixed_loss is None else f"{row.fixed_loss:+.1%}"
        best.add_row(row.point.name, row.best_in_words, f"{row.best.us:.1f} us", planner, fixed)
    if best.row_count:
        console.print(best)
    for line in findings.in_words(document):
        console.print(line, markup=False, highlight=False)
    console.print(f"{len(document.entries)} tasks in {out}; the same command again goes on.", markup=False, highlight=False)
