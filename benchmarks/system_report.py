"""Tables of whole systems: models of transformers that generate, and attention over several GPUs."""

from __future__ import annotations

from typing import Any

from benchmarks import markdown

NOT_YET = "Not measured yet.\n"
TABLES = {"transformers": "transformers_generate", "distributed": "distributed"}
"""Each table's result file."""


def tables(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Markdown of each table; ``results`` has the files by the tables' names."""
    makers = {"transformers": _transformers, "distributed": _distributed}
    return {name: make(results[name]) if name in results else NOT_YET for name, make in makers.items()}


def _transformers(data: dict[str, Any]) -> str:
    """Milliseconds of a prompt and of a token by either attention."""
    contestants = ("flashtile", "sdpa")
    header = ["cache, prompts", *(f"{what} {name}" for what in ("prompt ms,", "token ms,") for name in contestants), "same tokens at first"]
    cells = []
    for entry in data["entries"]:
        results = entry.get("results", {})
        found = [results.get(name, {}).get(key) for key in ("prefill_ms", "token_ms") for name in contestants]
        same = results.get("flashtile", {}).get("same_tokens")
        cells.append([entry["name"], *("-" if value is None else f"{value:.2f}" for value in found), "-" if same is None else str(same)])
    return f"{markdown.table(header, cells)}\n{_failed(data)}{markdown.provenance(data)}"


def _distributed(data: dict[str, Any]) -> str:
    """Microseconds alone and together, and the speed-up with what is asked of two."""
    header = ["problem", "us alone", f"us on {data['num_ranks']}", "speed-up", "asked of 2", "the paper model"]
    cells = []
    for entry in data["entries"]:
        if "speedup" in entry:
            alone, together = (f"{entry[key]:.1f}" for key in ("alone_us", "together_us"))
            speedups = [markdown.times(entry[key]) for key in ("speedup", "target", "paper_speedup")]
            missed = entry["speedup"] < entry["target"] and data["num_ranks"] == 2
            cells.append([entry["name"], alone, together, f"**{speedups[0]}**" if missed else speedups[0], *speedups[1:]])
    known = {"date": "(date not kept)", "driver": ""} | data
    known["device"] = f"{data['num_ranks']} x {data['device']}, {data['backend']}"
    return f"{markdown.table(header, cells)}\n{_failed(data)}{markdown.provenance(known)}"


def _failed(data: dict[str, Any]) -> str:
    found = markdown.items("Failures", [f"{entry['name']}: {entry['failed']}" for entry in data["entries"] if "failed" in entry])
    return f"{found}\n" if found else ""
