"""The tables of what tests/gpu said: test file by test file for docs/performance.md, feature by feature for the README."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import markdown, sanitize_report

TESTS = Path(__file__).resolve().parents[1] / "tests" / "gpu"
NOT_YET = "Not measured yet.\n"
_MOST_REASONS = 4  # kinds of reasons that are listed for a test file


@dataclass(frozen=True)
class Feature:
    """One row of the README's table: which test files hold it on a GPU, and what runs it without one."""

    name: str
    files: tuple[str, ...]
    elsewhere: str


_TRITON, _CPU = "Triton's interpreter", "a CPU"
_COMPILED = "compiled for GPUs from sm_75 to sm_120 and for gfx942"
FEATURES = (
    Feature("decode", ("decode", "gluon_decode", "limits", "replay", "streams", "api"), f"{_COMPILED}; {_TRITON}; {_CPU}"),
    Feature("quantised caches", ("quantised_decode",), f"{_TRITON}; {_CPU}"),
    Feature("`append_kv`", ("append",), f"compiled for sm_75, sm_80, sm_90 and gfx942; {_TRITON}; {_CPU}"),
    Feature("forward", ("forward", "attention_api"), f"{_COMPILED}; {_TRITON}; {_CPU}"),
    Feature("backward, training", ("backward", "gradients", "training"), f"compiled for sm_75 to sm_100 and for gfx942; {_TRITON}; {_CPU}"),
    Feature("dropout", ("dropout",), f"compiled for sm_80 and sm_90; {_TRITON}; {_CPU}"),
    Feature("the functions of `flash_attn`", ("flash_attn",), _CPU),
    Feature("transformers, torch's own attention, `PagedKV`", ("integrations", "callers"), _CPU),
    Feature("several GPUs", ("distributed",), "2, 3 and 4 processes of a CPU"),
    Feature("`study`, `tune`", ("study",), "a CPU, where the study predicts"),
)


def file_of(name: str) -> str:
    return f"test_{name}_gpu.py"


def tables(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """``gpu-tests`` of docs/performance.md and ``ran`` of the README; ``results`` may have files called gpu_tests and sanitize."""
    tested = results.get("gpu_tests")
    return {"gpu-tests": _by_file(tested) if tested else NOT_YET, "ran": _by_feature(tested, results.get("sanitize"))}


def _by_file(data: dict[str, Any]) -> str:
    cells, skipped, failed = [], [], []
    for path in sorted(TESTS.glob("test_*.py")):
        tests = data["files"].get(path.name)
        counts = [str(tests[name]) for name in ("passed", "skipped", "failed")] + [tests["commit"]] if tests else ["not run", "-", "-", "-"]
        cells.append([f"`{path.name}`", _covers(path), *counts])
        if tests:
            skipped += [f"`{path.name}`: {line}" for line in _reasons(tests["skips"])]
            failed += [f"`{path.name}`: {name}: {why}" for name, why in tests["failures"].items()]
            failed += [f"`{path.name}`: {name}: passed in a later run" for name in tests["failed_before"]]
    header = ["test file", "what it tests", "passed", "skipped", "failed", "commit"]
    lists = (markdown.items("Failed", failed), markdown.items("Skipped", skipped))
    return "\n".join(part for part in (markdown.table(header, cells, "---"), *lists, markdown.provenance(data)) if part)


def _covers(path: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "-").splitlines()[0].rstrip(".")


def _reasons(skips: dict[str, int]) -> list[str]:
    """How many tests were skipped for which reason; reasons that differ in numbers alone are one, shown by an example."""
    kinds: dict[str, tuple[str, int]] = {}
    for why, count in skips.items():
        kind = re.sub(r"\d+", "0", why)
        example, others = kinds.get(kind, (why, 0))
        kinds[kind] = (example, others + count)
    most = sorted(kinds.values(), key=lambda kind: -kind[1])
    lines = [f"{count}, {why}" for why, count in most[:_MOST_REASONS]]
    if rest := most[_MOST_REASONS:]:
        lines.append(f"{sum(count for _, count in rest)}, for {len(rest)} other reasons")
    return lines


def _by_feature(data: dict[str, Any] | None, watched: dict[str, Any] | None) -> str:
    device = data["device"].removeprefix("NVIDIA ") if data else "GPU"
    cells = [[feature.name, _ran(feature, data["files"]) if data else "not counted yet", feature.elsewhere] for feature in FEATURES]
    cells.append(["compute-sanitizer", sanitize_report.cell(watched) if watched else "not run yet", "-"])
    return markdown.table(["", f"tests on one {device}", "elsewhere"], cells, "---")


def _ran(feature: Feature, files: dict[str, dict[str, Any]]) -> str:
    ran = [files[name] for part in feature.files if (name := file_of(part)) in files]
    absent = [f"`{name}` not run" for part in feature.files if (name := file_of(part)) not in files]
    if not ran:
        return "not run"
    counts = {name: sum(tests[name] for tests in ran) for name in ("passed", "skipped", "failed")}
    words = f"{counts['passed']} passed, {counts['skipped']} skipped, {counts['failed']} failed"
    if not counts["passed"] + counts["failed"]:
        words = f"not run: {counts['skipped']} skipped, {next(iter(ran[0]['skips']))}"
    return "; ".join([words, *absent]) + f" ({', '.join(dict.fromkeys(tests['commit'] for tests in ran))})"
