"""flash_attn_with_kvcache with and without an append and rotary embeddings, in turn.

New keys and values are those that lie in the cache already, and the tables turn nothing: so every contestant does its work, and all have
one result, which is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import flashtile
from benchmarks import timing
from benchmarks.check import Oracle
from benchmarks.grids import Entry
from benchmarks.kvcache_targets import APART, APPEND, ROTARY
from benchmarks.measure import HOST_TIME_BYTES, OURS, Options
from benchmarks.sets import InputSets, num_sets
from benchmarks.trials import Trials
from flashtile.flash_attn import flash_attn_with_kvcache


def measure_kvcache(entry: Entry, options: Options) -> dict[str, Any]:
    """GPU and host time of each way to decode, and what append and rotary add to decode alone."""
    sets = InputSets(entry, options.device, num_sets(entry, options.device))
    oracle, trials = Oracle(sets), Trials(options.device)
    for name, make in CONTESTANTS.items():
        trials.enter(name, lambda make=make: make(sets), oracle)  # type: ignore[misc]
    if options.device.type == "cuda":
        clocked = timing.graph_time(trials.fns, sets.count, options.rounds, timing.calls_per_graph(sets.count, entry.kv_bytes))
    else:
        clocked = timing.wall_time(trials.fns, sets.count, options.rounds)
    for name, times in clocked.items():
        trials.results[name] |= times.to_json()
    if options.device.type == "cuda" and entry.kv_bytes <= HOST_TIME_BYTES:
        for name, times in timing.host_times(trials.fns, sets.count).items():
            trials.results[name]["host_us"] = round(times.median_us, 2)
    alone = trials.results[OURS].get("gpu_us")
    for result in trials.results.values():
        if alone and "gpu_us" in result:
            result["of_decode_alone"] = round(result["gpu_us"] / alone, 3)
    return entry.facts() | {"sets": sets.count, "results": trials.results}


def outcome(row: dict[str, Any]) -> str:
    """One entry's outcome in one line of a terminal."""
    words = []
    for name, result in row["results"].items():
        host = f" host {result['host_us']:.1f}" if "host_us" in result else ""
        shown = f"{result['gpu_us']:.2f} us ({result.get('of_decode_alone', 0):.2f}x){host}" if "gpu_us" in result else str(result)[:80]
        words.append(f"{name} {shown}")
    return f"{row['name']:24} " + "; ".join(words)


def _alone(sets: InputSets) -> timing.Contestant:
    calls = [_shared(sets, i) | {"cache_seqlens": sets.seqlens_k} for i in range(sets.count)]
    return lambda i: flash_attn_with_kvcache(**calls[i % sets.count])


def _appending(sets: InputSets, turned: bool) -> timing.Contestant:
    calls = [_shared(sets, i) | _new(sets, i) | (_tables(sets) if turned else {}) for i in range(sets.count)]
    return lambda i: flash_attn_with_kvcache(**calls[i % sets.count])


def _apart(sets: InputSets) -> timing.Contestant:
    """Without dependent launch: what it saves."""
    calls = [(sets.args(i), _new(sets, i), _tables(sets)) for i in range(sets.count)]

    def run(i: int) -> torch.Tensor:
        args, new, tables = calls[i % sets.count]
        seqlens, q = flashtile.append_kv(
            args["k_cache"], args["v_cache"], new["k"], new["v"], new["cache_seqlens"], page_table=args["page_table"], q=args["q"], **tables
        )
        return flashtile.decode(q, args["k_cache"], args["v_cache"], seqlens, page_table=args["page_table"])  # type: ignore[arg-type]

    return run


def _shared(sets: InputSets, i: int) -> dict[str, Any]:
    return {"q": sets.q[i], "k_cache": sets.k[i], "v_cache": sets.v[i], "block_table": sets.page_table, "causal": True}


def _new(sets: InputSets, i: int) -> dict[str, Any]:
    """The last keys and values of each sequence, and how many there are before them."""
    count = sets.entry.seqlen_q
    before = sets.seqlens_k - count
    at = before.long()[:, None] + torch.arange(count, device=sets.device)
    rows = torch.arange(sets.entry.batch, device=sets.device)[:, None]
    slot = at
    if sets.page_table is not None:
        rows, slot = sets.page_table.long().gather(1, at // sets.entry.page_size), at % sets.entry.page_size
    return {"k": sets.k[i][rows, slot], "v": sets.v[i][rows, slot], "cache_seqlens": before}


def _tables(sets: InputSets) -> dict[str, Any]:
    cos = torch.ones(sets.entry.capacity, sets.entry.head_dim // 2, device=sets.device)
    return {"rotary_cos": cos, "rotary_sin": torch.zeros_like(cos), "rotary_interleaved": False}


CONTESTANTS: dict[str, Callable[[InputSets], timing.Contestant]] = {
    OURS: _alone,
    APPEND: lambda sets: _appending(sets, turned=False),
    ROTARY: lambda sets: _appending(sets, turned=True),
    APART: _apart,
}
