"""Appends to a cache on a GPU, key by key against float64; and flash_attn_with_kvcache with them: graphs, growth, dependent launches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import flashtile
import flashtile.flash_attn_interface as three
from flashtile.flash_attn import flash_attn_with_kvcache
from flashtile.testing.append_cases import AppendCase, assert_written, written
from flashtile.testing.pairwise import pairwise
from flashtile.testing.parity import Parity
from flashtile.testing.parity_append import appended, assert_appended

APPENDS = pairwise(
    {
        "new": (1, 5, 300, (2, 0, 9), (0, 400, 1)),
        "queries": (0, 1, 5, (2, 0, 300)),
        "heads": ((32, 8), (4, 4), (3, 1)),
        "dims": ((128, 128), (59, 59), (64, 256), (96, 40)),
        "pairs": (None, 16, 29),
        "interleaved": (False, True),
        "queries_advance": (False, True),
        "own_positions": (False, True),
        "dtype": ("float16", "float32", "bfloat16"),
        "dtype_table": ("float32", "bfloat16"),
        "page_size": (0, 1, 16, 256, 512),
        "seqlens": ((3, 430, 0), (512, 700, -3)),
    },
    seed=10,
)
CALLS = pairwise(
    {
        "lengths": ((1, 1024), (4, 1024), (65, 1024), (300, 1024)),
        "heads": ((32, 8), (6, 6), (6, 1)),
        "head_dim": (59, 64, 128, 256),
        "dtype": ("float16", "bfloat16"),
        "mask": ({}, {"causal": True}, {"window_size": (129, 40)}, {"causal": True, "window_size": (300, -1)}),
        "features": ({}, {"alibi": True}, {"softcap": 15.0}),
        "layout": ("int", "lengths", "batch index", 1, 16, 256),
        "num_splits": (0, 1, 5),
        "new": (1, 4, 60),
        "fraction": (0.0, 0.5, 1.0),
        "interleaved": (False, True),
        "leftpad": (False, True),
    },
    seed=11,
)
OF_THE_CALL = ("layout", "num_splits", "new", "fraction", "interleaved", "leftpad")
STEP = AppendCase((4000, 63), 1, 1, (32, 8), (128, 128), 64, dtype="bfloat16", capacity=4096, positions=4097)


@pytest.mark.parametrize("row", APPENDS, ids=range(len(APPENDS)))
def test_append(row: dict[str, Any], device: torch.device) -> None:
    """Again and again, so that the later calls are repeated from C, at tensors that lie elsewhere."""
    case = AppendCase(**row, capacity=512, positions=500)
    for seed in range(5):
        args = case.arguments(device, seed)
        expected = written(args)
        assert_written(args, flashtile.append_kv(**args), expected)


@pytest.mark.parametrize("row", CALLS, ids=range(len(CALLS)))
def test_parity(row: dict[str, Any], device: torch.device) -> None:
    case = Parity.of({name: value for name, value in row.items() if name not in OF_THE_CALL})
    call = appended(case, *(row[name] for name in ("layout", "new", "fraction", "interleaved", "leftpad")), device)
    q, slopes = call.cache.tensors["q"], call.cache.tensors.get("alibi_slopes")
    args = case.scores | {"num_splits": row["num_splits"], "return_softmax_lse": True}
    k_cache, v_cache = call.caches()
    out, lse = flash_attn_with_kvcache(q, k_cache, v_cache, alibi_slopes=slopes, **call.given, **args)
    assert_appended(call, out, lse, k_cache, v_cache, math.inf)
    if slopes is None:
        k_cache, v_cache = call.caches()
        out, lse, *_ = three.flash_attn_with_kvcache(q, k_cache, v_cache, **call.given_to_three(), **args)
        assert_appended(call, out, lse, k_cache, v_cache, -math.inf)


def step_tensors(device: torch.device, case: AppendCase = STEP) -> dict[str, Any]:
    """What the drop-in is given for a step; the keys so far are random."""
    args = case.arguments(device)
    torch.manual_seed(0)
    for name in ("k_cache", "v_cache"):
        args[name] = torch.randn_like(args[name])
    names = {"seqlens_k": "cache_seqlens", "page_table": "block_table"}
    return {names.get(name, name): value for name, value in args.items() if name != "queries_advance"} | {"causal": True}


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("batch", [1, 2, 32, 40])  # 32 without pages begins once the append has ended
def test_a_dependent_launch_sees_all_that_was_appended(batch: int, page_size: int, device: torch.device) -> None:
    """Each step's own key decides: q is 30 times it, so that a decode that came too soon is wrong by far, however rarely."""
    case = replace(STEP, seqlens=STEP.seqlens * (batch // 2) if batch > 1 else (4000,), page_size=page_size)
    given = step_tensors(device, case)
    if page_size:
        given["block_table"][-1, -1] = 0  # the case's page outside the cache: nothing is written there at these lengths
    for step in range(60):
        given["k"] = torch.randn_like(given["k"])
        given["v"] = torch.full_like(given["v"], step + 1.0)
        given["q"] = given["k"].repeat_interleave(4, dim=2) * 30.0
        out = flash_attn_with_kvcache(**given)
        assert torch.equal(out, torch.full_like(out, step + 1.0)), f"step {step}"


def test_steps_wait_for_nothing_and_are_captured(device: torch.device) -> None:
    """A graph that appends, decodes and counts on is the same steps one by one."""
    given, other = step_tensors(device), step_tensors(device)
    expected = []
    for _ in range(20):
        expected.append(flash_attn_with_kvcache(**other))
        other["cache_seqlens"] += 1
    try:
        torch.cuda.set_sync_debug_mode("error")
        first = flash_attn_with_kvcache(**given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, expected[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_with_kvcache(**given)
        given["cache_seqlens"] += 1
    for i, wanted in enumerate(expected):
        graph.replay()
        assert torch.equal(out, wanted), f"step {i}"
    assert torch.equal(given["k_cache"], other["k_cache"]) and torch.equal(given["cache_seqlens"], other["cache_seqlens"])


def test_compilers_mutate_the_caches(device: torch.device) -> None:
    given, other = step_tensors(device), step_tensors(device)
    compiled = torch.compile(flash_attn_with_kvcache, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(**given), flash_attn_with_kvcache(**other))
        given["cache_seqlens"] += 1
        other["cache_seqlens"] += 1
    assert torch.equal(given["k_cache"], other["k_cache"]) and torch.equal(given["v_cache"], other["v_cache"])


def test_streams_of_their_own(device: torch.device) -> None:
    given = step_tensors(device)
    expected = flash_attn_with_kvcache(**given)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    calls = [given | {name: given[name].clone() for name in ("k_cache", "v_cache")} for _ in streams]
    torch.cuda.synchronize()
    outs = []
    for stream, call in zip(streams, calls):
        with torch.cuda.stream(stream):
            outs.append([flash_attn_with_kvcache(**call) for _ in range(10)][-1])
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("pairs", [None, 32])
def test_codes_are_those_of_the_cpu(stored: torch.dtype, pairs: int | None, device: torch.device) -> None:
    """To the bit where nothing is turned; else but for sums that round to either side of a tie."""
    case = AppendCase((3, 430, 0), 60, 0, (32, 8), (128, 64), pairs, dtype="bfloat16", capacity=512, positions=500)
    scales = {"k_scale": torch.rand(3, 8) * 0.02 + 0.001, "v_scale": torch.rand(8) * 0.02 + 0.001}
    results = []
    for where in (torch.device("cpu"), device):
        args = case.arguments(where)
        args |= {name: torch.zeros_like(args[name], dtype=torch.float32).to(stored) for name in ("k_cache", "v_cache")}
        flashtile.append_kv(**args, **{name: scale.to(where) for name, scale in scales.items()})
        results.append([args[name].view(torch.int8).cpu().int() for name in ("k_cache", "v_cache")])
    (k, v), (k_gpu, v_gpu) = results
    assert torch.equal(v, v_gpu)
    unlike = (k != k_gpu).double().mean().item()
    if stored == torch.float8_e4m3fn:
        k, k_gpu = k & 0x7F, k_gpu & 0x7F  # a sum that is nearly 0 may have either sign
    assert unlike == 0.0 if pairs is None else unlike < 1e-3 and (k - k_gpu).abs().max() <= 1
