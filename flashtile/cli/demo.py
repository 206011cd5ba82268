"""``flashtile demo``: attention as a serving engine sees it, each step checked and timed against torch SDPA."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer

import flashtile
from flashtile import reference
from flashtile.cli.device import RunDevice, device_name, pick_device
from flashtile.cli.output import AsJson, console, microseconds, plan_words, print_json, progress, table
from flashtile.planner.choose import plan_decode
from flashtile.planner.decode_explain import explain_decode
from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem
from flashtile.testing.sdpa import gather_call, gather_step
from flashtile.testing.serving import Engine, Heads, Step
from flashtile.testing.timing import Stopwatch
from flashtile.testing.tolerance import assert_close, relative_l2
from flashtile.testing.traffic import Request, conversation_quantiles

DRAFT_TOKENS = 3
PAGE_SIZE = 16
ARRIVALS = 2
STEPS_BEFORE = 2  # before new prompts arrive


@dataclass(frozen=True)
class Outcome:
    """One step: what was asked, how it was planned, how far the result is from exact, and what it took (seconds)."""

    step: Step
    problem: Problem
    plan: DecodePlan
    error: float
    failure: str | None
    ours: float
    sdpa: float
    gather: float

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.step.kind,
            "seqlens_q": list(self.step.seqlens_q),
            "seqlens_k": list(self.step.seqlens_k),
            "plan": json.loads(self.plan.to_json()),
            "error": self.error,
            "failure": self.failure,
            "seconds": {"flashtile": self.ours, "sdpa": self.sdpa, "gather_for_sdpa": self.gather},
        }


def demo(
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Running sequences. Default: 8 on a CPU, 64 on a GPU.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Engine steps after new prompts have been read.")] = 5,
    longest: Annotated[int, typer.Option("--longest", min=1, help="Cut drawn prompts and answers to so many tokens.")] = 1 << 20,
    device: RunDevice = "auto",
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Draws lengths, pages and numbers.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Run a serving engine's attention over a paged cache: check every step, time it against torch SDPA, explain its plan."""
    start = time.perf_counter()
    where = pick_device(device)
    heads = Heads.for_device(where)
    traffic = conversation_quantiles()
    num_requests = (batch or (8 if where.type == "cpu" else 64)) + ARRIVALS
    requests = [request.cut(longest) for request in traffic.draw(num_requests, seed)]
    engine, arrivals = _fill_engine(heads, where, requests, seed)
    batch_text = f"{len(engine.running)} sequences in {engine.cache.num_pages - engine.cache.num_free} pages of {PAGE_SIZE} keys"
    stopwatch = Stopwatch(where)
    outcomes = _run(engine, arrivals, steps, where, stopwatch)
    failed = [outcome for outcome in outcomes if outcome.failure]
    speedup = statistics.geometric_mean(outcome.sdpa / outcome.ours for outcome in outcomes)
    document = {
        "device": device_name(where),
        "heads": str(heads),
        "batch": batch_text,
        "lengths": {"source": traffic.source, "citation": traffic.citation},
        "protocol": stopwatch.protocol,
        "sdpa": "the call alone (enable_gqa, boolean mask), on keys and values gathered and padded beforehand; the gather is timed apart",
        "steps": [outcome.to_json() for outcome in outcomes],
        "speedup_over_sdpa": speedup,
        "passed": not failed,
        "seconds": time.perf_counter() - start,
    }
    if as_json:
        print_json(document)
    else:
        _render(document, outcomes, where)
    if failed:
        raise typer.Exit(1)


