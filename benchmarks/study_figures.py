"""The figures of a study: ``python -m benchmarks.study_figures study.json --out docs/figures``, each as SVG and PNG.

The same study gives the same files. Markers, not colours alone, tell lines apart, and cells of a map carry their numbers: a grey print
says as much. A study that was cut has fewer figures; predicted times are called so in every title.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log10
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.figure import STYLE, save
from flashtile.planner.catalog import GLUON_SM90, TRITON
from flashtile.study import analysis
from flashtile.study.document import Document, load
from flashtile.study.points import GROUPS, KEYS, REGIMES, SEQLENS_Q, Point

HERE = Path(__file__).parent
LOOKS = (("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#000000", "x"), ("#E69F00", "v"), ("#56B4E9", "P"))
LINES = ("-", "--", ":", "-.")
KERNELS = {TRITON: "portable kernel", GLUON_SM90: "Hopper's kernel"}
TILES = (1, 8, 16, 32, 64, 128)
SIZE = (7.6, 4.2)
Drawn = Any | None
"""A matplotlib figure, or None where the study has nothing for it."""


def regime_name(batch: int, keys: int) -> str:
    """ "1 x 32k keys"."""
    return f"{batch} x {keys // 1024}k keys" if keys >= 1024 else f"{batch} x {keys} keys"


def times(document: Document) -> Drawn:
    """Time against block_m, a panel a kernel, a line a regime: one query, groups of 8, head dim 128; times over the fastest tile's."""
    kernels = [kernel for kernel in KERNELS if any(row.kernel == kernel for entry in document.entries for row in entry.rows)]
    lines = [(kernel, regime, _tiles_at(document, kernel, Point(*regime))) for kernel in kernels for regime in REGIMES]
    if not any(tiles for _, _, tiles in lines):
        return None
    figure, panels = _subplots(1, len(kernels), sharey=True)
    for kernel, axes in zip(kernels, panels):
        for (regime, (color, marker)), line in zip(zip(REGIMES, LOOKS), LINES):
            tiles = next(tiles for one, its, tiles in lines if (one, its) == (kernel, regime))
            best = min((us for _, its, some in lines if its == regime for us in some.values()), default=0.0)
            at = [TILES.index(block_m) for block_m in tiles]
            axes.plot(at, [us / best for us in tiles.values()], color=color, marker=marker, linestyle=line, label=regime_name(*regime))
        axes.set_xticks(range(len(TILES)), TILES)
        axes.set_xlabel(f"block_m, {KERNELS[kernel]}")
    panels[0].set_yscale("log")
    ticks = (1, 1.2, 1.5, 2, 3, 5, 10)
    panels[0].set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    panels[0].minorticks_off()
    panels[0].set_ylabel("time over the fastest of all tiles")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _tiles_at(document: Document, kernel: str, point: Point) -> dict[int, float]:
    """block_m -> microseconds of one kernel's fastest plan at a point."""
    rows = (row for entry in document.of_stage("tiles") if entry.point == point for row in entry.rows if row.kernel == kernel)
    return {block_m: row.us for block_m, row in sorted(analysis.fastest_of(rows).items())}


