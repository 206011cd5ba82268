"""Variants of our kernels for compute-sanitizer, and how many launches it watched.

    python -m benchmarks.sanitize prepare --out OUT                                # unwatched: compiles, checks, counts launches
    compute-sanitizer --tool memcheck --log-file OUT/memcheck_1.log python -m benchmarks.sanitize watch memcheck --part 1/4 --out OUT
    python -m benchmarks.sanitize collect --out OUT                                # into OUT/sanitize.json

Each trial is one call, checked against the reference, so that what a tool watched is known to have run. The tools do not
say how many launches they inspected; ``prepare`` counts each trial's by kernel name (torch's profiler sees the driver's
launches), and ``collect`` adds up those of the trials that ran to their end under a tool. ``control`` is a kernel that
writes out of bounds: it shows that the tool and its filter by name see what they should. For racecheck it is one whose warps hand
numbers over by a barrier, rightly: it shows what the tool reports of such code.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Annotated, Any, Protocol

import torch
import typer

from benchmarks import sanitize_backward, sanitize_decode, sanitize_forward
from benchmarks.record import heading
from flashtile import UnsupportedError

OPERATIONS = {"decode": sanitize_decode.trials, "forward": sanitize_forward.trials, "backward": sanitize_backward.trials}
OURS = (*OPERATIONS, "combine")
_TRIED = 5
_ERRORS = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
_REPORT = re.compile(r"^=+ (?:Error: Race|Invalid|Misaligned|Out-of-range)(?:.*\n(?!=+ *$))*.*", re.MULTILINE)
_PLACE = re.compile(r"\bin (?:.*/)?(\w+\.py:\d+)")
_HOST = "Saved host backtrace"  # behind a report's accesses: who called the launch

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)
Out = Annotated[Path, typer.Option(help="Folder for counts and results.")]
On = Annotated[str, typer.Option(help="cuda, or cpu to try the script itself.")]


class Trial(Protocol):
    """One checked call: ``run`` raises where its result is wrong, and UnsupportedError where the planner refuses it."""

    @property
    def kernel(self) -> str: ...

    def run(self, device: str) -> None: ...


def trials(device: str, operation: str = "") -> list[Trial]:
    """Every trial of all operations, or of one, shuffled: wherever the time ends, some of every kernel, tile and case have had theirs.

    On a CPU, where the script itself is tried, every ``_TRIED``th.
    """
    found: list[Trial] = []
    for name, make in OPERATIONS.items():
        if operation in ("", name):
            found += make(device)[:: _TRIED if device == "cpu" else 1]
    names = Counter(map(str, found))
    if len(names) < len(found):  # outcomes are kept by name
        raise RuntimeError(f"trials of one name: {', '.join(name for name, count in names.items() if count > 1)}")
    Random(0).shuffle(found)
    return found


def attempt(trial: Trial, device: str) -> dict[str, Any]:
    """What became of a trial: ``ok``, ``refused`` or ``failed`` with the reason."""
    try:
        trial.run(device)
    except UnsupportedError as error:
        return {"refused": " ".join(str(error).split())[:300]}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
    return {"ok": True}


def launches(trial: Trial, device: str) -> dict[str, int]:
    """Our kernels that a trial launches, by name, as the driver reports them; without such reports one for the call."""
    if device == "cpu":
        return {trial.kernel: 1}
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        trial.run(device)
    names = Counter({event.key: event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA})
    return {name: count for name, count in names.items() if any(part in name for part in OURS)} or {f"{trial.kernel} calls": 1}


def examine(trial: Trial, device: str, end: float) -> dict[str, Any]:
    """A trial's outcome, with its launches where it ran; ``unprepared`` where it is past ``end`` (time.time())."""
    if time.time() > end:
        return {"unprepared": "no time was left"}
    outcome = attempt(trial, device)
    return outcome | {"launches": launches(trial, device)} if "ok" in outcome else outcome


@app.command()
def prepare(
    out: Out,
    device: On = "cuda",
    workers: Annotated[int, typer.Option(help="Processes that compile.")] = 15,
    operation: Annotated[str, typer.Option(help="decode, forward or backward alone.")] = "",
    budget: Annotated[float, typer.Option(help="Seconds after which no further trial begins.")] = 600.0,
) -> None:
    """Compiles and checks every trial unwatched, counts its launches, and writes OUT/trials.json."""
    every, began = trials(device, operation), time.monotonic()
    end = time.time() + budget
    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            outcomes = list(pool.map(examine, every, [device] * len(every), [end] * len(every)))
    else:
        outcomes = [examine(trial, device, end) for trial in every]
    found = dict(zip(map(str, every), outcomes))
    _write(out / "trials.json", found)
    counts = Counter(next(iter(outcome)) for outcome in outcomes)
    print(f"prepared {len(every)} trials in {time.monotonic() - began:.0f} s: {dict(counts)}", flush=True)
    _print_failures(found)


