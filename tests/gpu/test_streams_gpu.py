"""Streams, CUDA graphs, threads, devices, and how often kernels are compiled."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

import flashtile
from flashtile import reference
from flashtile.kernels import launch
from flashtile.testing.cases import Case
from flashtile.testing.inputs import Inputs, make_inputs
from flashtile.testing.tolerance import assert_close

PAGED = Case("paged", (700, 33, 1500, 64), 1, 32, 8, head_dim=128, dtype="bfloat16", page_size=16, capacity=2048)
LONG_SLEEP = 100_000_000  # clock cycles


def close_to_reference(out: torch.Tensor, lse: torch.Tensor | None, inputs: Inputs, what: str) -> None:
    assert_close(out, lse, *reference.decode(**inputs.args, dtype=torch.float32), what=what)


def test_work_goes_to_the_current_stream(device: torch.device) -> None:
    inputs = make_inputs(PAGED, device, seed=1)
    flashtile.decode_with_lse(**inputs.args)  # compiles, which waits
    late = inputs.args["q"].clone()
    inputs.args["q"] = torch.zeros_like(late)
    torch.cuda.synchronize()
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG_SLEEP)
        inputs.args["q"].copy_(late)
        out, lse = flashtile.decode_with_lse(**inputs.args)
    assert not side.query(), "the call waited for the GPU"
    side.synchronize()
    close_to_reference(out, lse, inputs, "side stream")


def test_several_streams_at_once(device: torch.device, library: Any) -> None:
    many = [make_inputs(PAGED, device, seed=seed) for seed in range(6)]
    alone = [library.decode(**inputs.args, num_splits=6) for inputs in many]
    streams = [torch.cuda.Stream(device) for _ in many]
    torch.cuda.synchronize()
    for _ in range(10):
        outs = []
        for stream, inputs in zip(streams, many):
            with torch.cuda.stream(stream):
                outs.append(library.decode(**inputs.args, num_splits=6))
        torch.cuda.synchronize()
        assert all(torch.equal(out, expected) for out, expected in zip(outs, alone))


def test_threads_share_plans_and_kernels(device: torch.device) -> None:
    cases = [Case(f"thread {i}", (300 + 7 * i, 90), 1 + i % 3, 8, 2, head_dim=(72, 104)[i % 2], dtype="bfloat16") for i in range(8)]
    many = [make_inputs(case, device, seed=i) for i, case in enumerate(cases)]
    outs: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        for _ in range(5):
            outs[i] = flashtile.decode(**many[i].args)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(many))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(outs) == len(many)
    for i, inputs in enumerate(many):
        close_to_reference(outs[i], None, inputs, f"thread {i}")


@pytest.mark.parametrize("num_splits", [None, 1, 7])
def test_a_graph_replays_with_other_lengths_and_pages(num_splits: int | None, device: torch.device, library: Any) -> None:
    inputs = make_inputs(replace(PAGED, seqlens_k=(2048,) * 4), device, seed=2)
    library.decode_with_lse(**inputs.args, num_splits=num_splits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = library.decode_with_lse(**inputs.args, num_splits=num_splits)
    for seed, lengths in enumerate(((700, 33, 1500, 64), (1, 2048, 0, 17), (2048, 2048, 2048, 2048), (5, 6, 7, 8))):
        other = make_inputs(replace(PAGED, seqlens_k=lengths), device, seed=seed)
        for name in ("q", "seqlens_k", "page_table"):
            inputs.args[name].copy_(other.args[name])
        for name in ("k_cache", "v_cache"):
            inputs.args[name].fill_(float("nan"))
            inputs.args[name][: len(other.args[name])] = other.args[name]
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        close_to_reference(out, lse, inputs, f"lengths {lengths}")


def test_a_graph_of_many_calls_replays_the_same_bits(device: torch.device, library: Any) -> None:
    inputs = make_inputs(Case("graph", (5001,), 1, 32, 8, head_dim=128, dtype="bfloat16"), device, seed=6)
    eager = library.decode(**inputs.args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [library.decode(**inputs.args) for _ in range(20)]
    for _ in range(5):
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(out, eager) for out in outs)


@pytest.mark.parametrize("growth", ["hint", "cache"])
def test_a_thousand_growing_lengths_compile_at_most_four_kernels(growth: str, device: torch.device) -> None:
    # a head_dim that no other test uses, so that nothing is compiled yet
    dim = 112 if growth == "hint" else 88
    k, v = (torch.randn(2, 4096, 2, dim, dtype=torch.bfloat16, device=device) for _ in range(2))
    q = torch.randn(2, 1, 8, dim, dtype=torch.bfloat16, device=device)
    before = launch.compilations()
    for length in range(900, 1900):
        seqlens_k = torch.full((2,), length, dtype=torch.int32, device=device)
        if growth == "hint":
            flashtile.decode(q, k, v, seqlens_k, max_seqlen_k=length)
        else:
            flashtile.decode(q, k[:, :length], v[:, :length], seqlens_k)
    assert 1 <= launch.compilations() - before <= 4


def test_a_device_that_is_not_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = torch.device("cuda", 1)
    inputs = make_inputs(PAGED, other, seed=7)
    with torch.cuda.device(0):
        out, lse = flashtile.decode_with_lse(**inputs.args, num_splits=5)
        assert torch.cuda.current_device() == 0
    assert out.device == other
    torch.cuda.synchronize(other)
    close_to_reference(out, lse, inputs, "device 1")