def waste(document: Document) -> Drawn:
    """Empty rows in percent against time over the best query tile's, a point for each problem and query tile of 8 rows and more; tiles
    stand a little beside each other."""
    found = [one for one in analysis.wasted_rows(document) if one.wasted > 0]
    if not found:
        return None
    figure, (axes,) = _subplots(1, 1)
    for which, (block_m, (color, marker)) in enumerate(zip(TILES[1:], LOOKS)):
        some = [(100 * one.wasted + 0.5 * (which - 2), one.slowdown) for one in found if one.block_m == block_m]
        if some:
            label = f"block_m {block_m}: {median(slower for _, slower in some):.2f}x in the median"
            axes.plot(*zip(*some), linestyle="none", marker=marker, markersize=4, alpha=0.6, color=color, label=label)
    axes.set_xlabel("rows wasted, % of the tile's")
    axes.set_ylabel("time over the best query tile's")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def roofline(document: Document) -> Drawn:
    """Achieved FLOP/s against FLOP a byte of keys and values, under the device's bandwidth and matrix rate; a marker a bound."""
    found, device = analysis.roofline(document), document.figures
    if not found:
        return None
    figure, (axes,) = _subplots(1, 1)
    most = max(device.matrix_rate / device.bandwidth * 2, *(one.intensity for one in found))
    ridge, least = device.matrix_rate / device.bandwidth, min(one.intensity for one in found) / 2
    roof = [(x, min(x * device.bandwidth, device.matrix_rate) / 1e12) for x in (least, ridge, most)]
    axes.plot(
        *zip(*roof), color="black", linewidth=1.2, label=f"{device.bandwidth / 1e12:.2f} TB/s, {device.matrix_rate / 1e12:.0f} TFLOP/s"
    )
    for bound, (color, marker) in zip(("memory", "latency", "matrix"), LOOKS):
        some = [(one.intensity, one.point.problem.flops / one.best_us * 1e-6) for one in found if one.bound == bound]
        if some:
            what = {"memory": "reading the keys", "latency": "neither: latency", "matrix": "multiplying"}[bound]
            axes.plot(*zip(*some), linestyle="none", marker=marker, markersize=4, alpha=0.6, color=color, label=f"{what} ({len(some)})")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1024"])
    axes.set_xlabel("FLOP a byte of keys and values")
    axes.set_ylabel("TFLOP/s of the fastest plan")
    axes.legend(frameon=False, fontsize=8, title="bound by", alignment="left")
    return figure


def bandwidth(document: Document) -> Drawn:
    """Achieved bandwidth of the fastest plan against keys: one query, groups of 8, head dim 128; a line a batch and kind of cache."""
    lines: dict[tuple[int, str], dict[int, float]] = {}
    for verdict in analysis.verdicts(document):
        point = verdict.point
        if (point.seqlen_q, point.group, point.head_dim) == (1, 8, 128):
            lines.setdefault((point.batch, point.dtype_kv), {})[point.keys] = point.kv_bytes / verdict.best.us * 1e-6
    lines = {name: line for name, line in sorted(lines.items()) if len(line) > 1}
    if not lines:
        return None
    figure, (axes,) = _subplots(1, 1)
    for ((batch, dtype_kv), line), (color, marker) in zip(lines.items(), LOOKS):
        style = "-" if dtype_kv == "bfloat16" else "--"
        axes.plot(*zip(*sorted(line.items())), marker=marker, color=color, linestyle=style, label=f"batch {batch}, {dtype_kv}")
    axes.axhline(document.figures.bandwidth * 1e-12, color="black", linewidth=1.2, linestyle=":", label="long reads")
    axes.set_xscale("log", base=2)
    axes.set_xticks(KEYS, [f"{keys // 1024}k" if keys >= 1024 else str(keys) for keys in KEYS])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("keys a sequence")
    axes.set_ylabel("TB/s of keys and values")
    axes.legend(frameon=False, fontsize=8)
    return figure


