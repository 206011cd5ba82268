"""What the claims of docs/tiles.md are judged by: facts read out of benchmarks/results/*.json, a function each."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import targets

MEGABYTE = 1e6
SMALL, LARGE = 16 * MEGABYTE, 64 * MEGABYTE  # bytes of keys and values: 1 x 4096 with 8 heads of 128 is the first of the middle
SIZES = (("below 16 MB", 0.0, SMALL), ("16 to 64 MB", SMALL, LARGE), ("64 MB and more", LARGE, float("inf")))
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Swept:
    """A problem of the sweep and the best time of each query tile, in microseconds; "16s" is 16 rows with operands swapped."""

    name: str
    seqlen_q: int
    rows: int  # (query, head of a group) pairs that share a key head
    kv_bytes: float
    best: dict[str, float]

    def slower(self, tile: str) -> float | None:
        """The time of a tile over that of the fastest."""
        return self.best[tile] / min(self.best.values()) if tile in self.best else None


def load(folder: Path) -> Results:
    """The result files that claims rest on."""
    grids = ("sweep", "seqlen1", "floor", "speculative", "ragged", "fp8")
    names = (*(f"decode_{grid}" for grid in grids), "compile_matrix", "access_width")
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


def swept(results: Results) -> list[Swept]:
    """Problems of the portable kernel's sweep in which more than one query tile was timed."""
    found = []
    for entry in results["decode_sweep"]["entries"]:
        best: dict[str, float] = {}
        for block_m, swapped, *_, us in entry["timed"]:
            tile = f"{block_m}{'s' if swapped else ''}"
            best[tile] = min(us, best.get(tile, us))
        rows = entry["seqlen_q"] * entry["num_heads_q"] // entry["num_heads_kv"]
        kv_bytes = 2 * 2 * 128 * entry["keys"] * entry["batch"] * entry["num_heads_kv"]
        if len(best) > 1:
            found.append(Swept(entry["name"], entry["seqlen_q"], rows, kv_bytes, best))
    return found


def regimes(problems: list[Swept]) -> dict[str, list[Swept]]:
    """One query by the bytes of keys and values; several by their packed rows."""
    one = {f"1 query, {name}": [p for p in problems if p.seqlen_q == 1 and low <= p.kv_bytes < high] for name, low, high in SIZES}
    more: dict[str, list[Swept]] = defaultdict(list)
    for problem in sorted((p for p in problems if p.seqlen_q > 1), key=lambda p: p.rows):
        more[f"{problem.seqlen_q} queries, {problem.rows} rows"].append(problem)
    return one | more


def slowdowns(problems: list[Swept], tile: str) -> list[float]:
    """Of each problem in which the tile was timed: its time over the fastest tile's."""
    return [ratio for problem in problems if (ratio := problem.slower(tile)) is not None]


def by_warps(results: Results, block_m: int) -> dict[int, list[float]]:
    """Of each problem with one query: the best time of a tile with so many warps over its best with any."""
    found: dict[int, list[float]] = defaultdict(list)
    for entry in results["decode_sweep"]["entries"]:
        timed = [plan for plan in entry["timed"] if plan[0] == block_m and not plan[1]]
        if entry["seqlen_q"] > 1 or not timed:
            continue
        best = min(plan[-1] for plan in timed)
        for warps in sorted({plan[3] for plan in timed}):
            found[warps].append(min(plan[-1] for plan in timed if plan[3] == warps) / best)
    return dict(sorted(found.items()))


def compiled(results: Results) -> list[dict[str, Any]]:
    """The points of the compile matrix by column; ``label`` is the tile as the sweep writes it, Hopper's kernel with its name."""
    matrix = results["compile_matrix"]
    points = [dict(zip(matrix["columns"], point)) for point in matrix["points"]]
    for point in points:
        block_m, swapped = point["tile"]
        point["label"] = f"{block_m}{'s' if swapped else ''}" + (" (Hopper's)" if point["kernel"].startswith("gluon") else "")
    return points


