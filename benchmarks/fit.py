"""Fits the decode cost model to measured plans: ``python -m benchmarks.fit --study benchmarks/results/study.json --out H200.json``.

Without a study it takes what earlier sweeps measured. The error of the present constants and of the fitted ones is printed, on the
problems that were fitted to and on those that were held out; ``--out`` keeps the constants as ``flashtile/planner/costs`` has them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from flashtile.planner.constants import Constants, constants_of
from flashtile.planner.device import Device
from flashtile.study.document import load
from flashtile.study.fit import NEAR, Errors, errors_of, fit, halves, near_the_best, regrets_of
from flashtile.study.samples import Sample, of_study, of_sweep, of_tuning

RESULTS = Path(__file__).parent / "results"
CLOSE = 0.03  # of the best: what a choice may lose


def earlier(results: Path, device: Device) -> dict[str, list[Sample]]:
    """The samples of each earlier sweep."""
    sweep, tuning = (json.loads((results / name).read_text()) for name in ("decode_sweep.json", "hopper_tuning.json"))
    return {"decode_sweep": list(of_sweep(sweep, device)), "hopper_tuning": list(of_tuning(tuning, device))}


def errors_by_source(sources: dict[str, list[Sample]], constants: Constants, device: Device) -> Iterator[tuple[str, Errors]]:
    """Each source's errors, and those of each kernel in it where there are several."""
    for source, samples in sources.items():
        kernels = sorted({one.tile.kernel for one in samples})
        for kernel in kernels:
            found = errors_of((one for one in samples if one.tile.kernel == kernel), constants, device)
            if found is not None:
                yield f"{source}, {kernel}", found


def main(
    study: Annotated[list[Path] | None, typer.Option(help="A measured study's file; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="Whose figures and constants the earlier sweeps go with.")] = "h200",
    results: Annotated[Path, typer.Option(help="Folder of decode_sweep.json and hopper_tuning.json.")] = RESULTS,
    only_study: Annotated[bool, typer.Option("--only-study", help="Leave the earlier sweeps out.")] = False,
    seconds: Annotated[float, typer.Option(help="How long the fit may take.")] = 120.0,
    free: Annotated[list[str] | None, typer.Option(help="A constant that may change; repeatable. Default: all of them.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to keep the constants.")] = None,
) -> None:
    """Prints errors of the model before and after, and keeps the fitted constants."""
    documents = {path.stem: load(path) for path in study or ()}
    figures = next((document.figures for document in documents.values()), Device.named(device))
    sources = {} if only_study else earlier(results, figures)
    sources |= {name: list(of_study(document)) for name, document in documents.items()}
    every = [one for samples in sources.values() for one in samples]
    learned, held = halves(every)
    now = constants_of(figures.name)
    if unknown := sorted(set(free or ()) - set(Constants._fields)):
        raise typer.BadParameter(f"no constants: {', '.join(unknown)}; there are {', '.join(Constants._fields)}", param_hint="--free")
    fitted = fit(learned, now, figures, seconds, free)
    facts: dict[str, Any] = {}
    for label, constants in (("present", now), ("fitted", fitted)):
        for part, some in (("fitted to", learned), ("held out", held)):
            found = errors_of(some, constants, figures)
            near = errors_of(near_the_best(some), constants, figures)
            facts[f"{label}, {part}"] = found._asdict() if found else None
            facts[f"{label}, {part}, within {NEAR}x of the fastest"] = near._asdict() if near else None
            regrets = regrets_of(some, constants, figures)
            within = f"{sum(regret <= CLOSE for regret in regrets)} of {len(regrets)}"
            print(f"{label} constants, {part}: {found}; the plan of the least predicted time is within {CLOSE:.0%} of the best on {within}")
            print(f"  within {NEAR}x of the fastest: {near}")
        for source, errors in errors_by_source(sources, constants, figures):
            print(f"  {source}: {errors}")
    for name, number in fitted.flat().items():
        before = now.flat()[name]
        if number != before:
            print(f"{name}: {before:g} -> {number:g}")
    if out is not None:
        basis = f"fitted by benchmarks/fit.py to {', '.join(sources)}; every third problem held out"
        out.write_text(
            json.dumps({"device": figures.name, "basis": basis, "errors": facts, "constants": fitted._asdict()}, indent=1) + "\n"
        )
        print(f"{out} written")


if __name__ == "__main__":
    typer.run(main)
