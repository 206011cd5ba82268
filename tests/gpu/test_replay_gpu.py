"""Calls that are repeated from C give the bits of the longer way: at other addresses, on any stream, in graphs and threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import flashtile
from flashtile.kernels.call import DecodeCall, ForwardCall
from flashtile.testing.cases import SMALL_CASES, Case
from flashtile.testing.forward_cases import FORWARD_CASES, ForwardCase
from flashtile.testing.forward_inputs import make_forward_inputs
from flashtile.testing.inputs import make_inputs

replay = pytest.importorskip("flashtile.kernels.replay", reason="needs Triton")

STEP = Case("step", (4097, 300), 1, 32, 8, head_dim=128, dtype="bfloat16")


@pytest.fixture
def recorded() -> Any:
    """What this process has recorded; the tests see how much it grows."""
    replays = replay.cuda_replays(DecodeCall)
    assert replays is not None, "the C module was not built"
    return replays


def arguments(case: Case, device: torch.device, seed: int = 0, **more: Any) -> dict[str, Any]:
    return {name: value for name, value in make_inputs(case, device, seed=seed).args.items() if value is not None} | more


def settle(args: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The result the longer way; afterwards calls like this one are repeated."""
    results = [flashtile.decode_with_lse(**args) for _ in range(replay.RECORDED_CALL)]
    return results[0]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("num_splits", [None, 1, 3])
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_repeated_calls_give_the_same_bits(case: Case, num_splits: int | None, device: torch.device) -> None:
    first, second = (arguments(case, device, seed, num_splits=num_splits) for seed in (0, 1))
    expected = [flashtile.decode_with_lse(**second)]
    expected.append(settle(first))
    for args, (out, lse) in ((second, expected[0]), (first, expected[1])):
        again, lse_again = flashtile.decode_with_lse(**args)
        assert same_bits(again, out)
        assert same_bits(lse_again, lse)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_steps_of_one_shape_are_repeated(num_splits: int, device: torch.device, recorded: Any) -> None:
    before = len(recorded)
    args = arguments(STEP, device, num_splits=num_splits, scale=0.1 + before * 2.0**-20)
    settle(args)
    assert len(recorded) == before + 1
    out = torch.empty_like(args["q"])
    for _ in range(replay.RECORDED_CALL):
        flashtile.decode(**args, out=out)
    assert len(recorded) == before + 2
    assert flashtile.decode(**args, out=out) is out


def test_a_repeated_call_goes_to_the_current_stream(device: torch.device) -> None:
    args = arguments(STEP, device, num_splits=4)
    expected, _ = settle(args)
    torch.cuda.synchronize()
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        moved = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in args.items()}
        out, _ = flashtile.decode_with_lse(**moved)
        done = side.record_event()
    assert not done.query(), "the call did not wait behind what its stream was doing"
    side.synchronize()
    assert same_bits(out, expected)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_a_repeated_call_is_captured(num_splits: int, device: torch.device) -> None:
    args, others = (arguments(STEP, device, seed, num_splits=num_splits) for seed in (0, 1))
    settle(args)
    expected = [flashtile.decode_with_lse(**given) for given in (args, others)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flashtile.decode_with_lse(**args)
    kept = {name: value.clone() for name, value in args.items() if isinstance(value, torch.Tensor)}
    for given, (expected_out, expected_lse) in zip((kept, others), expected, strict=True):
        for name in kept:
            args[name].copy_(given[name])
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(out, expected_out)
        assert same_bits(lse, expected_lse)


def test_a_new_thread_repeats_calls(device: torch.device) -> None:
    """Its first work on the GPU may be a repeated call, without a context of its own yet."""
    args = arguments(STEP, device, num_splits=4)
    expected, _ = settle(args)
    results: list[torch.Tensor] = []

    def work() -> None:
        for _ in range(50):
            results.append(flashtile.decode_with_lse(**args)[0])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(results) == 200
    assert all(same_bits(result, expected) for result in results)


def test_two_devices_have_records_of_their_own(device: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", 1 - device.index)
    results = []
    for place in (device, other, device, other):
        with torch.cuda.device(place):
            args = arguments(STEP, place, num_splits=4)
            settle(args)
            results.append(flashtile.decode(**args).cpu())
    # called from the other device, which is not current
    results.append(flashtile.decode(**arguments(STEP, other, num_splits=4)).cpu())
    assert all(same_bits(result, results[0]) for result in results)


PROMPT = ForwardCase("prompt", 300, 417, batch=2, num_heads_q=8, num_heads_kv=2, head_dim=128, dtype="bfloat16", causal=True)
FORWARD = [case for case in FORWARD_CASES if case.dtype != "float32"]


def attend(case: ForwardCase, args: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return (flashtile.attention_varlen_with_lse if case.varlen else flashtile.attention_with_lse)(**args)


def forward_arguments(case: ForwardCase, device: torch.device, seed: int = 0) -> dict[str, Any]:
    args = make_forward_inputs(case, device, seed=seed).args
    return {name: value for name, value in args.items() if value is not None or (name == "cu_seqlens_k" and case.varlen)}


@pytest.mark.parametrize("case", FORWARD, ids=lambda case: case.name)
def test_repeated_forward_calls_give_the_same_bits(case: ForwardCase, device: torch.device) -> None:
    first, second = (forward_arguments(case, device, seed) for seed in (0, 1))
    expected = [attend(case, second), attend(case, first)]
    for _ in range(replay.RECORDED_CALL):
        attend(case, first)
    for args, (out, lse) in ((second, expected[0]), (first, expected[1])):
        again, lse_again = attend(case, args)
        assert same_bits(again, out)
        assert same_bits(lse_again, lse)


def test_forward_calls_are_repeated_on_every_stream_and_in_graphs(device: torch.device) -> None:
    """Their programs take tiles by a counter: each stream has one of its own, and so has each graph."""
    replays = replay.cuda_replays(ForwardCall)
    assert replays is not None, "the C module was not built"
    before = len(replays)
    args = forward_arguments(PROMPT, device) | {"scale": 0.1 + before * 2.0**-20}
    expected, *_ = [attend(PROMPT, args) for _ in range(replay.RECORDED_CALL)]
    assert len(replays) == before + 1
    torch.cuda.synchronize()
    results = []
    for stream in [torch.cuda.Stream(device) for _ in range(4)]:
        with torch.cuda.stream(stream):
            results += [attend(PROMPT, args) for _ in range(20)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(PROMPT, args)
    for _ in range(3):
        graph.replay()
        results += [attend(PROMPT, args), tuple(tensor.clone() for tensor in captured)]
    torch.cuda.synchronize()
    assert all(same_bits(out, expected[0]) and same_bits(lse, expected[1]) for out, lse in results)


def test_a_repeated_call_within_autograd_has_the_same_gradients(device: torch.device) -> None:
    args = forward_arguments(PROMPT, device)
    leaves = [args[name] for name in "qkv"]
    for leaf in leaves:
        leaf.requires_grad_()
    results = []
    for _ in range(replay.RECORDED_CALL + 2):
        out = flashtile.attention(**args)
        results.append((out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)))
    assert all(same_bits(mine, first) for result in results for mine, first in zip(result, results[0], strict=True))