def splits(document: Document) -> Drawn:
    """Time against the number of splits, a panel a problem, a line a kernel and query tile."""
    points = list(dict.fromkeys(entry.point for entry in document.of_stage("splits")))[:4]
    if not points:
        return None
    figure, panels = _subplots(1, len(points))
    names = sorted({name for point in points for name in analysis.split_curves(document, point)}, key=lambda name: (name[1], name[0]))
    looks = {name: (*LOOKS[i % len(LOOKS)], LINES[i % len(LINES)]) for i, name in enumerate(names)}
    for axes, point in zip(panels, points):
        for name, curve in analysis.split_curves(document, point).items():
            color, marker, line = looks[name]
            label = f"{name[1]}, {KERNELS[name[0]]}"
            axes.plot(*zip(*curve), marker=marker, color=color, linestyle=line, markersize=4, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([1, 8, 64, 512], ["1", "8", "64", "512"])
        axes.set_xlabel("splits")
        queries = "1 query" if point.seqlen_q == 1 else f"{point.seqlen_q} queries"
        axes.set_title(f"{regime_name(point.batch, point.keys)}\n{queries}, group {point.group}", fontsize=8)
        low, high = axes.get_ylim()
        ticks = [tick * 10**power for power in range(int(log10(low)) - 1, 5) for tick in (1, 2, 5) if low <= tick * 10**power <= high]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    panels[0].set_ylabel("microseconds")
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    return figure


def best_map(document: Document) -> Drawn:
    """The best block_m of each number of queries and group, a panel a regime; below it what a fixed 64 loses. A * is a tie with others."""
    maps = [(regime, analysis.best_map(document, *regime)) for regime in REGIMES]
    maps = [(regime, cells) for regime, cells in maps if len(cells) > 1]
    if not maps:
        return None
    figure, panels = _subplots(1, len(maps), sharey=True)
    for axes, (regime, cells) in zip(panels, maps):
        shades = [[_shade(cells.get((q, g))) for g in GROUPS] for q in SEQLENS_Q]
        axes.imshow(shades, cmap="Greys", vmin=0, vmax=9, aspect="auto")
        for (q, g), verdict in cells.items():
            star = "*" if len(verdict.ties()) > 1 else ""
            lost = "" if verdict.fixed_loss is None else f"\n{100 * verdict.fixed_loss:+.0f}%"
            at = (GROUPS.index(g), SEQLENS_Q.index(q))
            axes.text(*at, f"{verdict.best.block_m}{star}{lost}", ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(GROUPS)), GROUPS)
        axes.set_yticks(range(len(SEQLENS_Q)), SEQLENS_Q)
        axes.grid(visible=False)
        axes.set_title(regime_name(*regime), fontsize=8)
        axes.set_xlabel("query heads a key head")
    panels[0].set_ylabel("queries a sequence")
    return figure


def _shade(verdict: analysis.Verdict | None) -> float:
    """A light grey that is darker for taller tiles; white where nothing was timed."""
    return 0.0 if verdict is None else 0.6 + 0.6 * TILES.index(verdict.best.block_m)


def _subplots(rows: int, columns: int, **more: Any) -> tuple[Any, list[Any]]:
    """A figure and its panels in order."""
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(rows, columns, figsize=SIZE, layout="constrained", squeeze=False, **more)
    return figure, list(panels.flat)


FIGURES: dict[str, tuple[Callable[[Document], Drawn], str]] = {
    "study_times": (times, "Time of each query tile, one query, 8 query heads a key head, head dim 128"),
    "study_waste": (waste, "Rows wasted against time lost"),
    "study_roofline": (roofline, "The roofline of decode, and what bounds each problem"),
    "study_bandwidth": (bandwidth, "Achieved bandwidth against keys, one query, 8 query heads a key head, head dim 128"),
    "study_splits": (splits, "Time against the number of splits, head dim 128"),
    "study_map": (best_map, "The fastest block_m, and what a fixed 64 loses (* within the spread of another), head dim 128"),
}


def main(
    study: Annotated[Path, typer.Argument(help="A study's file.")],
    out: Annotated[Path, typer.Option(help="Folder for the figures.")] = HERE.parent / "docs" / "figures",
) -> None:
    """Draws every figure that the study has times for."""
    import matplotlib as mpl

    mpl.use("Agg")
    document = load(study)
    head = document.head
    source = f"{head['basis']} on {head['device']}" + (f", commit {head['commit']}" if head.get("commit") else "") + f", {head['date']}"
    for name, (draw, title) in FIGURES.items():
        for suffix in (".svg", ".png"):
            with mpl.rc_context(STYLE | {"savefig.dpi": 160}):
                figure = draw(document)
                if figure is None:
                    print(f"{name}: the study has nothing for it")
                    break
                figure.suptitle(f"{title}\n{source}", fontsize=9)
                save(figure, out / f"{name}{suffix}")
        else:
            print(f"{out / name}: .svg and .png written")


if __name__ == "__main__":
    typer.run(main)
