"""Loss curves of one training by several attentions: smoothed, compared and drawn.

python examples/loss_curves.py docs/figures/tiny_gpt_*.json     # draws each run beside its file, and prints their table
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

SMOOTHED_OVER = 10  # steps


def smoothed(losses: list[float]) -> list[float]:
    """Means over SMOOTHED_OVER steps in a row."""
    over = min(SMOOTHED_OVER, len(losses))
    return [sum(losses[i : i + over]) / over for i in range(len(losses) - over + 1)]


def apart(some: list[float], others: list[float]) -> float:
    """The largest difference of two curves."""
    return max(abs(a - b) for a, b in zip(some, others))


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The smoothed loss curves, and below them how far each is from the first."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": "flashtile", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):  # with a salt the same curves make the same file
        figure = Figure(figsize=(6, 4), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        first, *others = map(smoothed, curves.values())
        looks: list[dict[str, Any]] = [
            {"color": "0.7", "linewidth": 4.0},
            {"color": "black", "linewidth": 1.2},
            {"color": "black", "linewidth": 1.2, "linestyle": ":"},
        ]
        for name, losses, look in zip(curves, (first, *others), looks):
            upper.plot(losses, label=name, **look)
        for losses, look in zip(others, looks[1:]):
            lower.plot([abs(a - b) for a, b in zip(first, losses)], **look)
        upper.set_ylabel("loss, nats a character")
        upper.legend(frameon=False)
        lower.set(xlabel=f"step (means over {SMOOTHED_OVER})", ylabel="difference", ylim=(0.0, None))
        lower.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        figure.savefig(path, metadata={"Date": None, "Creator": None} if path.suffix == ".svg" else None)


def table(documents: list[dict[str, Any]]) -> str:
    """Runs of tiny_gpt.py, as its ``--json`` writes them, as a table in Markdown, a run a row."""
    head = ("device", "products in", "model", "steps", "loss at first", "at last", "flashtile apart", "plain products apart", "cache")
    rows = [head, ("---",) * len(head)]
    for run in documents:
        losses = smoothed(run["losses"]["flashtile"])
        gaps = [f"{gap['smoothed']:.1g}" for name, gap in run["apart"].items()]
        ends = f"{losses[0]:.3f}", f"{losses[-1]:.3f}"
        rows.append((run["device"], run["dtype"], run["size"]["name"], str(run["steps"]), *ends, *gaps, f"{run['cache']:.1g}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(
    runs: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="Files that tiny_gpt.py wrote with --json.")],
) -> None:
    """Draws the curves of each run beside its file, and prints a table of all."""
    documents = [json.loads(run.read_text(encoding="utf-8")) for run in runs]
    for run, document in zip(runs, documents):
        draw(document["losses"], run.with_suffix(".svg"))
    print(table(documents))


if __name__ == "__main__":
    typer.run(main)
