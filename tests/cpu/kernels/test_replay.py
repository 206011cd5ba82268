"""Calls repeated by the C module: what it passes to a driver that only takes notes, and when it stays out of the way.

Tensors lie on the CPU here. The module does not care: it reads them through DLPack and hands addresses on.
"""

from __future__ import annotations

import gc
import struct
import sys
import threading
from typing import Any

import pytest
import torch

from flashtile.kernels.call import DecodeCall
from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem
from flashtile.testing.cases import QUANTISED_CASES, SMALL_CASES, Case
from flashtile.testing.inputs import make_inputs

pytest.importorskip("triton")

from flashtile.checking import checked
from flashtile.facts import rounded_hint
from flashtile.kernels import launch, native, replay
from flashtile.kernels.replay import RECORDED_CALL
from tests.cpu.kernels.fake_gpu import (
    PDL,
    STREAM,
    FakeGpu,
    comparable,
    names_of,
    tensors,
    values_of,
)

pytestmark = pytest.mark.skipif(launch.c_compiler() is None, reason="the module is C")


@pytest.mark.parametrize("want_lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("case", [*SMALL_CASES, *QUANTISED_CASES[::5]], ids=lambda case: case.name)
def test_a_repeated_call_launches_what_the_longer_way_launches(case: Case, splits: int, want_lse: bool, gpu: FakeGpu) -> None:
    """Every parameter but the scratch's address, at tensors that lie elsewhere than those that were recorded."""
    first, second = ({**make_inputs(case, seed=seed).args, "num_splits": splits} for seed in (0, 1))
    first, second = ({name: value for name, value in args.items() if value is not None} for args in (first, second))
    gpu.settle(want_lse=want_lse, **first)
    repeated_out, repeated_lse = gpu.decode(want_lse=want_lse, **second)
    repeated, launched_longer = list(gpu.driver.launched), list(gpu.longer)
    gpu.table.clear()
    out, lse = gpu.decode(want_lse=want_lse, **second)
    if not gpu.longer:
        assert not repeated  # nothing to attend to: there is no kernel
        return
    assert len(repeated) == len(gpu.longer) and not launched_longer
    assert repeated_out.shape == out.shape and repeated_out.dtype == out.dtype and repeated_out.stride() == out.stride()
    assert (repeated_lse is None) == (lse is None)
    for told, (kernel, grid_x, grid_y, block) in zip(repeated, gpu.longer):
        assert told.function == kernel.function
        assert told.grid == (grid_x, grid_y, 1)
        assert told.threads == (kernel.threads, 1, 1)
        assert told.shared == kernel.shared
        assert told.stream == STREAM
        assert told.attributes == ({PDL: 1} if kernel.dependent else {})
        mine = comparable(told.params, names_of(second, repeated_out, repeated_lse))
        theirs = comparable(values_of(kernel, block), names_of(second, out, lse))
        unlike = [i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b]
        scratch = [i for i, (offset, address, _) in enumerate(block.pointers) if address not in names_of(second, out, lse)]
        assert len(unlike) <= len(scratch), "only scratch lies elsewhere"
        pointers = {block.offsets.index(block.pointers[i][0]) for i in scratch}
        assert set(unlike) <= pointers


def test_two_launches_of_a_call_share_its_scratch_and_calls_do_not(gpu: FakeGpu) -> None:
    call = tensors()
    gpu.settle(num_splits=4, **call)
    outs = [gpu.decode(num_splits=4, **call)[0] for _ in range(3)]
    split, join = gpu.driver.launched[:2]
    shared = set(split.params) & set(join.params)
    own = names_of(call, outs[0], None)
    pointers = {struct.unpack("<Q", value)[0] for value in shared if len(value) == 8}
    assert any(pointer > 2**20 and pointer not in own for pointer in pointers)
    assert len({out.data_ptr() for out in outs}) == 3
    assert all(out.is_contiguous() for out in outs)


def test_a_given_out_is_written_and_returned(gpu: FakeGpu) -> None:
    call = tensors()
    for _ in range(RECORDED_CALL + 1):
        out = torch.empty(1, 1, 32, 128, dtype=torch.bfloat16)
        gpu.driver.launched.clear()
        result, lse = gpu.decode(out=out, num_splits=1, **call)
        assert result is out
        assert lse is None
        assert out._version == 1, "autograd is told"
    (told,) = gpu.driver.launched
    assert struct.pack("<Q", out.data_ptr()) in told.params


def test_out_is_contiguous_though_q_is_not(gpu: FakeGpu) -> None:
    call = tensors(batch=2)
    call["q"] = torch.empty(32, 1, 2, 128, dtype=torch.bfloat16).transpose(0, 2)
    for _ in range(RECORDED_CALL + 1):
        out, _ = gpu.decode(**call)
        assert out.is_contiguous()
    assert gpu.driver.launched


def test_calls_are_recorded_only_when_they_come_again(gpu: FakeGpu) -> None:
    call = tensors()
    for length in range(300, 320):
        gpu.decode(**call | {name: call[name][:, :length] for name in ("k_cache", "v_cache")})
    assert len(gpu.table) == 0
    for _ in range(5):
        gpu.decode(**call)
    assert len(gpu.table) == 1


def test_a_hint_that_grows_keeps_its_kind_and_a_wrong_one_is_still_refused(gpu: FakeGpu) -> None:
    call = tensors(4000)
    for length in range(3100, 3100 + RECORDED_CALL):
        gpu.decode(max_seqlen_k=length, **call)
    gpu.longer.clear()
    for length in range(3110, 3310):
        gpu.decode(max_seqlen_k=length, **call)
    assert not gpu.longer
    for length in (3900, 3901, 4000):  # their bucket ends beyond the cache
        for _ in range(RECORDED_CALL):
            gpu.decode(max_seqlen_k=length, **call)
    with pytest.raises(ValueError, match="max_seqlen_k"):
        gpu.decode(max_seqlen_k=4001, **call)
    with pytest.raises((ValueError, TypeError), match="max_seqlen_k"):
        gpu.decode(max_seqlen_k=-1, **call)


@pytest.mark.parametrize("paged", [False, True])
def test_a_rounded_hint_plans_like_the_hint(paged: bool) -> None:
    call = tensors(4000)
    if paged:
        call |= {"k_cache": call["k_cache"].view(250, 16, 8, 128), "v_cache": call["v_cache"].view(250, 16, 8, 128)}
        call["page_table"] = torch.zeros(1, 250, dtype=torch.int32)
    for hint in (0, 1, 63, 64, 65, 1000, 1024, 1025, 2047, 3585, 3999, 4000):
        rounded = rounded_hint(hint, call["k_cache"], call.get("page_table"))
        assert Problem.decode(**call, max_seqlen_k=rounded) == Problem.decode(**call, max_seqlen_k=hint)
    assert rounded_hint(4001, call["k_cache"], call.get("page_table")) == 4001
    assert rounded_hint(True, call["k_cache"], None) is True
    assert rounded_hint(5, "no tensor", None) == 5


def test_kinds_are_bounded(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_KINDS", 4)
    call = tensors()
    for i in range(10):
        gpu.settle(scale=1.0 + i, **call)
        assert len(gpu.table) <= 4
    gpu.decode(scale=10.0, **call)
    assert gpu.driver.launched


def test_with_a_profiler_or_on_another_device_calls_take_the_longer_way(gpu: FakeGpu) -> None:
    call = tensors()
    gpu.settle(**call)
    args = (*call.values(), *[None] * 4, True, None, 0.0, *[None] * 11, False, False, False)
    assert gpu.table.run(*args) is not None
    for listener in gpu.listeners:
        listener.append("a profiler")
        assert gpu.table.run(*args) is None
        listener.clear()
    gpu.driver.device = 1
    assert gpu.table.run(*args) is None
    gpu.driver.device = 0
    assert gpu.table.run(*args) is not None


def test_checked_calls_are_checked_though_they_were_recorded(gpu: FakeGpu) -> None:
    call = tensors()
    gpu.settle(**call)
    call["seqlens_k"].fill_(9999)
    gpu.decode(**call)
    assert gpu.driver.launched
    with checked(), pytest.raises(ValueError, match=r"seqlens_k\[0\].*9999"):
        gpu.decode(**call)


def test_a_launch_that_fails_raises_the_errors_name(gpu: FakeGpu) -> None:
    call = tensors()
    gpu.settle(num_splits=4, **call)
    for results in ([700], [0, 700]):
        gpu.driver.results = results
        with pytest.raises(RuntimeError, match=r"launch a kernel: CUDA_ERROR_ILLEGAL_ADDRESS \(700\)"):
            gpu.decode(num_splits=4, **call)
    gpu.decode(num_splits=4, **call)


def test_a_thread_without_a_context_takes_the_longer_way(gpu: FakeGpu) -> None:
    call = tensors()
    gpu.settle(**call)
    gpu.driver.results = [201]
    gpu.decode(**call)
    assert len(gpu.driver.launched) == 1
    assert gpu.longer


def test_many_threads_repeat_while_the_table_is_cleared(gpu: FakeGpu) -> None:
    call = tensors()
    gpu.settle(num_splits=4, **call)
    failures: list[Any] = []

    def work(i: int) -> None:
        mine = call | {"q": torch.empty_like(call["q"])}
        for j in range(200):
            if i == 0 and j % 20 == 0:
                gpu.table.clear()
            try:
                out, _ = gpu.decode(num_splits=4, **mine)
                assert out.shape == mine["q"].shape
            except BaseException as error:
                failures.append(error)
                raise

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(told.stream == STREAM for told in gpu.driver.launched)


def test_nothing_is_leaked(gpu: FakeGpu) -> None:
    call = tensors()
    plan: DecodePlan = plan_decode(Problem.decode(**call), Device.named("h200"), num_splits=4)
    call |= {"plan": plan, "out_dtype": torch.bfloat16}
    gpu.settle(want_lse=True, **call)
    watched = [*call.values(), 0, None]

    def tensors_alive() -> int:
        return sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects())

    alive, before = tensors_alive(), [sys.getrefcount(value) for value in watched]
    for _ in range(500):
        gpu.decode(want_lse=True, **call)
        gpu.driver.launched.clear()
    assert tensors_alive() == alive
    assert all(sys.getrefcount(value) - then < 100 for value, then in zip(watched, before))
    held = sys.getrefcount(plan)
    gpu.table.clear()
    assert sys.getrefcount(plan) < held, "a record outlives the table"


def test_without_a_driver_there_is_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> native.Driver:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(native.Driver, "of_this_machine", missing)
    assert native.cuda_table() is None
    assert replay.cuda_replays.__wrapped__(DecodeCall) is None


def test_without_a_compiler_there_is_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> Any:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(native.Driver, "of_this_machine", lambda: native.Driver(1, 1, 1, 1))
    monkeypatch.setattr(native, "module", failing)
    assert native.cuda_table() is None