@app.command()
def watch(
    tool: Annotated[str, typer.Argument(help="The tool that this process runs under: memcheck or racecheck.")],
    out: Out,
    device: On = "cuda",
    part: Annotated[str, typer.Option(help="i/n: every n-th trial, from the i-th on.")] = "1/1",
    budget: Annotated[float, typer.Option(help="Seconds.")] = 120.0,
) -> None:
    """Runs its part of the trials that are known to run, and notes each that ended."""
    first, step = (int(number) for number in part.split("/"))
    known = json.loads((out / "trials.json").read_text())
    mine = [trial for trial in trials(device) if "ok" in known.get(str(trial), {})][first - 1 :: step]
    ended: dict[str, Any] = {}
    end = time.monotonic() + budget
    for trial in mine:
        if time.monotonic() > end:
            break
        ended[str(trial)] = attempt(trial, device)
        _write(out / f"watched_{tool}_{first}.json", {"of": len(mine), "ended": ended})
        if "CUDA" in ended[str(trial)].get("failed", ""):
            break
    print(f"sanitize: {tool} part {part}: {len(ended)} of {len(mine)} trials", flush=True)
    _print_failures(ended)


@app.command()
def control(tool: Annotated[str, typer.Argument(help="The tool that this process runs under: memcheck or racecheck.")]) -> None:
    """One launch of a kernel that the filter by name lets through: for memcheck a wrong one, for racecheck a right one."""
    from benchmarks.handed_over import hand_numbers_over
    from benchmarks.out_of_bounds import write_out_of_bounds

    {"memcheck": write_out_of_bounds, "racecheck": hand_numbers_over}[tool]()


@app.command()
def collect(
    out: Out, device: On = "cuda", commit: Annotated[str, typer.Option(help="The commit watched, where there is no git.")] = ""
) -> None:
    """Adds up what each tool found and what it watched; exits with 1 if one found anything or watched nothing, or missed the control."""
    known = json.loads((out / "trials.json").read_text())
    protocol = "compute-sanitizer over one checked call of each variant, filtered to our kernels"
    head = heading("sanitize", torch.device(device), commit, protocol, {})
    tools = {tool: _summary(tool, known, out) for tool in ("memcheck", "racecheck")}
    seen, of_right = (_findings(list(out.glob(f"control_{tool}.log"))) for tool in tools)
    failed = [f"{name}: {outcome['failed']}" for name, outcome in known.items() if "failed" in outcome]
    refused = {name: outcome["refused"] for name, outcome in known.items() if "refused" in outcome}
    unprepared = sum("unprepared" in outcome for outcome in known.values())
    data = {
        "schema": 1,
        **head,
        "tools": tools,
        "control_errors": seen,
        "control_races": of_right,
        "trials": len(known),
        "unprepared": unprepared,
        "failed": failed,
        "refused": refused,
    }
    _write(out / "sanitize.json", data)
    for tool, summary in tools.items():
        print(f"sanitize: {tool}: {summary['found']} found in {sum(summary['launches'].values())} launches {summary['launches']}"
              f" of {summary['ended']} trials (of {summary['trials']})", flush=True)  # fmt: skip
    print(f"sanitize: the control's out-of-bounds write was reported {seen} times, its right kernel for {of_right} races", flush=True)
    clean = all(summary["found"] == 0 and summary["launches"] and not summary["failed"] for summary in tools.values())
    if not (clean and seen and not failed):
        raise typer.Exit(1)


def _summary(tool: str, known: dict[str, Any], out: Path) -> dict[str, Any]:
    """Findings and launches of one tool over all parts; ``found`` is None where no part's log ends with a summary."""
    parts = [json.loads(path.read_text()) for path in sorted(out.glob(f"watched_{tool}_*.json"))]
    ended = {name: outcome for part in parts for name, outcome in part["ended"].items()}
    counts: Counter[str] = Counter()
    for name, outcome in ended.items():
        if "ok" in outcome:
            counts.update(known[name].get("launches", {}))
    logs = sorted(out.glob(f"{tool}_*.log"))
    return {
        "found": _findings(logs) if len(logs) == len(parts) else None,
        "kinds": _kinds(logs),
        "launches": dict(sorted(counts.items())),
        "ended": sum("ok" in outcome for outcome in ended.values()),
        "trials": sum("ok" in outcome for outcome in known.values()),
        "failed": [f"{name}: {outcome['failed']}" for name, outcome in ended.items() if "failed" in outcome],
    }


def _findings(logs: list[Path]) -> int | None:
    """Errors and hazards over all logs; None where one has no summary (the tool did not come to its end)."""
    found = 0
    for log in logs:
        summaries = _ERRORS.findall(log.read_text(errors="replace"))
        if not summaries:
            return None
        found += sum(int(errors or hazards) for errors, hazards in summaries)
    return found if logs else None


def _kinds(logs: list[Path]) -> dict[str, int]:
    """How many reports name which lines, most first: "file.py:line" of a race's every access, or of a wrong one."""
    kinds: Counter[str] = Counter()
    for log in logs:
        for report in _REPORT.findall(log.read_text(errors="replace")):
            kinds[", ".join(dict.fromkeys(_PLACE.findall(report.partition(_HOST)[0])))] += 1
    return dict(kinds.most_common())


def _print_failures(outcomes: dict[str, Any]) -> None:
    for name, outcome in outcomes.items():
        if "failed" in outcome:
            print(f"  {name}: {outcome['failed']}", flush=True)


def _write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    app()
