"""The claims of docs/tiles.md, each with its verdict and the figures behind it: ``python -m benchmarks.claims [--check]``.

A verdict is written here by hand, its figures are read out of the results, and ``holds`` says whether they still carry it. A ledger whose
figures no longer do is not made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from benchmarks import claim_facts as facts
from benchmarks import claim_study, claim_tables, markdown, targets
from benchmarks.claim_facts import Results
from benchmarks.report import StaleReport, refresh

HERE = Path(__file__).parent
ROOM = 1.02  # runs of the sweep drift by 1 to 2 %: less than this decides nothing


@dataclass(frozen=True)
class Evidence:
    """Figures in a sentence, and whether they carry the verdict."""

    figures: str
    holds: bool


@dataclass(frozen=True)
class Claim:
    """One thing that is said of the query tile of 64, and what became of it."""

    said: str
    verdict: str
    judge: Callable[[Results], Evidence]
    answer: str


def _fixed(results: Results) -> Evidence:
    taken = facts.tiles_taken(results)
    tiles = sorted({tile for counts in taken.values() for tile in counts})
    few, many = (sorted(taken[key]) for key in ((1, 4), (16, 4)))
    words = f"{len(taken)} kinds of problem, tiles of {', '.join(map(str, tiles))} taken: {few[0]} for 4 rows, {many[0]} for 64"
    return Evidence(words, len(tiles) > 1)


def _sixteen(results: Results) -> Evidence:
    half_empty = facts.of_floor_with_tile(results, 8)
    full = facts.slowdowns([problem for problem in facts.swept(results) if problem.kv_bytes >= facts.LARGE], "8s")
    words = (
        f"Hopper's tile of 8 leaves half or more of its instruction's rows empty and reads 64 MB and more at {facts.shares_of(half_empty)}"
    )
    swapped = (
        f"the portable one, with keys on the large side, leaves fewer empty and takes {facts.times_of(full)}, as long as the fastest tile"
    )
    return Evidence(f"{words} of the read floor; {swapped}", median(half_empty) > 0.9 and median(full) > ROOM)


def _four_warps(results: Results) -> Evidence:
    warps = facts.by_warps(results, 16)
    words = "; ".join(f"{number} warps {facts.times_of(ratios)}" for number, ratios in warps.items())
    return Evidence(f"16 rows by {words} (of the tile's best)", all(median(ratios) < 1.1 for ratios in warps.values()) and len(warps) > 1)


def _aligned(results: Results) -> Evidence:
    rates = facts.bytes_a_second(results)
    words = ", ".join(f"{rates[tile]:.2f} with {tile}" for tile in ("16", "16s", "64"))
    widths = facts.widths(results)
    copied = f"every tile's copies of keys and values are of {', '.join(map(str, sorted(widths)))} bytes"
    holds = min(rates["16"], rates["16s"]) * ROOM > rates["64"] and widths == {16}
    return Evidence(f"{copied}; TB/s at 64 MB and more: {words}", holds)


def _bound(results: Results) -> Evidence:
    shares = facts.of_floor(results)
    words = "; ".join(f"{name}: {facts.shares_of(some)}" for name, some in shares.items())
    return Evidence(f"the read floor's share of our time, one query: {words}", median(shares[facts.SIZES[-1][0]]) > 0.9)


def _scheduling(results: Results) -> Evidence:
    rows = [row for row in results["decode_ragged"]["entries"] if not row.get("page_size")]
    speeds = [speed for row in rows if (speed := targets.beside_ratio(row)) is not None]
    tiles = sorted({row["plan"]["block_m"] for row in rows if row.get("plan")})
    words = f"ragged batches at {min(speeds):.2f}x to {max(speeds):.2f}x of an even batch's speed, by tiles of {', '.join(map(str, tiles))}"
    return Evidence(words, min(speeds) > 0.93 and 64 not in tiles)


def _neglected(results: Results) -> Evidence:
    named = facts.regimes(facts.swept(results))
    found = {name: facts.slowdowns(problems, "64") for name, problems in named.items()}
    words = "; ".join(f"{name}: {facts.times_of(ratios)}" for name, ratios in found.items() if ratios)
    one = [ratios for name, ratios in found.items() if name.startswith("1 query")]
    return Evidence(f"64 over the fastest tile: {words}", median(one[-1]) < 1.05 < median(one[0]))


def _compiled(results: Results) -> Evidence:
    points = [point for point in facts.compiled(results) if point["tile"][0] in (1, 8, 16, 32)]
    plans = [point for point in points if not point["reason"]]
    spilled = sum(bool(point["spilled_bytes"]) for point in plans)
    archs = len({point["arch"] for point in plans})
    words = f"{len(plans)} of {len(points)} points with 1, 8, 16 and 32 rows have a plan, each compiled, on {archs} architectures"
    return Evidence(f"{words}; {spilled} spill", len(plans) > len(points) // 2 and spilled == 0)


def _rows_a_warp(results: Results) -> Evidence:
    rows = [rows for point in facts.compiled(results) if (rows := facts.rows_a_warp(point)) is not None]
    few = sum(count < 16 for count in rows)
    none = sum(point["tile"][0] == 1 and not point["reason"] for point in facts.compiled(results))
    words = f"{few} of {len(rows)} compiled plans with NVIDIA's matrix instructions have warps of 8 rows; {none} more, of 1 row, use none"
    return Evidence(words, few > 0)


def _loses(results: Results) -> Evidence:
    one = [problem for problem in facts.swept(results) if problem.seqlen_q == 1]
    behind = [ratio for ratio in facts.slowdowns(one, "64") if ratio > ROOM]
    again = facts.reread(results)
    words = ", ".join(f"{ratio:.1f}x with {group}" for group, ratio in again.items())
    first = f"64 is the fastest for none of {len(one)} problems with one query, and more than 2 % behind for {len(behind)}"
    grows = list(again.values()) == sorted(again.values())
    never = all(min(problem.best, key=lambda tile: problem.best[tile]) != "64" for problem in one)
    return Evidence(f"{first}; a tile of 1 takes, by heads that read the same keys, {words}", grows and never)


CLAIMS = (
    Claim("the split kernel's query tile is fixed at 64 whatever seqlen_q is", "true when the code is FlashAttention-2's", _fixed,
          "plans it for each problem; takes `block_m=`"),
    Claim("a tensor-core warp needs at least 16 rows to be used well", "true when arithmetic is what takes the time", _sixteen,
          "leaves rows empty, or gives the keys the large side: whichever reads faster"),
    Claim("64 = 4 warps x 16 fits the hardware; other splits of the warps do not", "false", _four_warps,
          "lets warps that have no rows share the keys of a tile"),
    Claim("64 keeps memory accesses aligned and helps the cache; other values misalign them", "false", _aligned,
          "knows alignment as a fact of pointers and strides, apart from the tile"),
    Claim("attention in decode is bound by loading the KV cache, not by arithmetic", "true when there is much of it", _bound,
          "predicts what bounds each problem, and says so in `explain`"),
    Claim("a fixed tile simplifies scheduling and so gains parallel efficiency", "false", _scheduling,
          "shares out key tiles, which every query tile has"),
    Claim("sequence lengths are far above 64 in most work, so the extra arithmetic can be neglected",
          "true when reading takes longer", _neglected, "counts wasted rows as work, beside the reading"),
    Claim("1, 8, 16 and 32 cannot be compiled (the matrix library's constraints)", "false", _compiled,
          "compiles all of them, and refuses with a reason what does not fit"),
    Claim("thread organisation forbids fewer than 16 rows a warp", "false", _rows_a_warp, "has tiles of 1 and 8 rows"),
    Claim("values other than 64 lose performance through unaligned access", "false", _loses,
          "takes a tile that reads the keys once, and no taller"),
)  # fmt: skip


def ledger(results: Results) -> str:
    """The table of all claims; raises StaleReport where figures no longer carry a verdict."""
    cells = []
    for number, claim in enumerate(CLAIMS, start=1):
        evidence = claim.judge(results)
        if not evidence.holds:
            raise StaleReport(f"claim {number} is called {claim.verdict!r}, and the results say: {evidence.figures}")
        cells.append([f"[{number}](#claim-{number})", claim.said, f"**{claim.verdict}**", evidence.figures, claim.answer])
    return markdown.table(["", "what is said", "verdict", "measured", "what flashtile does"], cells, "---")


def tables(folder: Path) -> dict[str, str]:
    """Markdown of each table of docs/tiles.md from a folder of result files."""
    results = facts.load(folder)
    return {"ledger": ledger(results), **claim_tables.tables(results), **claim_study.tables(folder)}


def main(
    results: Annotated[Path, typer.Option(help="Folder of the result files.")] = HERE / "results",
    docs: Annotated[Path, typer.Option(help="The document with the markers.")] = HERE.parent / "docs" / "tiles.md",
    check: Annotated[bool, typer.Option(help="Write nothing; exit with 1 if the document is stale.")] = False,
) -> None:
    """Fills the document's tables from the results."""
    refresh(docs, tables(results), check, "python -m benchmarks.claims")


if __name__ == "__main__":
    typer.run(main)
