"""What tests/gpu said on a GPU, out of pytest's reports: ``python -m benchmarks.gpu_tests one.xml two.xml --commit C``.

Writes gpu_tests.json, of which the README and docs/performance.md have tables. The runs of one call are of one commit: where a test ran
in several, the last run counts that did not skip it (one machine has two GPUs, another has one). A test file of which nothing ran keeps
what an earlier call wrote of it, with its own commit.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import torch
import typer

from benchmarks.record import heading

ROOT = Path(__file__).resolve().parents[1]
FILE = "gpu_tests.json"
PROTOCOL = "pytest tests/gpu; of a test that ran several times the last time counts"
_WORST_FIRST = ("failed", "skipped", "passed")
_LONGEST = 200  # characters of a reason


@dataclass
class Tests:
    """A test file's tests by name, each with (outcome, why); ``again`` are those that failed in a run and not in a later one."""

    found: dict[str, tuple[str, str]] = field(default_factory=dict)
    again: set[str] = field(default_factory=set)

    def take(self, later: dict[str, tuple[str, str]]) -> None:
        """What a later run says; a test that it skipped stays what it was."""
        for name, (outcome, why) in later.items():
            before, _ = self.found.get(name, ("skipped", ""))
            if outcome == "skipped" and before != "skipped":
                continue
            if outcome == "passed" and before == "failed":
                self.again.add(name)
            self.found[name] = (outcome, why)

    def to_json(self) -> dict[str, Any]:
        counts = Counter(outcome for outcome, _ in self.found.values())
        skips = Counter(why for outcome, why in self.found.values() if outcome == "skipped")
        failures = {name: why for name, (outcome, why) in self.found.items() if outcome == "failed"}
        return {name: counts[name] for name in reversed(_WORST_FIRST)} | {
            "skips": dict(skips.most_common()), "failures": failures, "failed_before": sorted(self.again)}  # fmt: skip


def read(report: Path) -> dict[str, dict[str, tuple[str, str]]]:
    """The tests of one report of pytest's (junit xml), by test file; a module that was skipped or did not load is one test."""
    files: dict[str, dict[str, tuple[str, str]]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        where = [part for part in f"{case.get('classname', '')}.{case.get('name', '')}".split("[")[0].split(".") if part]
        module = next((part for part in where if (ROOT / "tests" / "gpu" / f"{part}.py").exists()), None)
        if module is None:
            raise typer.BadParameter(f"{report}: {'.'.join(where)} is no test of tests/gpu")
        name = case.get("name", "")
        tests = files.setdefault(f"{module}.py", {})
        found = (_outcome(case), tests.get(name, ("passed", "")))  # a test whose teardown fails comes twice
        tests[name] = min(found, key=lambda outcome: _WORST_FIRST.index(outcome[0]))
    return files


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for tag, outcome in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        element = case.find(tag)
        if element is not None:
            why = " ".join((element.get("message") or element.text or "no reason given").split())
            return outcome, why[:_LONGEST]
    return "passed", ""


def merged(reports: list[Path]) -> dict[str, dict[str, Any]]:
    """Each test file of the reports, in order: the last outcome of every test."""
    files: dict[str, Tests] = {}
    for report in reports:
        for file, tests in read(report).items():
            files.setdefault(file, Tests()).take(tests)
    return {file: tests.to_json() for file, tests in sorted(files.items())}


def _ran(counts: dict[str, Any]) -> bool:
    return bool(counts["passed"] + counts["failed"])


def _dates(reports: list[Path]) -> Iterator[str]:
    for report in reports:
        for suite in ElementTree.parse(report).iter("testsuite"):
            if moment := re.match(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)", suite.get("timestamp", "")):
                yield f"{moment[1]} {moment[2]}"


def main(
    reports: Annotated[list[Path], typer.Argument(help="Files that pytest --junitxml wrote, the first run first.")],
    commit: Annotated[str, typer.Option(help="The commit that was tested.")],
    out: Annotated[Path, typer.Option(help="Folder of gpu_tests.json, which is written or brought up to date.")] = ROOT
    / "benchmarks"
    / "results",
    like: Annotated[
        Path | None, typer.Option(help="A result file of the same machine and versions; needed where this machine is not the one.")
    ] = None,
) -> None:
    """Counts what passed, was skipped and failed, test file by test file."""
    if like is not None:
        measured = json.loads(like.read_text(encoding="utf-8"))
        head = {key: measured[key] for key in ("device", "driver", "versions")}
    elif torch.cuda.is_available():
        here = heading("gpu_tests", torch.device("cuda"), commit, PROTOCOL, {})
        head = {key: here[key] for key in ("device", "driver", "versions")}
    else:
        raise typer.BadParameter("there is no GPU here: name a result file of the machine that ran the tests", param_hint="--like")
    path = out / FILE
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"device": head["device"], "files": {}}
    if before["device"] != head["device"]:
        raise typer.BadParameter(f"{path} is of {before['device']}, and these tests ran on {head['device']}", param_hint="--out")
    dated = {"commit": commit, "date": max(_dates(reports), default="unknown")}
    files = before["files"] | {
        file: dated | counts for file, counts in merged(reports).items() if _ran(counts) or file not in before["files"]
    }
    document = {"schema": 1, "grid": "gpu_tests", **dated, **head, "protocol": PROTOCOL, "files": dict(sorted(files.items()))}
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for file, tests in document["files"].items():
        print(f"{file:34} {tests['passed']:5} passed {tests['skipped']:4} skipped {tests['failed']:4} failed   {tests['commit']}")
    print(f"{path} written")


if __name__ == "__main__":
    typer.run(main)