def _fill_engine(heads: Heads, device: torch.device, requests: list[Request], seed: int) -> tuple[Engine, list[Request]]:
    """An engine in the middle of its work: sequences somewhere in their answers, and the next requests to arrive."""
    generator = torch.Generator().manual_seed(seed)
    # Twice the pages needed: what lies between them was never written and holds NaN.
    num_pages = 2 * sum(-(-(r.context_tokens + r.generated_tokens + DRAFT_TOKENS) // PAGE_SIZE) for r in requests)
    engine = Engine(
        heads,
        device,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        max_running=len(requests),
        chunk_tokens=512,
        max_draft_tokens=DRAFT_TOKENS,
        seed=seed,
    )
    for index, request in enumerate(requests[:-ARRIVALS]):
        progress_in_answer = 1.0 if index == 0 else float(torch.rand((), generator=generator))
        # The first is about to end, so that its pages are freed and used again.
        answered = max(0, int(progress_in_answer * request.generated_tokens) - 3)
        engine.place(request, request.context_tokens + answered)
    return engine, requests[-ARRIVALS:]


def _run(engine: Engine, arrivals: list[Request], steps_after: int, device: torch.device, stopwatch: Stopwatch) -> list[Outcome]:
    outcomes: list[Outcome] = []
    with progress() as bar:
        task = bar.add_task("demo", total=None)
        for step in _steps(engine, arrivals, steps_after):
            bar.update(task, description=f"step {len(outcomes) + 1}: {step.kind}, {len(step.seqlens_q)} sequences, {step.num_keys} keys")
            outcomes.append(_run_step(step, device, stopwatch))
            bar.advance(task)
    return outcomes


def _steps(engine: Engine, arrivals: list[Request], steps_after: int) -> Iterator[Step]:
    """Plain decode steps; prompts arrive and are read in chunks; then ``steps_after`` more, the middle one speculative."""
    for _ in range(STEPS_BEFORE):
        step = engine.step()
        if step is not None:
            yield step
    for request in arrivals:
        engine.submit(request)
    while engine.waiting or any(sequence.prompt_left for sequence in engine.running):
        step = engine.step()
        if step is not None:
            yield step
    for index in range(steps_after):
        draft_tokens = DRAFT_TOKENS if index == steps_after // 2 else 0
        step = engine.step(draft_tokens)
        if step is None:
            return
        yield step
        if draft_tokens:
            engine.reject_drafts(draft_tokens)


def _run_step(step: Step, device: torch.device, stopwatch: Stopwatch) -> Outcome:
    problem = Problem.decode(**step.call)
    out, lse = flashtile.decode_with_lse(**step.call)
    expected, expected_lse = reference.decode(**step.call)
    failure = None
    try:
        assert_close(out, lse, expected, expected_lse, cpu_engine=device.type == "cpu")
    except AssertionError as difference:
        failure = str(difference)
    dense = gather_step(step)
    sdpa_error = relative_l2(dense.out().view_as(expected), expected)
    if sdpa_error > 2e-2:  # a comparison with a wrong answer would be worth nothing
        failure = failure or f"SDPA's own result is off by {sdpa_error:.2g}: nothing to compare with"
    flashtile.decode(**step.call)
    ours, sdpa, gather = stopwatch.in_turn([lambda: flashtile.decode(**step.call), dense.run, gather_call(step)], repeats=15)
    plan = plan_decode(problem, Device.of(device))
    return Outcome(step, problem, plan, relative_l2(out, expected), failure, ours, sdpa, gather)


def _elsewhere(problem: Problem) -> str:
    """What the planner would do with the same step at full size on a GPU: the tile matters more there."""
    full = problem.with_(num_heads_q=32, num_heads_kv=8)
    explanation = explain_decode(full, Device.named("h200"))
    plan = explanation.plan
    return (
        f"On an H200, with 32/8 heads, the same step would get tile {plan.block_m}{' with operands swapped' if plan.swapped else ''}, "
        f"{plan.block_n} keys a step and {explanation.schedule} "
        f"(predicted: {explanation.predicted_us:.1f} us)."
    )


def _render(document: dict[str, Any], outcomes: list[Outcome], device: torch.device) -> None:
    console.print(f"[bold]{document['heads']}[/bold] on {document['device']}; at the start {document['batch']}.", highlight=False)
    console.print(f"[dim]Lengths follow the {document['lengths']['source']}; {document['lengths']['citation']}.[/dim]", highlight=False)
    numbers = ("sequences", "queries", "keys", "tile", "splits", "error", "ours", "SDPA", "SDPA / ours")
    steps = table("Each attention step", "step", "kind", *numbers, left=2)
    for index, outcome in enumerate(outcomes):
        steps.add_row(
            str(index + 1), outcome.step.kind, str(len(outcome.step.seqlens_q)), str(outcome.step.num_queries), str(outcome.step.num_keys),
            str(outcome.plan.block_m), str(outcome.plan.num_splits), "[red]WRONG[/red]" if outcome.failure else f"{outcome.error:.1e}",
            microseconds(outcome.ours), microseconds(outcome.sdpa), f"{outcome.sdpa / outcome.ours:.2f}",
        )  # fmt: skip
    console.print(steps)
    console.print(f"Times: {document['protocol']}. SDPA: {document['sdpa']}. Error: relative L2 against float64.", highlight=False)
    gather = statistics.median(outcome.gather for outcome in outcomes)
    console.print(f"That gather would cost an engine built on SDPA another {microseconds(gather)} a step (median).", highlight=False)
    for kind in dict.fromkeys(outcome.step.kind for outcome in outcomes):
        outcome = next(o for o in outcomes if o.step.kind == kind)
        console.print(f"\n[bold]The plan of a {kind} step[/bold]")
        for line in plan_words(explain_decode(outcome.problem, Device.of(device), outcome.plan)):
            console.print(f"  {line}", markup=False, highlight=False)
        if device.type == "cpu":
            console.print(f"  {_elsewhere(outcome.problem)}", markup=False, highlight=False)
    for index, outcome in enumerate(outcomes):
        if outcome.failure:
            console.print(f"step {index + 1}: {outcome.failure}", markup=False, style="red")
    words = "every step equals the float64 reference up to rounding" if document["passed"] else "a step differs from the reference"
    style = "bold green" if document["passed"] else "bold red"
    console.print(f"\n[{style}]{'PASSED' if document['passed'] else 'FAILED'}[/{style}]: {words}; "
                  f"{document['speedup_over_sdpa']:.2f}x SDPA (geometric mean); {document['seconds']:.1f} s in all.")  # fmt: skip
