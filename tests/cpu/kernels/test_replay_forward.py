"""Forward calls repeated by the C module: what it launches, and when a call takes the longer way."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flashtile.testing.forward_cases import FORWARD_CASES, ForwardCase
from flashtile.testing.forward_inputs import make_forward_inputs

pytest.importorskip("triton")

from flashtile.kernels import launch, spec
from flashtile.kernels.replay import RECORDED_CALL
from flashtile.ops import forward as forward_ops
from tests.cpu.kernels.fake_gpu import CPU, STREAM, FakeGpu, comparable, names_of, values_of

pytestmark = pytest.mark.skipif(launch.c_compiler() is None, reason="the module is C")


PACKED = ForwardCase("packed", (40, 0, 90), (40, 0, 90), num_heads_q=4, num_heads_kv=2, causal=True, spare_rows=2)
PLAIN = ForwardCase("plain", 90, 120, batch=2, num_heads_q=4, num_heads_kv=2, dtype="bfloat16", causal=True)


def forward_args(case: ForwardCase, seed: int = 0) -> dict[str, Any]:
    return {name: value for name, value in make_forward_inputs(case, seed=seed).args.items() if value is not None}


def check_repeated_forward(gpu: FakeGpu, want_lse: bool, first: dict[str, Any], second: dict[str, Any]) -> None:
    """A call of ``second`` launches the same by replay of ``first`` as the longer way."""
    gpu.settle(gpu.forward, want_lse=want_lse, **first)
    repeated_out, repeated_lse = gpu.forward(want_lse=want_lse, **second)
    repeated, launched_longer = list(gpu.driver.launched), list(gpu.longer)
    gpu.table.clear()
    out, lse = gpu.forward(want_lse=want_lse, **second)
    if not gpu.longer:
        assert not repeated  # nothing to attend to: there is no kernel
        return
    assert len(repeated) == len(gpu.longer) and not launched_longer
    assert repeated_out.shape == out.shape and repeated_out.dtype == out.dtype and repeated_out.stride() == out.stride()
    assert (repeated_lse is None) == (lse is None)
    for told, (kernel, grid_x, grid_y, block) in zip(repeated, gpu.longer):
        assert told[:5] == (kernel.function, (grid_x, grid_y, 1), (kernel.threads, 1, 1), kernel.shared, STREAM)
        mine = comparable(told.params, names_of(second, repeated_out, repeated_lse))
        assert mine == comparable(values_of(kernel, block), names_of(second, out, lse))


@pytest.mark.parametrize("want_lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("case", FORWARD_CASES, ids=lambda case: case.name)
def test_a_repeated_forward_call_launches_what_the_longer_way_launches(case: ForwardCase, want_lse: bool, gpu: FakeGpu) -> None:
    check_repeated_forward(gpu, want_lse, forward_args(case), forward_args(case, seed=1))


@pytest.mark.parametrize("name", ["plain", "packed", "one tensor of starts", "pages"])
def test_hoppers_forward_kernel_is_repeated_with_its_streams_counter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gluon = pytest.importorskip("flashtile.kernels.gluon.forward_sm90")
    counters = gluon.tile_counters(CPU).__class__(CPU)
    counters._addresses[STREAM] = 0x7000
    gpu = FakeGpu(monkeypatch)
    monkeypatch.setattr(forward_ops, "kernel_module", lambda plan: gluon)
    monkeypatch.setattr(gluon, "tile_counters", lambda device: counters)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(spec, "encoded", lambda meta, tensor: (struct.pack("<Q120x", tensor.data_ptr()), *tensor.shape, *tensor.stride()))
    monkeypatch.setattr("flashtile.kernels.block._bytes_of", lambda tensor_map: tensor_map)
    pages = ForwardCase("pages", (40, 90), (60, 200), page_size=16, causal=True)
    first, second = (forward_args({"plain": PLAIN, "pages": pages}.get(name, PACKED), seed) for seed in (0, 1))
    if name == "one tensor of starts":
        first["cu_seqlens_k"], second["cu_seqlens_k"] = first["cu_seqlens_q"], second["cu_seqlens_q"]
    check_repeated_forward(gpu, True, first, second)
    (told,) = gpu.driver.launched
    assert struct.pack("<Q", 0x7000) in told.params
    assert len(gpu.driver.moved) == 4


FORWARD_UNLIKE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "causal": lambda call: {"causal": False},
    "window": lambda call: {"window": (5, None)},
    "softcap": lambda call: {"softcap": 3.0},
    "scale": lambda call: {"scale": -0.5},
    "queries": lambda call: {"q": call["q"][:, 1:]},
    "keys": lambda call: {name: call[name][:, 1:] for name in "kv"},
    "sinks": lambda call: {"sinks": torch.empty(4)},
    "slopes": lambda call: {"alibi_slopes": torch.empty(4)},
    "out": lambda call: {"out": torch.empty_like(call["q"])},
    "tile": lambda call: {"block_m": 32},
    "lse": lambda call: {"want_lse": True},
    "dtype": lambda call: {name: call[name].half() for name in "qkv"},
    "a gradient": lambda call: {"q": call["q"].clone().requires_grad_()},
}


@pytest.mark.parametrize("name", FORWARD_UNLIKE)
def test_another_kind_of_forward_call_is_not_mistaken_for_a_recorded_one(name: str, gpu: FakeGpu) -> None:
    call = forward_args(PLAIN)
    gpu.settle(gpu.forward, **call)
    gpu.forward(**call)
    assert gpu.driver.launched and not gpu.longer
    gpu.driver.launched.clear()
    gpu.forward(**(call | FORWARD_UNLIKE[name](call)))
    assert gpu.longer and not gpu.driver.launched


def test_a_call_that_needs_a_gradient_is_repeated_within_autograd(gpu: FakeGpu) -> None:
    call = forward_args(PLAIN) | {"scale": 0.25}
    call["q"].requires_grad_()
    gpu.settle(gpu.forward, **call)
    out, _ = gpu.forward(**call)
    assert gpu.driver.launched and not gpu.longer
    assert out.requires_grad
    with torch.no_grad():
        assert not gpu.forward(**call)[0].requires_grad


def test_float32_is_cast_by_autocast_though_it_was_recorded(gpu: FakeGpu) -> None:
    call = {name: value.float() if isinstance(value, torch.Tensor) else value for name, value in forward_args(PLAIN).items()}
    gpu.settle(gpu.forward, **call)
    assert gpu.forward(**call)[0].dtype is torch.float32
    assert gpu.driver.launched
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gpu.forward(**call)[0].dtype is torch.bfloat16


def test_the_longest_keys_of_a_forward_call_may_grow_and_wrong_ones_are_still_refused(gpu: FakeGpu) -> None:
    lengths = torch.tensor([0, 64], dtype=torch.int32)
    call = {"q": torch.empty(64, 4, 64), "k": torch.empty(4000, 2, 64), "v": torch.empty(4000, 2, 64), "max_seqlen_q": 64}
    call |= {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths.clone()}
    for length in range(3100, 3100 + RECORDED_CALL):
        gpu.forward(max_seqlen_k=length, **call)
    gpu.longer.clear()
    for length in range(3110, 3310):
        gpu.forward(max_seqlen_k=length, **call)
    assert not gpu.longer
    with pytest.raises(ValueError, match="max_seqlen_k"):
        gpu.forward(max_seqlen_k=4001, **call)


def test_wrong_forward_calls_stay_wrong_though_a_right_one_was_recorded(gpu: FakeGpu) -> None:
    call = forward_args(PLAIN)
    gpu.settle(gpu.forward, **call)
    for wrong in (
        {"softcap": -1.0}, {"scale": float("nan")}, {"causal": 1}, {"max_seqlen_q": 2}, {"q": None}, {"plan": "fast"}, {"dropout_p": None},
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            gpu.forward(**(call | wrong))
    assert not gpu.driver.launched
