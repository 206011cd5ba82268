"""``flashtile tune``: a table of measured tiles for the GPU at hand, which the planner takes from then on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from flashtile.cli import contest
from flashtile.cli.device import RunDevice, pick_device
from flashtile.cli.output import AsJson, console, print_json, table
from flashtile.cli.study import follow
from flashtile.errors import ArgumentError, UnsupportedError, message
from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device
from flashtile.planner.tiles import variant_name
from flashtile.planner.user_tables import folder, path_of, user_table
from flashtile.study.document import Document, load
from flashtile.study.run import Study, opened
from flashtile.study.tuned import Tuned, table_of, tuned_rows, write

FEW_ROWS = 20  # shown of a table


def tune(
    budget: Annotated[float, typer.Option("--budget", min=1, help="Seconds to measure for; again goes on.")] = 180.0,
    study: Annotated[Path | None, typer.Option("--study", help="Take this study's times in the place of measuring.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The table. Default: where the planner looks for it.")] = None,
    device: RunDevice = "auto",
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Processes that compile. Default: a core each, but one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure which tiles beat the planner's on this GPU, and keep them where the planner finds them."""
    document = load(study) if study is not None else _measured(pick_device(device), budget, jobs)
    if document.basis != "measured":
        raise ArgumentError(message("study", "times that were measured", f"{study}, {document.basis}", "Run flashtile study on a GPU."))
    path = out or path_of(document.figures.name)
    if path is None:
        raise UnsupportedError(message("out", "a file", "none", "Without platformdirs there is no cache directory: name one with --out."))
    rows = tuned_rows(document)
    write(table_of(document, rows), path)
    user_table.cache_clear()
    plan_decode.cache_clear()
    if as_json:
        print_json({"file": str(path), **table_of(document, rows)})
    else:
        _render(document, rows, path)


def _measured(where: torch.device, budget: float, jobs: int | None) -> Document:
    """The study that tables of this GPU rest on, measured for ``budget`` seconds more."""
    if where.type != "cuda":
        raise UnsupportedError(message("device", "a GPU", where, "A table holds measured tiles; --study takes them from a file."))
    place = folder()
    kept = (place or Path()) / f"{(path_of(Device.of(where).name) or Path('tuned')).stem}.study.json"
    wish = Study(Device.of(where), where, lambda task: task.stage != "splits")
    return follow(wish, opened(kept, wish, contest.versions()), kept, budget, jobs)


def _render(document: Document, rows: list[Tuned], path: Path) -> None:
    made = table(f"Tiles that beat the planner's on {document.figures.name}", "dtype, head dims, rows, units, keys", "tile", "time", left=2)
    for row in sorted(rows, key=lambda row: row.ratio)[:FEW_ROWS]:
        tile = row.tile
        shape = f"{tile['block_n']} keys, {tile['num_warps']} warps, {tile['num_stages']} stages"
        splits = f", {tile['num_splits']} splits" if "num_splits" in tile else ""
        words = f"{variant_name(tile['block_m'], tile['swapped'])} of {tile['kernel']}: {shape}{splits}"
        made.add_row(", ".join(str(part) for part in row.key), words, f"{row.ratio - 1:+.1%}")
    if rows:
        console.print(made)
    problems = len({entry.point for entry in document.entries})
    console.print(f"{len(rows)} tiles from {problems} problems in {path}; elsewhere the rule stays.", markup=False, highlight=False)
