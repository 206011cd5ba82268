"""The figures of docs/tiles.md, from the sweep of the portable decode kernel: ``python -m benchmarks.claim_figures``.

The same results give the same files, byte for byte. Every kind of point has a marker of its own, so that they are told apart in grey.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks import claim_facts as facts
from benchmarks.claim_facts import Results
from benchmarks.claim_tables import TILES
from benchmarks.figure import STYLE, save

HERE = Path(__file__).parent
LOOKS = (("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#56B4E9", "v"), ("#000000", "x"))
SPLIT_PROBLEMS = ("1x512 32/8", "1x4096 32/8", "1x32768 32/8", "1x131072 32/8", "8x2048 32/8", "17x2048 32/8")


def times(results: Results, figure: Any) -> None:
    """Time of each query tile over the fastest by regime: median, and a bar from the least to the greatest. 1 has an axis of its own."""
    alone, rest = figure.subplots(1, 2, width_ratios=(1, 6))
    named = facts.regimes(facts.swept(results))
    for which, ((name, problems), (color, marker)) in enumerate(zip(named.items(), LOOKS)):
        for axes, tiles in ((alone, TILES[:1]), (rest, TILES[1:])):
            timed = {tile: some for tile in tiles if (some := facts.slowdowns(problems, tile))}
            at = [tiles.index(tile) + 0.13 * (which - 2.5) for tile in timed]
            middle = [median(some) for some in timed.values()]
            around = [
                [m - min(some) for m, some in zip(middle, timed.values())],
                [max(some) - m for m, some in zip(middle, timed.values())],
            ]
            look = {"color": color, "marker": marker, "markersize": 5, "linestyle": "none", "capsize": 2}
            axes.errorbar(at, middle, around, label=name, **look)
            axes.set_xticks(range(len(tiles)), tiles)
            axes.set_xlim(-0.5, len(tiles) - 0.5)
            axes.grid(visible=False, axis="x")
    alone.set_ylim(0, 36)
    rest.set_ylim(0.95, 2.1)
    alone.set_ylabel("time / the fastest tile's")
    rest.set_xlabel("query tile (s: operands swapped)")
    rest.legend(frameon=False, loc="upper right")


def wasted(results: Results, figure: Any) -> None:
    """Rows computed for nothing against time lost, a point for each problem and tile that reads its keys once by matrix instructions."""
    axes = figure.subplots()
    problems = facts.swept(results)
    for which, (tile, (color, marker)) in enumerate(zip(TILES[1:], LOOKS)):
        tall = int(tile.rstrip("s"))
        points = [
            (100 * (1 - problem.rows / tall) + 0.8 * (which - 2.5), 100 * (problem.best[tile] / min(problem.best.values()) - 1))
            for problem in problems
            if tile in problem.best and tall >= problem.rows
        ]
        axes.plot(*zip(*points), linestyle="none", color=color, marker=marker, markersize=5, alpha=0.7, label=tile)
    axes.set_xlabel("rows of the tile that are wasted, %")
    axes.set_ylabel("time lost to the fastest tile, %")
    axes.legend(frameon=False, ncols=2, title="query tile")
    axes.set_ylim(-3, 70)


def splits(results: Results, figure: Any) -> None:
    """Time of 16 rows against the number of splits, over the best number."""
    axes = figure.subplots()
    entries = {entry["name"]: entry for entry in results["decode_sweep"]["entries"]}
    for name, (color, marker) in zip(SPLIT_PROBLEMS, LOOKS):
        best: dict[int, float] = {}
        for block_m, swapped, *_, count, us in entries[name]["timed"]:
            if (block_m, swapped) == (16, 0):
                best[count] = min(us, best.get(count, us))
        least = min(best.values())
        axes.plot(*zip(*sorted((count, us / least) for count, us in best.items())), color=color, marker=marker, markersize=5, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    counts = (1, 2, 4, 8, 16, 32, 64)
    axes.set_xticks(counts, map(str, counts))
    axes.set_yticks([1, 1.2, 1.5, 2, 3, 5, 8, 12], ["1", "1.2", "1.5", "2", "3", "5", "8", "12"])
    axes.minorticks_off()
    axes.set_xlabel("splits of the keys")
    axes.set_ylabel("time / the best number's")
    axes.legend(frameon=False, title="batch x keys, heads")


FIGURES = {"tile_times": times, "tile_wasted": wasted, "tile_splits": splits}


def main(
    results: Annotated[Path, typer.Option(help="Folder of the result files.")] = HERE / "results",
    out: Annotated[Path, typer.Option(help="Folder of the figures.")] = HERE.parent / "docs" / "figures",
) -> None:
    """Draws each figure as SVG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    found = facts.load(results)
    data = found["decode_sweep"]
    for name, fill in FIGURES.items():
        with mpl.rc_context(STYLE):
            figure = plt.figure(figsize=(7.6, 4.2), layout="constrained")
            fill(found, figure)
            figure.suptitle(f"Decode by the portable kernel, bfloat16, head dim 128\n{data['device']}, {data['date']}", fontsize=9)
            save(figure, out / f"{name}.svg")
    print(f"{len(FIGURES)} figures written to {out}")


if __name__ == "__main__":
    typer.run(main)
