"""The tables of docs/tiles.md from a study of a whole GPU (`flashtile study`), where one was measured: results/study.json."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from benchmarks import claim_facts as facts
from benchmarks import markdown
from benchmarks.claim_facts import Swept
from flashtile.planner.catalog import GLUON_SM90, TRITON
from flashtile.study import analysis
from flashtile.study.document import Document, load
from flashtile.study.points import GROUPS, REGIMES, SEQLENS_Q

KERNELS = {TRITON: "portable", GLUON_SM90: "Hopper's"}
TILES = ("1", "8s", "8", "16", "16s", "32", "64", "128")
ABSENT = "Not measured yet.\n"


def tables(folder: Path) -> dict[str, str]:
    """Markdown of each table; a study that was predicted is none."""
    path = folder / "study.json"
    document = load(path) if path.exists() else None
    if document is None or document.basis != "measured":
        return {"study-times": ABSENT, "study-map": ABSENT}
    source = f"\nBy `flashtile study` on {document.head['device']}, {document.head['date']}, commit {document.head['commit']}.\n"
    return {"study-times": _times(document) + source, "study-map": _maps(document)}


def studied(document: Document, kernel: str) -> list[Swept]:
    """A kernel's query tiles at every problem with head dim 128 and 16-bit caches, as the sweep has them."""
    found = []
    for entry in document.of_stage("tiles"):
        best: dict[str, float] = {}
        for row in entry.rows:
            if row.kernel == kernel:
                tile = f"{row.block_m}{'s' if row.swapped else ''}"
                best[tile] = min(row.us, best.get(tile, row.us))
        point = entry.point
        if len(best) > 1 and point.head_dim == 128 and not point.quantised:
            found.append(Swept(point.name, point.seqlen_q, point.seqlen_q * point.group, point.kv_bytes, best))
    return found


def _times(document: Document) -> str:
    cells = []
    for kernel, called in KERNELS.items():
        for name, problems in facts.regimes(studied(document, kernel)).items():
            if problems:
                shown = [facts.slowdowns(problems, tile) for tile in TILES]
                times = (f"{median(some):.2f} ({max(some):.2f})" if some else "-" for some in shown)
                cells.append([f"{called}: {name}", str(len(problems)), *times])
    return markdown.table(["kernel, problems", "count", *TILES], cells) if cells else ABSENT


def _maps(document: Document) -> str:
    """The best query tile by queries and group, one table a regime; tiles that the spread does not tell from it beside it."""
    parts = []
    for batch, keys in REGIMES:
        found = analysis.best_map(document, batch, keys)
        if not found:
            continue
        cells = []
        for seqlen_q in SEQLENS_Q:
            verdicts = [found.get((seqlen_q, group)) for group in GROUPS]
            cells.append([str(seqlen_q), *("-" if one is None else _in_words(one) for one in verdicts)])
        header = [f"{batch} x {keys} keys: queries", *(f"group {group}" for group in GROUPS)]
        parts.append(markdown.table(header, cells, "---"))
    return "\n".join(parts) if parts else ABSENT


def _in_words(verdict: analysis.Verdict) -> str:
    """ "16", or "16 (8, 64)" where those are as fast by the spread."""
    ties = [str(tile) for tile in verdict.ties() if tile != verdict.best.block_m]
    return f"{verdict.best.block_m}" + (f" ({', '.join(ties)})" if ties else "")
