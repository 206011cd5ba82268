"""``flashtile replay``: a whole trace through continuous batching, with what attention took at each step."""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import flashtile
from flashtile.cli.device import RunDevice, device_name, pick_device
from flashtile.cli.output import AsJson, console, microseconds, print_json, progress, table
from flashtile.errors import UnsupportedError
from flashtile.planner.choose import plan_decode
from flashtile.planner.cost import predict_us
from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem
from flashtile.testing.serving import Engine, Heads, Step
from flashtile.testing.timing import Stopwatch
from flashtile.testing.traffic import Request, read_trace

FIXED = 64
FULL_HEADS = (32, 8)
CACHE_BYTES = {"cpu": 128 << 20, "cuda": 4 << 30}


@dataclass
class Tally:
    """What the steps so far came to; times in seconds."""

    kinds: Counter[str] = field(default_factory=Counter)
    tiles: Counter[tuple[int, bool]] = field(default_factory=Counter)
    splits: Counter[int] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    chosen: list[float] = field(default_factory=list)
    fixed: list[float] = field(default_factory=list)
    without_fixed: int = 0
    most_running: int = 0
    keys: int = 0
    queries: int = 0

    def count(self, step: Step, plan: DecodePlan, seconds: float) -> None:
        """``plan`` is the one whose tile and splits are of interest."""
        self.kinds[step.kind] += 1
        self.tiles[plan.block_m, plan.swapped] += 1
        self.splits[plan.num_splits] += 1
        self.seconds.setdefault(step.kind, []).append(seconds)
        self.most_running = max(self.most_running, len(step.seqlens_q))
        self.keys += step.num_keys
        self.queries += step.num_queries


