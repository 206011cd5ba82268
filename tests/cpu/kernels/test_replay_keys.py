"""Which calls have one key and which none: what the C module takes for another kind of call, and what it never repeats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device
from flashtile.problem import Problem

pytest.importorskip("triton")

from flashtile.kernels import launch
from tests.cpu.kernels.fake_gpu import FakeGpu, tensors

pytestmark = pytest.mark.skipif(launch.c_compiler() is None, reason="the module is C")


UNLIKE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "scale": lambda call: {"scale": 0.5},
    "softcap": lambda call: {"softcap": 3.0},
    "window": lambda call: {"window": (5, 0)},
    "causal": lambda call: {"causal": False},
    "hint": lambda call: {"max_seqlen_k": 100},
    "splits": lambda call: {"num_splits": 3},
    "tile": lambda call: {"block_m": 16, "num_splits": 2},
    "out_dtype": lambda call: {"out_dtype": torch.float32},
    "out": lambda call: {"out": torch.empty_like(call["q"])},
    "sinks": lambda call: {"sinks": torch.empty(32)},
    "slopes": lambda call: {"alibi_slopes": torch.empty(32)},
    "lengths": lambda call: tensors(batch=2),
    "capacity": lambda call: {name: call[name][:, :300] for name in ("k_cache", "v_cache")},
    "strides": lambda call: {"q": torch.empty(1, 1, 33, 128, dtype=torch.bfloat16)[:, :, 1:]},
    "alignment": lambda call: {"q": torch.empty(32 * 128 + 1, dtype=torch.bfloat16)[1:].view(1, 1, 32, 128)},
    "dtype": lambda call: tensors(dtype=torch.float16),
    "lse": lambda call: {"want_lse": True},
}


@pytest.mark.parametrize("name", UNLIKE)
def test_another_kind_of_call_is_not_mistaken_for_a_recorded_one(name: str, gpu: FakeGpu) -> None:
    call = tensors()
    gpu.settle(**call)
    gpu.decode(**call)
    assert gpu.driver.launched and not gpu.longer
    gpu.driver.launched.clear()
    gpu.decode(**(call | UNLIKE[name](call)))
    assert gpu.longer and not gpu.driver.launched


def test_an_unaligned_tensor_beside_an_aligned_one_makes_another_key(gpu: FakeGpu) -> None:
    buffer = torch.empty(32 * 128 + 8, dtype=torch.bfloat16)
    aligned, moved = buffer[:-8].view(32, 128), buffer[4:-4].view(32, 128)
    assert gpu.table.key(aligned) != gpu.table.key(moved)
    assert gpu.table.key(aligned) == gpu.table.key(buffer[8:].view(32, 128))


def test_wrong_calls_stay_wrong_though_a_right_one_was_recorded(gpu: FakeGpu) -> None:
    call = tensors()
    gpu.settle(**call)
    for wrong in ({"softcap": -1.0}, {"scale": float("nan")}, {"causal": 1}, {"seqlens_k": call["seqlens_k"].long()}, {"max_seqlen_q": 2}):
        with pytest.raises((ValueError, TypeError)):
            gpu.decode(**(call | wrong))
    assert not gpu.driver.launched


def test_what_is_told_apart_by_a_key(gpu: FakeGpu) -> None:
    key = gpu.table.key
    q = torch.empty(2, 3)
    plan = plan_decode(Problem(seqlen_k=64), Device.named("h200"))
    unlike = [
        None, True, False, 0, 1, -1, 2**40, 0.0, -0.0, 1.0, (None, 0), (0, None), (), (1, 2), (2, 1), torch.float32, torch.float16,
        plan, replace(plan, source="caller"), q, q.T, q.double(), q[:, :2], q[:1], q.int(), torch.empty(3, 2),
    ]  # fmt: skip
    keys = [key(value) for value in unlike]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert key(q) == key(torch.empty(2, 3))
    assert key(None, 1) != key(1, None)


class Odd(torch.Tensor):
    """A subclass that may mean something of its own by every operation."""


KEYLESS = {
    "list": [1, 2],
    "str": "text",
    "huge int": 2**70,
    "subclass": torch.empty(2).as_subclass(Odd),
    "meta": torch.empty(2, device="meta"),
    "tuple of tensors": (torch.empty(1),),
    "object": object(),
    "nested tuple": ((1, 2),),
}


@pytest.mark.parametrize("value", KEYLESS.values(), ids=KEYLESS)
def test_what_has_no_key_is_never_repeated(value: Any, gpu: FakeGpu) -> None:
    assert gpu.table.key(value) is None
    assert gpu.table.key(torch.empty(2), value) is None
    assert gpu.table.run(torch.empty(2), value) is None


def test_parameters_and_tensors_that_require_gradients_have_keys(gpu: FakeGpu) -> None:
    assert (
        gpu.table.key(torch.nn.Parameter(torch.empty(2)))
        == gpu.table.key(torch.empty(2))
        == gpu.table.key(torch.empty(2, requires_grad=True))
    )


def test_a_tensor_inside_vmap_takes_the_longer_way(gpu: FakeGpu) -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(gpu.table.key(x))
        return x

    torch.vmap(look)(torch.empty(3, 2))
    assert seen == [None]
