"""The tables of docs/tiles.md, one or more a claim."""

from __future__ import annotations

from collections import Counter
from statistics import median

from benchmarks import claim_facts as facts
from benchmarks import markdown, targets
from benchmarks.claim_facts import Results

TILES = ("1", "8s", "16", "16s", "32", "64", "128")


def tables(results: Results) -> dict[str, str]:
    """Markdown of each table by the name in its marker."""
    return {
        "tiles-taken": _taken(results),
        "tile-times": _times(results),
        "instructions": _instructions(results),
        "warps": _warps(results),
        "access": _access(results),
        "widths": _widths(results),
        "floors": _floors(results),
        "ragged-tiles": _ragged(results),
        "compiled": _compiled(results),
        "sweep-source": f"{markdown.provenance(results['decode_sweep'])}",
        "matrix-source": f"Compiled by Triton {results['compile_matrix']['triton']}, {len(facts.compiled(results))} points.\n",
    }


def _taken(results: Results) -> str:
    cells = []
    for (queries, group), counts in facts.tiles_taken(results).items():
        rows = queries * group
        tiles = ", ".join(f"{tile} ({count})" for tile, count in sorted(counts.items()))
        wasted = sorted({-rows % tile for tile in counts})
        cells.append([str(queries), str(group), str(rows), tiles, ", ".join(map(str, wasted)), str(-rows % 64)])
    header = ["queries", "query heads a key head", "rows", "tiles taken (problems)", "rows wasted", "wasted by 64"]
    return markdown.table(header, cells)


def _times(results: Results) -> str:
    cells = []
    for name, problems in facts.regimes(facts.swept(results)).items():
        shown = [facts.slowdowns(problems, tile) for tile in TILES]
        cells.append([name, str(len(problems)), *(f"{median(some):.2f} ({max(some):.2f})" if some else "-" for some in shown)])
    return markdown.table(["", "problems", *TILES], cells)


def _instructions(results: Results) -> str:
    cells = []
    for label, arch in ((label, arch) for label in (*TILES, "8 (Hopper's)", "16 (Hopper's)") for arch in ("sm_80", "sm_90")):
        plans = [p for p in facts.compiled(results) if (p["label"], p["arch"]) == (label, arch) and not p["reason"]]
        counts = Counter(plan["mma"] or "none" for plan in plans)
        if plans:
            cells.append([label, arch, ", ".join(f"{name} ({count})" for name, count in counts.most_common())])
    return markdown.table(["tile", "architecture", "matrix instruction (plans)"], cells, "---")


def _warps(results: Results) -> str:
    timed = {block_m: facts.by_warps(results, block_m) for block_m in (16, 64)}
    cells = []
    for label in (*TILES, *(f"{tile} (Hopper's)" for tile in (8, 16, 64, 128))):
        plans = [p for p in facts.compiled(results) if p["label"] == label and p["arch"] == "sm_90" and p["warps_per_cta"]]
        if not plans:
            continue
        arranged = Counter(" x ".join(map(str, plan["warps_per_cta"])) for plan in plans)
        rows = sorted({rows for plan in plans if (rows := facts.rows_a_warp(plan)) is not None})
        times = timed.get(int(label)) if label.isdigit() else None
        shown = "; ".join(f"{warps}: {facts.times_of(some)}" for warps, some in times.items()) if times else "not timed"
        cells.append([label, ", ".join(f"{way} ({n})" for way, n in arranged.most_common()), ", ".join(map(str, rows)), shown])
    return markdown.table(
        ["tile", "warps over rows x keys, or keys x rows (plans)", "rows a warp", "time by warps / the tile's best"], cells
    )


def _access(results: Results) -> str:
    rates = facts.bytes_a_second(results)
    cells = [[tile, f"{rate:.2f}"] for tile, rate in rates.items()]
    again = [[f"1, {group} query heads a key head", f"{ratio:.2f}x"] for group, ratio in facts.reread(results).items()]
    first = markdown.table(["tile", "TB/s of keys and values (median)"], cells)
    return first + "\n" + markdown.table(["tile", "time / the fastest tile's (median)"], again)


def _widths(results: Results) -> str:
    data = results["access_width"]
    cells = []
    for point in data["points"]:
        kinds = [
            ", ".join(f"{n} of {width}" for width, n in sorted(point[kind].items(), key=lambda item: int(item[0])))
            for kind in ("copies", "loads")
        ]
        cells.append([point["tile"], point["arch"], " x ".join(map(str, point["plan"])), *(words or "-" for words in kinds)])
    header = ["tile", "architecture", "keys x warps x stages", "copies to shared memory (bytes a thread)", "loads into registers"]
    table = markdown.table(header, cells, "---")
    return f"{table}\nTriton {data['versions']['triton']}, commit {data['commit']}. {markdown.sentence(data['protocol'])}\n"


def _floors(results: Results) -> str:
    one = [["1", name, str(len(some)), facts.shares_of(some)] for name, some in facts.of_floor(results).items()]
    more = [[str(n), "64 MB and more", str(len(some)), facts.shares_of(some)] for n, some in facts.of_floor_by_queries(results).items()]
    bytewise = [["1, in 8 bits", name, str(len(some)), facts.shares_of(some)] for name, some in facts.of_floor_quantised(results).items()]
    source = {results[name]["commit"] for name in ("decode_seqlen1", "decode_floor", "decode_speculative")}
    table = markdown.table(["queries", "keys and values", "problems", "the read floor's share of our time"], one + more + bytewise)
    commits = f"commit {', '.join(sorted(source))}, 8 bits {results['decode_fp8']['commit']}"
    return f"{table}\nOn {results['decode_floor']['device']}, {commits}.\n"


def _ragged(results: Results) -> str:
    data = results["decode_ragged"]
    cells = []
    for row in data["entries"]:
        speed = targets.beside_ratio(row)
        if row.get("plan") and speed is not None:
            cells.append([row["name"], str(row["plan"]["block_m"]), str(row["plan"]["num_programs"]), markdown.times(speed)])
    table = markdown.table(["batch", "query tile", "programs that share all keys", "speed / an even batch's"], cells)
    return f"{table}\nOn {data['device']}, commit {data['commit']}.\n"


def _compiled(results: Results) -> str:
    points = facts.compiled(results)
    archs = sorted({point["arch"] for point in points}, key=lambda arch: (arch.startswith("g"), len(arch), arch))
    labels = [*TILES, *sorted({p["label"] for p in points} - set(TILES), key=lambda label: int(label.split()[0]))]
    cells = []
    for label in labels:
        row = [label]
        for arch in archs:
            some = [point for point in points if (point["label"], point["arch"]) == (label, arch)]
            plans = [point for point in some if not point["reason"]]
            row.append(f"{len(plans)} of {len(some)}" if some else "-")
        every = [point for point in points if point["label"] == label and not point["reason"]]
        registers = f"{min(p['registers'] for p in every)} to {max(p['registers'] for p in every)}"
        cells.append([*row, registers, str(sum(bool(p["spilled_bytes"]) for p in every))])
    return markdown.table(["tile", *archs, "registers", "spill"], cells)
