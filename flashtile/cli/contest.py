"""What the commands that time an operation share: input sets, peers whose results are checked first, clocks, and what is said of a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import metadata
from typing import Annotated, Any, TypeVar

import torch
import typer

import flashtile
from flashtile.cli.device import device_name
from flashtile.cli.output import console, errors, microseconds, print_json, progress, table
from flashtile.testing.peers import Peer
from flashtile.testing.timing import Stopwatch, graphs_in_turn
from flashtile.testing.tolerance import assert_close

COLD_BYTES = 400e6  # input sets of one problem together: several times any L2 cache
MAX_SETS = 64
PEER_LIMIT = 1e-2  # relative L2 error beyond which a peer answers another question than ours

Cell = Callable[[Mapping[str, Any]], str]  # of a table, from a row of results

Heads = Annotated[list[str] | None, typer.Option("--heads", help="Query heads/key heads, e.g. 32/8; repeatable.")]
HeadDim = Annotated[int, typer.Option("--head-dim", min=8, help="Size of a query, a key and a value.")]
Peers = Annotated[bool, typer.Option("--peers/--no-peers", help="Time the other libraries too.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Draws the numbers.")]

Inputs = TypeVar("Inputs")
Size = TypeVar("Size")


def parse_heads(text: str) -> tuple[int, int]:
    """``32/8``: query heads and key heads; one number is both."""
    query, _, kv = text.partition("/")
    try:
        pair = int(query), int(kv or query)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not of the form 32/8 (query heads/key heads).", param_hint="--heads") from None
    if min(pair) < 1 or pair[0] % pair[1]:
        raise typer.BadParameter(f"{text!r}: every key head serves the same number of query heads, e.g. 32/8.", param_hint="--heads")
    return pair


def run(
    operation: str,
    sizes: Sequence[Size],
    bench_one: Callable[[Size], dict[str, Any]],
    device: torch.device,
    dtype: str,
    head_dim: int,
    columns: Mapping[str, Cell],
    as_json: bool,
) -> None:
    """Times an operation at every size, and prints the document of it all as a table or JSON; exit code 1 where a result was wrong.

    ``columns`` are the table's, by their heads; the first names a problem, and the peers' times come behind the last.
    """
    rows: list[dict[str, Any]] = []
    with progress() as bar:
        task = bar.add_task(f"bench {operation}", total=len(sizes))
        for size in sizes:
            bar.update(task, description=f"bench {operation}: {size}")
            rows.append(bench_one(size))
            bar.advance(task)
    document = {
        "device": device_name(device),
        "versions": versions(),
        "protocol": protocol(device),
        "dtype": dtype,
        "head_dim": head_dim,
        "results": rows,
    }
    if as_json:
        print_json(document)
    else:
        _render(operation, document, columns)
    if any(row["check"] != "passed" for row in rows):
        raise typer.Exit(1)


def input_sets(make: Callable[[int], Inputs], num_bytes: Callable[[Inputs], int], device: torch.device, seed: int) -> list[Inputs]:
    """One set, or on a GPU as many as make a cold L2 cache; ``make`` gets each set's seed."""
    sets = [make(seed)]
    if device.type == "cuda":
        count = max(1, min(MAX_SETS, math.ceil(COLD_BYTES / num_bytes(sets[0]))))
        sets += [make(seed + i) for i in range(1, count)]
    return sets


def verdict(out: torch.Tensor, lse: torch.Tensor, expected: torch.Tensor, expected_lse: torch.Tensor) -> str:
    """ "passed", or what is wrong with our result."""
    try:
        assert_close(out, lse, expected, expected_lse, cpu_engine=out.device.type == "cpu")
    except AssertionError as failure:
        return str(failure)
    return "passed"