def rows_a_warp(point: dict[str, Any]) -> int | None:
    """The rows that one warp computes, empty ones included; None where no matrix instruction of NVIDIA's is used.

    Queries on an instruction's large side come 16 a warp, on the small side 8.
    """
    if not point["mma"] or not point["warps_per_cta"] or not point["arch"].startswith("sm_"):
        return None
    (block_m, swapped), warps = point["tile"], point["warps_per_cta"]
    if len(warps) > 2:  # each warp has all rows, and keys of its own
        return max(16, int(block_m))
    return max(8, block_m // warps[1]) if swapped else max(16, block_m // warps[0])


def of_floor(results: Results) -> dict[str, list[float]]:
    """Problems with one query by their bytes: how much of our time the read floor takes."""
    rows = {row["name"]: row for grid in ("decode_floor", "decode_seqlen1") for row in results[grid]["entries"]}
    shares = [(row["kv_bytes"], share) for row in rows.values() if (share := targets.of_floor(row)) is not None]
    return {name: [share for kv_bytes, share in shares if low <= kv_bytes < high] for name, low, high in SIZES}


def of_floor_quantised(results: Results) -> dict[str, list[float]]:
    """The same of caches without pages in 8 bits, sizes of which nothing was measured left out."""
    rows = [row for row in results["decode_fp8"]["entries"] if row.get("seqlen_q") == 1 and not row["page_size"]]
    shares = [(row["kv_bytes"], share) for row in rows if (share := targets.of_floor(row)) is not None]
    found = {name: [share for kv_bytes, share in shares if low <= kv_bytes < high] for name, low, high in SIZES}
    return {name: some for name, some in found.items() if some}


def of_floor_with_tile(results: Results, block_m: int) -> list[float]:
    """The same of problems with one query and 64 MB of keys and values or more whose plan had this query tile."""
    rows = [row for row in results["decode_seqlen1"]["entries"] if row.get("plan", {}).get("block_m") == block_m]
    return [share for row in rows if row["kv_bytes"] >= LARGE and (share := targets.of_floor(row)) is not None]


def bytes_a_second(results: Results) -> dict[str, float]:
    """TB/s of keys and values by the best plan of each tile: medians of the sweep's problems with one query and 64 MB and more."""
    large = [problem for problem in swept(results) if problem.seqlen_q == 1 and problem.kv_bytes >= LARGE]
    tiles = [tile for tile in ("1", "8s", "16", "16s", "64") if all(tile in problem.best for problem in large)]
    return {tile: median(problem.kv_bytes / problem.best[tile] * 1e-6 for problem in large) for tile in tiles}


def reread(results: Results) -> dict[int, float]:
    """A tile of one row over the fastest tile, by the query heads that read the same keys: medians over problems as above."""
    large = [problem for problem in swept(results) if problem.seqlen_q == 1 and problem.kv_bytes >= LARGE]
    groups = sorted({problem.rows for problem in large})
    return {group: median(slowdowns([problem for problem in large if problem.rows == group], "1")) for group in groups}


def widths(results: Results) -> set[int]:
    """The bytes a thread that copies of keys and values to shared memory move, over all query tiles."""
    return {int(width) for point in results["access_width"]["points"] for width in point["copies"]}


def of_floor_by_queries(results: Results) -> dict[int, list[float]]:
    """Problems with 64 MB of keys and values and more, by their queries a sequence: how much of our time the read floor takes."""
    found: dict[int, list[float]] = defaultdict(list)
    for row in results["decode_speculative"]["entries"]:
        share = targets.of_floor(row)
        if share is not None and row["kv_bytes"] >= LARGE:
            found[row["seqlen_q"]].append(share)
    return dict(sorted(found.items()))


def tiles_taken(results: Results) -> dict[tuple[int, int], Counter[int]]:
    """The query tiles that the planner took, by (queries, query heads that share a key head)."""
    taken: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for grid in ("decode_seqlen1", "decode_speculative"):
        for row in results[grid]["entries"]:
            if row.get("plan"):
                taken[row["seqlen_q"], row["num_heads_q"] // row["num_heads_kv"]][row["plan"]["block_m"]] += 1
    return dict(sorted(taken.items()))


def times_of(ratios: list[float]) -> str:
    """Median and greatest of some ratios."""
    return f"{median(ratios):.2f}x, at most {max(ratios):.2f}x" if ratios else "not timed"


def shares_of(shares: list[float]) -> str:
    """Median, least and greatest of some shares."""
    return f"{median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})" if shares else "not measured"
