"""Which runners the C module repeats: those that only launch; buffers, memory by stream and tensor maps of what they launch."""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flashtile.kernels.call import DecodeCall

pytest.importorskip("triton")
import triton

from flashtile.kernels import launch, replay, spec
from flashtile.kernels.block import Described, Kernel, sizes_of
from flashtile.kernels.replay import RECORDED_CALL, DeviceRunner
from flashtile.ops import decode as ops
from tests.cpu.kernels.fake_gpu import (
    COOPERATIVE,
    STREAM,
    FakeGpu,
    tensors,
)

pytestmark = pytest.mark.skipif(launch.c_compiler() is None, reason="the module is C")


def simple_call() -> tuple[tuple[Any, ...], DecodeCall]:
    q, k, v, lengths = (torch.empty(4) for _ in range(4))
    out = torch.empty(4)
    return (q, k, v, lengths), DecodeCall(q, k, v, lengths, None, None, None, None, out, None, 1.0, 0.0)


KERNEL = Kernel(0xF00, 128, 0, False, True, ("*fp32", "i32"))


def noted(gpu: FakeGpu, run: Callable[[Any, DecodeCall], None], args: tuple[Any, ...], call: DecodeCall) -> Any:
    gpu.driver.sizes[KERNEL.function] = sizes_of(KERNEL)
    for _ in range(RECORDED_CALL):
        gpu.replays.note(run, 0, args, call)
    return gpu.table.run(*args)


def test_a_runner_that_only_launches_is_repeated(gpu: FakeGpu) -> None:
    args, call = simple_call()

    def run(stream: Any, call: DecodeCall) -> None:
        scratch = torch.empty(100, dtype=torch.float32)
        stream.note(KERNEL, 3, 2, (call.q.data_ptr(), 7))
        stream.note(KERNEL, 4, 1, (scratch.data_ptr(), 8))
        stream.note(KERNEL, 4, 1, (scratch.data_ptr() + 16, 8))
        stream.note(KERNEL, 5, 1, (0, 9))

    assert noted(gpu, run, args, call) is not None
    first, start, inside, last = gpu.driver.launched
    assert first.grid == (3, 2, 1) and first.attributes == {COOPERATIVE: 1}
    assert first.params == [struct.pack("<Q", call.q.data_ptr()), struct.pack("<i", 7), bytes(8), bytes(8)]
    assert int.from_bytes(inside.params[0], "little") == int.from_bytes(start.params[0], "little") + 16
    assert last.params[0] == bytes(8)


def test_memory_of_a_stream_is_that_of_the_stream_it_is_repeated_on(gpu: FakeGpu) -> None:
    args, call = simple_call()
    memory: dict[int, int] = {STREAM + 1: 0x7000}

    def run(stream: Any, call: DecodeCall) -> None:
        stream.note(KERNEL, 3, 1, (stream.memory_of_stream(memory), 7))

    assert noted(gpu, run, args, call) is None, "the stream has no memory yet"
    assert len(gpu.table) == 1
    memory[STREAM] = 0x9000
    assert gpu.table.run(*args) is not None
    gpu.driver.capturing = 1
    assert gpu.table.run(*args) is None, "a graph has memory of its own"
    gpu.driver.capturing = 0
    assert gpu.table.run(*args) is not None
    assert [told.params[0] for told in gpu.driver.launched] == [struct.pack("<Q", 0x9000)] * 2


def test_memory_of_several_kinds_by_stream_is_not_repeated(gpu: FakeGpu) -> None:
    args, call = simple_call()
    one: dict[int, int] = {STREAM: 0x7000}

    def run(stream: Any, call: DecodeCall) -> None:
        for memory in (one, dict(one)):
            stream.note(KERNEL, 3, 1, (stream.memory_of_stream(memory), 7))

    assert noted(gpu, run, args, call) is None
    assert len(gpu.table) == 0


def does_more(what: str) -> Callable[[Any, DecodeCall], None]:
    kept = torch.empty(4)

    def run(stream: Any, call: DecodeCall) -> None:
        if what == "an operation":
            call.out.zero_()
        if what == "zeros":
            torch.zeros(3)
        pointer = {"its own memory": kept.data_ptr(), "the middle of an argument": call.q.data_ptr() + 4}.get(what, call.q.data_ptr())
        kernel = {"Triton's launch": None, "odd parameters": KERNEL._replace(parameters=("fp16", "i32"))}.get(what, KERNEL)
        if what != "no launch":
            stream.note(kernel, 0 if what == "an empty grid" else 3, 1, (pointer, 7))

    return run


@pytest.mark.parametrize(
    "what",
    [
        "an operation",
        "zeros",
        "its own memory",
        "the middle of an argument",
        "Triton's launch",
        "odd parameters",
        "no launch",
        "an empty grid",
    ],
)
def test_a_runner_that_does_more_is_not(what: str, gpu: FakeGpu) -> None:
    args, call = simple_call()
    assert noted(gpu, does_more(what), args, call) is None
    assert len(gpu.table) == 0