def able_peers(
    peers: Iterable[Peer[Inputs]], sample: Inputs, device: torch.device, dtype: torch.dtype, error_of: Callable[[Any], float]
) -> tuple[dict[str, Callable[[Inputs], Any]], dict[str, str]]:
    """The peers whose result on ``sample`` is near ours, ready to run, and why each other is left out."""
    runs: dict[str, Callable[[Inputs], Any]] = {}
    refused: dict[str, str] = {}
    for peer in peers:
        reason = peer.reason_against(device, dtype)
        if reason is None:
            try:
                run = peer.prepare(sample)
                error = error_of(run(sample))
                reason = None if error < PEER_LIMIT else f"its result is off by {error:.2g}: not timed"
            except Exception as failure:  # whatever a peer raises is why it is left out, and no reason to stop
                reason = " ".join(str(failure).split())[:200]
        if reason is None:
            runs[peer.name] = run
        else:
            refused[peer.name] = reason
    return runs, refused


def timed(runs: Mapping[str, Callable[[Inputs], Any]], sets: Sequence[Inputs], device: torch.device) -> dict[str, float]:
    """Seconds of one call of each, in turn."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return dict(zip(runs, graphs_in_turn([[partial(run, x) for x in sets] for run in runs.values()])))
    calls = [partial(run, sets[0]) for run in runs.values()]
    for call in calls:
        call()
    return dict(zip(runs, Stopwatch(device).in_turn(calls, repeats=21, budget=1.0)))


def protocol(device: torch.device) -> str:
    """What ``timed`` measures, in words."""
    if device.type == "cuda":
        sets = f"rotating input sets ({COLD_BYTES / 1e6:.0f} MB or {MAX_SETS} sets: cold L2)"
        return f"GPU time by CUDA-graph replay over {sets}, in turn, median of 9"
    return Stopwatch(device).protocol + "; one input set, so that small problems stay in the CPU's caches"


def versions() -> dict[str, str]:
    """Of this library, and of those that are timed or run beneath it."""
    found = {"flashtile": flashtile.__version__, "torch": torch.__version__}
    for name in ("triton", "flash_attn", "flashinfer-python"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def error_cell(row: Mapping[str, Any]) -> str:
    return f"{row['error']:.1e}" if row["check"] == "passed" else "[red]WRONG[/red]"


def own_time(row: Mapping[str, Any]) -> str:
    return microseconds(row["seconds"]["flashtile"])


def _render(operation: str, document: Mapping[str, Any], columns: Mapping[str, Cell]) -> None:
    rows = document["results"]
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"] if name != "flashtile"))
    title = f"{operation} on {document['device']}, {document['dtype']}, head dim {document['head_dim']}"
    made = table(title, *columns, *names, "best peer / ours")
    ratios = []
    for row in rows:
        cells, ratio = _peer_cells(row, names)
        ratios += [ratio] if ratio else []
        made.add_row(*(cell(row) for cell in columns.values()), *cells, f"{ratio:.2f}" if ratio else "-")
    console.print(made)
    _print_notes(document, ratios, next(iter(columns.values())))


def _peer_cells(row: Mapping[str, Any], names: Iterable[str]) -> tuple[list[str], float | None]:
    """The peers' times of one problem, and how many times ours the best of them is."""
    seconds = row["seconds"]
    cells = [microseconds(seconds[name]) if name in seconds else "-" for name in names]
    best = min((time for name, time in seconds.items() if name != "flashtile"), default=None)
    return cells, None if best is None else best / seconds["flashtile"]


def _print_notes(document: Mapping[str, Any], ratios: Sequence[float], name_of: Cell) -> None:
    """What stands under a table of times: the protocol, the mean, who was left out and why, and what was wrong."""
    console.print(f"Times: {document['protocol']}. Error: relative L2 against float64. Above 1 in the last column we are faster.")
    if ratios:
        console.print(f"Geometric mean of the last column: [bold]{statistics.geometric_mean(ratios):.2f}[/bold]")
    for name, reason in {name: why for row in document["results"] for name, why in row["not_timed"].items()}.items():
        console.print(f"[dim]{name}: {reason}[/dim]", highlight=False)
    for row in document["results"]:
        if row["check"] != "passed":
            errors.print(f"{name_of(row)}: {row['check']}", markup=False)
