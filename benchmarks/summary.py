"""The README's tables: ``python -m benchmarks.summary [--check]``.

``summary`` has speeds, a few lines out of the tables of targets; ``ran`` has what ran where.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import gpu_tests_report, markdown, report

HERE = Path(__file__).parent
# what the README calls it, and what the table of targets does
LINES: dict[str, dict[str, str]] = {
    "targets": {
        "decode, one query a sequence: the best of FA2, FA3, FlashInfer and cuDNN": "one query, the best peer of each problem",
        "decode, 8 and 16 queries: FA3": "8 and 16 queries, FA3",
        "decode, unlike lengths: an even batch of the same bytes": "ragged batches, contiguous, an even batch of the same bytes",
        "decode, 512 MB and more: a kernel that merely reads the bytes": "512 MB and more of keys and values, the read floor",
        "decode, float8 keys and values, 268 MB: the same in bfloat16": "float8, 32x4096 and 1x131072, the cache in bfloat16",
        "decode after append and rotary embeddings, 1x4096: decode alone": "1x4096 32/8 after append and rotary, decode alone",
    },
    "forward-targets": {
        "forward, head dim 128: the fastest of cuDNN, FA3 and FA4": "head dim 128, full and causal, the fastest of cuDNN, FA3 and FA4",
        "forward, head dim 64: the same": "head dim 64, full and causal, the fastest of cuDNN, FA3 and FA4",
        "forward, head dim 256: the same": "head dim 256, full and causal, the fastest of cuDNN, FA3 and FA4",
        "forward, head dims 96, 192 and 192/128: the same": "head dims 96, 192 and 192/128, the fastest of cuDNN, FA3 and FA4",
        "forward, 64 packed sequences of unlike lengths: FA3": "64 sequences of log-uniform lengths, causal, FA3",
    },
    "backward-targets": {
        "backward, head dims 128 and 64: cuDNN": "head dims 128 and 64, full and causal, cuDNN",
        "backward, the same: the faster of cuDNN and FA4": "head dims 128 and 64, full and causal, the faster of cuDNN and FA4",
        "backward, the same bits each time: cuDNN as it is": "the same bits each time, head dims 128 and 64, cuDNN",
        "backward by the portable kernel, head dim 128: torch's FA2": "the portable kernel, head dim 128, FA2 (torch)",
    },
}


def tables(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The README's tables; raises StaleReport where a target has another name by now."""
    made = report.tables(results)
    cells = []
    for table, lines in LINES.items():
        rows = {row[0]: row for row in map(_cells, made[table].splitlines())}
        for name, target in lines.items():
            if target not in rows:
                raise report.StaleReport(f"{table} has no line called {target!r}")
            cells.append([name, rows[target][2], rows[target][4]])
    speeds = markdown.table(["what: against whom", "speed over theirs", "commit"], cells, "---")
    return {"summary": speeds, "ran": gpu_tests_report.tables(results)["ran"]}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else [""]


def main(
    results: Annotated[Path, typer.Option(help="Folder of the result files.")] = HERE / "results",
    docs: Annotated[Path, typer.Option(help="The document with the markers.")] = HERE.parent / "README.md",
    check: Annotated[bool, typer.Option(help="Write nothing; exit with 1 if the document is stale.")] = False,
) -> None:
    """Fills the README's tables from the results."""
    report.refresh(docs, tables(report.load(results)), check, "python -m benchmarks.summary")


if __name__ == "__main__":
    typer.run(main)