def test_two_tensors_at_one_address_are_a_kind_of_their_own(gpu: FakeGpu) -> None:
    call = tensors()
    shared = call | {"v_cache": call["k_cache"]}
    gpu.settle(**shared)
    gpu.decode(**shared)
    assert gpu.driver.launched and not gpu.longer
    gpu.driver.launched.clear()
    gpu.decode(**call)
    assert gpu.longer and not gpu.driver.launched


def test_an_argument_at_a_results_address_is_not_told_apart(gpu: FakeGpu) -> None:
    args, call = simple_call()
    call = call._replace(out=call.q)

    def run(stream: Any, call: DecodeCall) -> None:
        stream.note(KERNEL, 3, 1, (call.q.data_ptr(), 7))

    assert noted(gpu, run, (args[0].view(4), *args[1:]), call) is None


def test_views_are_no_operations(gpu: FakeGpu) -> None:
    args, call = simple_call()

    def run(stream: Any, call: DecodeCall) -> None:
        stream.note(KERNEL, 3, 1, (call.q.view(2, 2).transpose(0, 1).data_ptr(), 7))

    assert noted(gpu, run, args, call) is not None


def test_a_tensor_map_follows_its_tensor(gpu: FakeGpu) -> None:
    """Its 128 bytes are kept, but for the address, which the driver writes."""

    class TensorMap(ctypes.Structure):
        """Ends with its map, as Triton's object does."""

        _fields_ = (("map", ctypes.c_char * 128),)

    made = (bytes(range(100, 228)), 6, 5, 64, 1)
    kernel = Kernel(0xF00, 128, 0, False, False, ("i32", Described(2, lambda tensor: made), "*fp32"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashtile.kernels.block._bytes_of", lambda tensor_map: tensor_map)
        args, call = simple_call()
        gpu.driver.sizes[kernel.function] = sizes_of(kernel)
        for _ in range(RECORDED_CALL):
            gpu.replays.note(lambda stream, call: stream.note(kernel, 1, 1, (3, call.k_cache, call.q.data_ptr())), 0, args, call)
    others = tuple(torch.empty(4) for _ in range(4))
    gpu.table.run(*others)
    (told,) = gpu.driver.launched
    number, tensor_map, *sizes = told.params[:6]
    assert gpu.driver.moved == [(0, others[1].data_ptr())]
    assert tensor_map == struct.pack("<Q", others[1].data_ptr()) + made[0][8:]
    assert (number, *sizes) == tuple(struct.pack(form, value) for form, value in zip("iiiqq", (3, 6, 5, 64, 1)))
    assert told.params[6] == struct.pack("<Q", others[0].data_ptr())


@pytest.mark.parametrize("stored", [None, torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("splits", [1, 4])
def test_the_kernel_with_tensor_maps_is_repeated(splits: int, stored: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over codes of one byte too, whose scales lie elsewhere each time."""
    gluon = pytest.importorskip("flashtile.kernels.gluon.decode_sm90")
    gpu = FakeGpu(monkeypatch)
    monkeypatch.setattr(ops, "kernel_module", lambda plan: gluon)
    monkeypatch.setattr(spec, "encoded", lambda meta, tensor: (bytes(128), *tensor.shape, *tensor.stride()))
    monkeypatch.setattr("flashtile.kernels.block._bytes_of", lambda tensor_map: tensor_map)
    call = tensors(4096)
    if stored is not None:
        call |= {name: torch.empty(call[name].shape, dtype=stored) for name in ("k_cache", "v_cache")}
        call |= {name: torch.ones(1) for name in ("k_scale", "v_scale")}
    gpu.settle(num_splits=splits, **call)
    others = {name: tensor.clone() for name, tensor in call.items()}
    gpu.decode(num_splits=splits, **others)
    assert not gpu.longer
    assert len(gpu.driver.launched) == (1 if splits == 1 else 2)
    assert [address for _, address in gpu.driver.moved] == [others["k_cache"].data_ptr(), others["v_cache"].data_ptr()]
    told = gpu.driver.launched[0].params
    assert all(struct.pack("<Q", others[name].data_ptr()) in told for name in ("k_scale", "v_scale") if name in others)


def test_tritons_object_for_a_tensor_map_ends_with_it() -> None:
    """Its bytes are read from there."""
    (folder,) = triton.backends.nvidia.__path__
    source = (Path(folder) / "driver.c").read_text()
    declared = source[: source.index("PyCUtensorMapObject;")].rsplit("typedef struct {", 1)[1]
    head, tensor_map, end = (line.strip() for line in declared.strip().splitlines())
    assert head == "PyObject_HEAD;"
    assert re.fullmatch(r"_Alignas\((128|alignof\(CUtensorMap\))\) CUtensorMap tensorMap;", tensor_map)
    assert end == "}"


def test_a_runner_without_a_table_runs_and_notes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "cuda_replays", lambda operation: None)
    runner = DeviceRunner.__new__(DeviceRunner)
    runner._run, runner._index, ran = (lambda stream, call: ran.append(stream)), 0, []
    runner._current_device, runner._current_stream = (lambda: 0), (lambda index: STREAM)
    args, call = simple_call()
    runner(call)
    assert ran == [STREAM]
    assert runner.note(args, call) is None
