"""The figure of docs/performance.md: ``python -m benchmarks.figure``.

Achieved bandwidth against the bytes of keys and values that a call has to read: the read floor, flashtile and each peer,
from the problems with one query a sequence. A point is one problem, a line the median of the problems of one size. The
same results give the same file, byte for byte.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks import targets
from benchmarks.report import LABELS
from benchmarks.targets import Row

HERE = Path(__file__).parent
FLOOR = "read floor"
# told apart without colour, too; the palette is Okabe and Ito's
STYLES: dict[str, tuple[str, str]] = {
    "flashtile": ("#D55E00", "o"), "fa2": ("#999999", "v"), "fa3": ("#0072B2", "s"), "flashinfer_tc": ("#009E73", "^"),
    "flashinfer_cc": ("#CC79A7", "x"), "cudnn": ("#56B4E9", "D"), "torch_flash": ("#F0E442", "P"),
}  # fmt: skip
STYLE = {
    "svg.hashsalt": "flashtile", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 9, "axes.grid": True,
    "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
Points = list[tuple[int, float]]


def floor_points(rows: list[Row]) -> Points:
    """(bytes, TB/s) of the read floor, a problem each."""
    return sorted((row["kv_bytes"], _rate(row, row["floor_us"])) for row in rows if row.get("floor_us"))


def points(rows: list[Row], name: str) -> Points:
    """(bytes, TB/s) of one contestant, a problem each."""
    return sorted((row["kv_bytes"], _rate(row, us)) for row in rows if (us := targets.microseconds(row, name)))


def shares(rows: list[Row], name: str) -> Points:
    """(bytes, percent of the read floor's speed on the same problem in the same run) of one contestant."""
    timed = [(row, targets.microseconds(row, name)) for row in rows if row.get("floor_us")]
    return sorted((row["kv_bytes"], 100 * row["floor_us"] / us) for row, us in timed if us)


def medians(some: Points) -> Points:
    """One point for each number of bytes."""
    sizes = sorted({size for size, _ in some})
    return [(size, median(value for other, value in some if other == size)) for size in sizes]


def _rate(row: Row, us: float) -> float:
    return float(row["kv_bytes"] / us * 1e-6)


def draw(rows: list[Row], subtitle: str, path: Path) -> None:
    """Writes the figure as SVG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with mpl.rc_context(STYLE):
        figure, (upper, lower) = plt.subplots(2, 1, figsize=(7.6, 6.8), sharex=True, height_ratios=(3, 2), layout="constrained")
        upper.plot(*zip(*medians(floor_points(rows))), color="black", linestyle="--", linewidth=1.2, label=FLOOR)
        lower.axhline(100, color="black", linestyle="--", linewidth=1.2)
        for name, (color, marker) in STYLES.items():
            ours = name == "flashtile"
            for axes, some in ((upper, points(rows, name)), (lower, shares(rows, name))):
                if not some:
                    continue
                look: dict[str, Any] = {"color": color, "zorder": 3 if ours else 2}
                axes.plot(*zip(*some), linestyle="none", marker=marker, markersize=3.5, alpha=0.55, **look)
                axes.plot(*zip(*medians(some)), linewidth=2.0 if ours else 1.0, marker=marker, markersize=4.5, label=LABELS[name], **look)
        upper.set_xscale("log")
        upper.set_ylabel("TB/s of keys and values")
        upper.set_ylim(bottom=0)
        lower.set_ylabel("% of the read floor")
        lower.set_ylim(0, 110)
        lower.set_xlabel("bytes of keys and values that a call reads")
        ticks = [10**6, 10**7, 10**8, 10**9, 10**10]
        lower.set_xticks(ticks, ["1 MB", "10 MB", "100 MB", "1 GB", "10 GB"])
        upper.legend(frameon=False, ncols=2, loc="upper left")
        figure.suptitle(f"Decode, one query a sequence, bfloat16, head dim 128\n{subtitle}", fontsize=9)
        save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Writes a figure and closes it; without date and version, the same results make the same bytes."""
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None})
    plt.close(figure)


def main(
    results: Annotated[Path, typer.Option(help="Folder of decode_seqlen1.json.")] = HERE / "results",
    out: Annotated[Path, typer.Option(help="The figure.")] = HERE.parent / "docs" / "figures" / "decode_bandwidth.svg",
) -> None:
    """Draws decode_seqlen1.json; problems of decode_floor.json are added where they are from the same commit."""
    data = json.loads((results / "decode_seqlen1.json").read_text())
    rows = [row for row in data["entries"] if "results" in row]
    floor = results / "decode_floor.json"
    if floor.exists():
        more = json.loads(floor.read_text())
        known = {row["name"] for row in rows}
        rows += [row for row in more["entries"] if more["commit"] == data["commit"] and "results" in row and row["name"] not in known]
    draw(rows, f"{data['device']}, commit {data['commit']}, {data['date']}", out)
    print(f"{out} written: {len(rows)} problems")


if __name__ == "__main__":
    typer.run(main)