def replay(
    trace: Annotated[Path, typer.Argument(help="A CSV file with the columns TIMESTAMP,ContextTokens,GeneratedTokens.")],
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Stop after so many engine steps.")] = None,
    budget: Annotated[float, typer.Option("--budget", min=0.1, help="Stop after so many seconds.")] = 60.0,
    step_ms: Annotated[float, typer.Option("--step-ms", min=0.01, help="Simulated time of a step: the whole model's.")] = 25.0,
    max_running: Annotated[int, typer.Option("--max-running", min=1, help="Sequences that run at once at most.")] = 64,
    chunk: Annotated[int, typer.Option("--chunk", min=1, help="Tokens of a step, of which prompts get what decoding leaves.")] = 512,
    page_size: Annotated[int, typer.Option("--page-size", min=1, help="Keys a page.")] = 16,
    sample: Annotated[int, typer.Option("--sample", min=1, help="Compare with the fixed tile at every so many steps.")] = 8,
    model_device: Annotated[str, typer.Option("--model-device", help="On a CPU: the GPU whose plans and predicted times count.")] = "h200",
    device: RunDevice = "auto",
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Draws pages and numbers.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Replay a trace through continuous batching: attention time a step, tiles and splits chosen, and what a fixed 64 costs."""
    where = pick_device(device)
    modelled = Device.named(model_device) if where.type == "cpu" else None
    requests = read_trace(trace)
    heads = Heads.for_device(where)
    num_pages = CACHE_BYTES[where.type] // (page_size * heads.bytes_per_key)
    engine = Engine(heads, where, num_pages=num_pages, page_size=page_size, max_running=max_running, chunk_tokens=chunk, seed=seed)
    stopwatch = Stopwatch(where)
    tally = Tally()
    start = time.perf_counter()
    with _bar(steps, budget) as advance:
        for index, (step, _clock) in enumerate(_steps(engine, requests, step_ms / 1e3)):
            if modelled is None:
                _run_on_gpu(step, where, stopwatch, tally, compare=index % sample == 0)
            else:
                _run_on_cpu(step, stopwatch, tally, modelled)
            spent = time.perf_counter() - start
            advance(index + 1, spent)
            if spent > budget or (steps is not None and index + 1 >= steps):
                break
    document = _document(tally, engine, len(requests), modelled, stopwatch, time.perf_counter() - start)
    if as_json:
        print_json(document)
    else:
        _render(document)


def _steps(engine: Engine, requests: list[Request], step_seconds: float) -> Iterator[tuple[Step, float]]:
    """The engine's steps with the simulated time at which each starts; the clock skips stretches without work."""
    coming = deque(requests)
    clock = 0.0
    while True:
        while coming and coming[0].arrival <= clock:
            engine.submit(coming.popleft())
        step = engine.step()
        if step is not None:
            yield step, clock
            clock += step_seconds
        elif coming:
            clock = max(clock, coming[0].arrival)
        elif not engine.waiting:
            return


def _run_on_gpu(step: Step, device: torch.device, stopwatch: Stopwatch, tally: Tally, compare: bool) -> None:
    plan = plan_decode(Problem.decode(**step.call), Device.of(device))
    flashtile.decode(**step.call)  # a plan met for the first time is compiled here
    if not compare:
        tally.count(step, plan, stopwatch.once(lambda: flashtile.decode(**step.call)))
        return
    try:
        flashtile.decode(**step.call, block_m=FIXED)
    except UnsupportedError:
        tally.without_fixed += 1
        tally.count(step, plan, stopwatch.once(lambda: flashtile.decode(**step.call)))
        return
    calls = [lambda: flashtile.decode(**step.call), lambda: flashtile.decode(**step.call, block_m=FIXED)]
    chosen, fixed = stopwatch.in_turn(calls, repeats=5)
    tally.chosen.append(chosen)
    tally.fixed.append(fixed)
    tally.count(step, plan, chosen)


def _run_on_cpu(step: Step, stopwatch: Stopwatch, tally: Tally, modelled: Device) -> None:
    """Measures the CPU engine on the scaled heads; plans the same step with all heads for a GPU that is not here."""
    problem = Problem.decode(**step.call).with_(num_heads_q=FULL_HEADS[0], num_heads_kv=FULL_HEADS[1])
    plan = plan_decode(problem, modelled)
    tally.count(step, plan, stopwatch.once(lambda: flashtile.decode(**step.call)))
    try:
        fixed = plan_decode(problem, modelled, block_m=FIXED)
    except UnsupportedError:
        tally.without_fixed += 1
        return
    tally.chosen.append(predict_us(problem, plan, modelled).total_us * 1e-6)
    tally.fixed.append(predict_us(problem, fixed, modelled).total_us * 1e-6)


@contextmanager
def _bar(steps: int | None, budget: float) -> Iterator[Callable[[int, float], None]]:
    """A progress bar over steps, or over seconds where no number of steps was asked for."""
    with progress() as bar:
        task = bar.add_task("replay", total=steps if steps is not None else round(budget))

        def advance(done: int, spent: float) -> None:
            bar.update(task, completed=done if steps is not None else min(round(spent), round(budget)), description=f"replay: step {done}")

        yield advance


def _document(
    tally: Tally, engine: Engine, num_requests: int, modelled: Device | None, stopwatch: Stopwatch, wall: float
) -> dict[str, Any]:
    device = engine.device
    full = f"{FULL_HEADS[0]}/{FULL_HEADS[1]} heads"
    if modelled is None:
        basis = f"measured on a sample of these steps: {stopwatch.protocol}"
    else:
        basis = f"predicted, not measured: the planner's model of {modelled.name} for these steps with {full} (a CPU has no physical tile)"
    return {
        "device": device_name(device),
        "heads": str(engine.heads),
        "protocol": f"{stopwatch.clock}, each step once",
        "requests": {
            "in_trace": num_requests,
            "finished": engine.num_finished,
            "running": len(engine.running),
            "refused": engine.num_refused,
        },
        "steps": sum(tally.kinds.values()),
        "queries": tally.queries,
        "keys": tally.keys,
        "most_running": tally.most_running,
        "attention": {kind: _times(times) for kind, times in tally.seconds.items()},
        "planned_for": device_name(device) if modelled is None else f"{modelled.name}, {full}",
        "tiles": [{"block_m": m, "swapped": swapped, "steps": n} for (m, swapped), n in sorted(tally.tiles.items())],
        "splits": [{"num_splits": count, "steps": n} for count, n in sorted(tally.splits.items())],
        "fixed_tile": {
            "block_m": FIXED,
            "basis": basis,
            "steps_compared": len(tally.fixed),
            "steps_it_cannot_run": tally.without_fixed,
            "chosen_seconds": sum(tally.chosen),
            "fixed_seconds": sum(tally.fixed),
            "ratio": sum(tally.fixed) / sum(tally.chosen) if tally.chosen else None,
        },
        "seconds": wall,
    }


def _times(times: list[float]) -> dict[str, float | int]:
    ordered = sorted(times)
    return {
        "steps": len(times),
        "median_seconds": statistics.median(ordered),
        "p99_seconds": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "total_seconds": sum(ordered),
    }


def _render(document: dict[str, Any]) -> None:
    requests, fixed = document["requests"], document["fixed_tile"]
    console.print(
        f"{document['heads']} on {document['device']}: {document['steps']} steps in {document['seconds']:.1f} s; "
        f"of {requests['in_trace']} requests {requests['finished']} ended, {requests['running']} run, "
        f"{requests['refused']} were larger than the cache; at most {document['most_running']} in a step.",
        highlight=False,
    )
    attention = table("Attention a step", "kind", "steps", "median", "99th percentile", "in all")
    for kind, times in document["attention"].items():
        seconds = [microseconds(times[name]) for name in ("median_seconds", "p99_seconds", "total_seconds")]
        attention.add_row(kind, str(times["steps"]), *seconds)
    console.print(attention)
    chosen = table(f"Chosen for {document['planned_for']}", "what", "steps", "share")
    for tile in document["tiles"]:
        name = f"tile {tile['block_m']}{' (operands swapped)' if tile['swapped'] else ''}"
        chosen.add_row(name, str(tile["steps"]), f"{tile['steps'] / document['steps']:.0%}")
    for group, count in _grouped(document["splits"]).items():
        chosen.add_row(group, str(count), f"{count / document['steps']:.0%}")
    console.print(chosen)
    console.print(f"Times: {document['protocol']}.", highlight=False)
    if fixed["ratio"] is not None:
        console.print(
            f"A fixed tile of {FIXED} on {fixed['steps_compared']} of these steps: {microseconds(fixed['fixed_seconds'])} instead of "
            f"{microseconds(fixed['chosen_seconds'])}, [bold]{fixed['ratio']:.3f}x[/bold]; {fixed['basis']}.",
            highlight=False,
        )
    if fixed["steps_it_cannot_run"]:
        console.print(f"A fixed tile of {FIXED} cannot run {fixed['steps_it_cannot_run']} steps.")


def _grouped(splits: list[dict[str, int]]) -> dict[str, int]:
    """Splits in doubling ranges: a trace meets too many numbers to list."""
    groups: Counter[str] = Counter()
    for row in splits:
        low = 1 << (row["num_splits"].bit_length() - 1)
        groups["1 split" if low == 1 else f"{low} to {2 * low - 1} splits"] += row["steps"]
    return dict(groups)
