"""Calls repeated by the C module: what it passes to a driver that only takes notes, and when it stays out of the way.

Tensors lie on the CPU here. The module does not care: it reads them through DLPack and hands addresses on.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from flashtile.kernels.call import DecodeCall
from flashtile.planner.after_append import append_programs
from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem
from flashtile.testing.append_cases import AppendCase
from flashtile.testing.cases import QUANTISED_CASES, SMALL_CASES, Case
from flashtile.testing.forward_cases import FORWARD_CASES, ForwardCase
from flashtile.testing.forward_inputs import make_forward_inputs
from flashtile.testing.inputs import make_inputs

pytest.importorskip("triton")
import triton

from flashtile.checking import checked
from flashtile.facts import rounded_hint
from flashtile.kernels import append, decode, forward, launch, native, replay
from flashtile.kernels.block import Block, Described, Kernel, NotReplayable, block_of, sizes_of
from flashtile.kernels.launch import Arg, Descriptor, Launch, Spec
from flashtile.kernels.replay import RECORDED_CALL, DeviceRunner, Recorder, Replays
from flashtile.ops import append as append_ops
from flashtile.ops import decode as ops
from flashtile.ops import forward as forward_ops

pytestmark = pytest.mark.skipif(launch.c_compiler() is None, reason="the module is C")

CPU = torch.device("cpu")
STREAM = 0x5EED
PDL, COOPERATIVE = 6, 2  # CUlaunchAttributeID


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p), ("num_attributes", ctypes.c_uint),
    )  # fmt: skip


class Launched(NamedTuple):
    """What the driver was told."""

    function: int
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    shared: int
    stream: int
    attributes: dict[int, int]
    params: list[bytes]


class FakeDriver:
    """A driver that notes launches down. ``sizes`` are the bytes of each parameter, by function."""

    def __init__(self) -> None:
        self.launched: list[Launched] = []
        self.moved: list[tuple[int, int]] = []  # tensor maps: (address of the map modulo 64, new address)
        self.sizes: dict[int, list[int]] = {}
        self.results: list[int] = []  # of the next launches, then 0
        self.capturing = 0  # CUstreamCaptureStatus of every stream
        self.device = 0
        pointer = ctypes.c_void_p
        self._functions = (
            ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Config), pointer, ctypes.POINTER(pointer), pointer)(self._launch),
            ctypes.CFUNCTYPE(ctypes.c_int, pointer, pointer)(self._move),
            ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_char_p))(self._name),
            ctypes.CFUNCTYPE(ctypes.c_int, pointer, ctypes.POINTER(ctypes.c_int))(self._is_capturing),
        )
        self.addresses = native.Driver(*(ctypes.cast(function, pointer).value or 0 for function in self._functions))

    def _launch(self, config: Any, function: int, params: Any, extra: int | None) -> int:
        told = config.contents
        attributes = {}
        for i in range(told.num_attributes):
            kind, value = struct.unpack("<I4xI", ctypes.string_at(told.attributes + 72 * i, 12))
            attributes[kind] = value
        values = [ctypes.string_at(params[i], size) for i, size in enumerate(self.sizes[function])]
        self.launched.append(Launched(function, tuple(told.grid), tuple(told.block), told.shared, told.stream or 0, attributes, values))
        return self.results.pop(0) if self.results else 0

    def _move(self, tensor_map: int, address: int) -> int:
        self.moved.append((tensor_map % 64, address))
        ctypes.memmove(tensor_map, struct.pack("<Q", address), 8)
        return 0

    def _is_capturing(self, stream: int, status: Any) -> int:
        status[0] = self.capturing
        return 0

    def _name(self, code: int, name: Any) -> int:
        name[0] = {700: b"CUDA_ERROR_ILLEGAL_ADDRESS"}.get(code, b"CUDA_ERROR_OF_SOME_KIND")
        return 0


class FakeGpu:
    """The real host code of decode and forward calls on CPU tensors: what kernels were launched the longer way, and what by replay."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.driver = FakeDriver()
        self.listeners: list[list[Any]] = [[], []]
        self.table = native.table(self.driver.addresses, lambda: self.driver.device, lambda index: STREAM + index, self.listeners)
        self.replays = Replays(self.table)
        self.longer: list[tuple[Kernel, int, int, Block]] = []
        self._functions: dict[Any, int] = {}
        monkeypatch.setattr(replay, "cuda_replays", lambda operation: self.replays)
        for operation, kernel in ((ops, decode), (forward_ops, forward)):
            monkeypatch.setattr(operation, "_repeat", None)
            monkeypatch.setattr(operation, "_PREPARED", {})
            monkeypatch.setattr(operation, "kernel_module", lambda plan, kernel=kernel: kernel)
            # a GPU's runner is not wrapped
            monkeypatch.setattr(operation, "bound", lambda module, problem, plan, device: module.bind(problem, plan, device))
        monkeypatch.setattr(ops.Device, "of", lambda device: Device.named("h200"))
        monkeypatch.setattr(append_ops, "_repeat", None)
        monkeypatch.setattr(append_ops, "_module_for", lambda device: append)
        append._runner.cache_clear()  # runners that another test's launcher has bound
        for module in [m for name, m in sys.modules.items() if name.startswith("flashtile.kernels.")]:
            if module is not launch and hasattr(module, "launcher"):
                monkeypatch.setattr(module, "launcher", self._launcher)
            if module is not launch and hasattr(module, "on_device"):
                monkeypatch.setattr(module, "on_device", lambda run, device: self._runner(run))
            if module is not launch and hasattr(module, "pointer_of"):
                monkeypatch.setattr(module, "pointer_of", lambda kernel: torch.Tensor.data_ptr)

    def _runner(self, run: Any) -> DeviceRunner:
        runner = DeviceRunner.__new__(DeviceRunner)
        runner._run, runner._index = run, 0
        runner._current_device, runner._current_stream = lambda: self.driver.device, lambda index: STREAM + index
        return runner

    def _launcher(self, spec: Spec, device: torch.device) -> Launch:
        kind = (spec.kernel.__name__, *spec.key()[1:])  # a Gluon kernel has no hash beside interpreted functions
        function = self._functions.setdefault(kind, 0xF00 + len(self._functions))
        metas = [None] * len(spec.descriptors())
        options = spec.options
        kernel = Kernel(function, 32 * options["num_warps"], 1024, bool(options.get("launch_pdl")), False, spec.parameters(metas))
        self.driver.sizes[function] = sizes_of(kernel)

        def run(grid_x: int, grid_y: int, stream: Any, *args: Any) -> None:
            if stream.__class__ is Recorder:
                stream.note(kernel, grid_x, grid_y, args)
            else:
                assert stream == STREAM
                self.longer.append((kernel, grid_x, grid_y, block_of(kernel, args)))

        return Launch(run, tuple(spec.constants[name] for name in spec.kernel.arg_names if name in spec.constants))

    def decode(self, want_lse: bool = False, **given: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One call of ops.decode by names."""
        return self._call(ops.decode, want_lse, {"causal": True} | given)

    def forward(self, want_lse: bool = False, **given: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One call of ops.forward by names."""
        return self._call(forward_ops.forward, want_lse, {"causal": False, "dropout_p": 0.0} | given)

    def append(self, want_lse: bool = False, **given: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One call of ops.append by names."""
        return self._call(append_ops.append, want_lse, {"rotary_interleaved": False, "queries_advance": True} | given)

    @staticmethod
    def _call(function: Any, want_lse: bool, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        defaults: dict[str, Any] = dict.fromkeys(names)
        defaults |= {"softcap": 0.0, "allow_tf32": False, "after_append": False}
        given |= {"want_lse": want_lse}
        return function(**{name: value for name, value in (defaults | given).items() if name in names})

    def settle(self, operation: Callable[..., Any] | None = None, **given: Any) -> None:
        """Calls until nothing is recorded any more, and forgets what was launched."""
        for _ in range(RECORDED_CALL):
            (operation or self.decode)(**given)
        self.longer.clear()
        self.driver.launched.clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    return FakeGpu(monkeypatch)


def tensors(seqlen: int = 512, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {
        "q": torch.empty(batch, 1, 32, 128, dtype=dtype),
        "k_cache": torch.empty(batch, seqlen, 8, 128, dtype=dtype),
        "v_cache": torch.empty(batch, seqlen, 8, 128, dtype=dtype),
        "seqlens_k": torch.full((batch,), seqlen, dtype=torch.int32),
    }


def values_of(kernel: Kernel, block: Block) -> list[bytes]:
    return [block.bytes[offset : offset + size] for offset, size in zip(block.offsets, sizes_of(kernel), strict=True)]


def comparable(params: list[bytes], names: dict[int, str]) -> list[bytes | tuple[str, bytes]]:
    """Parameters, with the addresses of known tensors replaced by names; what else could be an address is left as it is."""
    found: list[bytes | tuple[str, bytes]] = []
    for value in params:
        (number,) = struct.unpack_from("<Q", value) if len(value) in (8, 128) else (0,)  # a tensor map begins with its address here
        found.append((names[number], value[8:]) if number in names else value)
    return found


def names_of(call: dict[str, Any], out: torch.Tensor, lse: torch.Tensor | None) -> dict[int, str]:
    known = call | {"out": out, "lse": lse}
    return {tensor.data_ptr(): name for name, tensor in known.items() if isinstance(tensor, torch.Tensor) and tensor.data_ptr()}


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


@pytest.mark.parametrize(
    "case",
    [AppendCase(), AppendCase(pairs=None), AppendCase(queries=0), AppendCase(page_size=8), AppendCase(own_positions=True),
     AppendCase(new=(2, 0, 9), queries=(2, 0, 4))],
    ids=("plain", "not turned", "no queries", "pages", "own positions", "packed"),
)  # fmt: skip
def test_a_repeated_append_launches_what_the_longer_way_launches(case: AppendCase, gpu: FakeGpu) -> None:
    gpu.settle(gpu.append, **case.arguments())
    second = case.arguments(seed=1)
    seqlens, q = gpu.append(**second)
    (told,) = gpu.driver.launched
    assert not gpu.longer
    gpu.table.clear()
    longer_seqlens, longer_q = gpu.append(**second)
    ((kernel, grid_x, grid_y, block),) = gpu.longer
    assert told[:5] == (kernel.function, (grid_x, grid_y, 1), (kernel.threads, 1, 1), kernel.shared, STREAM)
    mine = comparable(told.params, names_of(second, seqlens, q))
    assert mine == comparable(values_of(kernel, block), names_of(second, longer_seqlens, longer_q))
    assert seqlens.shape == longer_seqlens.shape and seqlens.dtype == torch.int32 and (q is None) == (longer_q is None)
    assert q is None or longer_q is None or (q.shape, q.stride(), q.dtype) == (longer_q.shape, longer_q.stride(), longer_q.dtype)


def test_a_call_after_an_append_takes_its_place_early(gpu: FakeGpu) -> None:
    given = tensors()
    gpu.settle(after_append=True, num_splits=4, **given)
    gpu.decode(after_append=True, num_splits=4, **given)
    assert [told.attributes for told in gpu.driver.launched] == [{PDL: 1}, {PDL: 1}]
    gpu.settle(num_splits=4, **given)
    gpu.decode(num_splits=4, **given)
    assert [told.attributes for told in gpu.driver.launched] == [{}, {PDL: 1}]


def test_a_long_call_that_would_be_spread_unevenly_waits_for_the_append_to_end(gpu: FakeGpu) -> None:
    """As does one whose plan is given."""
    given = tensors(4096, batch=32)
    plan = plan_decode(Problem.decode(**given), Device.named("h200"))
    for wish in (None, plan):
        gpu.settle(after_append=True, plan=wish, **given)
        gpu.decode(after_append=True, plan=wish, **given)
        assert gpu.driver.launched[0].attributes == {}


@pytest.mark.parametrize(("batch", "tokens", "head_dim"), [(1, 1, 128), (3, 1, 128), (2, 4, 128), (2, 5, 96), (1, 3, 256)])
def test_the_planner_counts_an_appends_programs(batch: int, tokens: int, head_dim: int, gpu: FakeGpu) -> None:
    q, new, cache = (torch.empty(batch, count, heads, head_dim) for count, heads in ((tokens, 32), (tokens, 8), (64, 8)))
    table, lengths = torch.empty(64, 16), torch.zeros(batch, dtype=torch.int32)
    gpu.append(k_cache=cache, v_cache=cache.clone(), k=new, v=new, seqlens_k=lengths, q=q, rotary_cos=table, rotary_sin=table)
    ((_, programs, _, _),) = gpu.longer
    assert append_programs(Problem.decode(q, cache, cache, lengths)) == programs


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
    monkeypatch.setattr(
        launch, "_encoded", lambda meta, tensor: (struct.pack("<Q120x", tensor.data_ptr()), *tensor.shape, *tensor.stride())
    )
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
    (told,) = gpu.driver.launched
    assert struct.pack("<Q", out.data_ptr()) in told.params


def test_out_is_contiguous_though_q_is_not(gpu: FakeGpu) -> None:
    call = tensors(batch=2)
    call["q"] = torch.empty(32, 1, 2, 128, dtype=torch.bfloat16).transpose(0, 2)
    for _ in range(RECORDED_CALL + 1):
        out, _ = gpu.decode(**call)
        assert out.is_contiguous()
    assert gpu.driver.launched


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


@pytest.mark.parametrize("splits", [1, 4])
def test_the_kernel_with_tensor_maps_is_repeated(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gluon = pytest.importorskip("flashtile.kernels.gluon.decode_sm90")
    gpu = FakeGpu(monkeypatch)
    monkeypatch.setattr(ops, "kernel_module", lambda plan: gluon)
    monkeypatch.setattr(launch, "_encoded", lambda meta, tensor: (bytes(128), *tensor.shape, *tensor.stride()))
    monkeypatch.setattr("flashtile.kernels.block._bytes_of", lambda tensor_map: tensor_map)
    call = tensors(4096)
    gpu.settle(num_splits=splits, **call)
    others = {name: tensor.clone() for name, tensor in call.items()}
    gpu.decode(num_splits=splits, **others)
    assert not gpu.longer
    assert len(gpu.driver.launched) == (1 if splits == 1 else 2)
    assert [address for _, address in gpu.driver.moved] == [others["k_cache"].data_ptr(), others["v_cache"].data_ptr()]


def test_tritons_object_for_a_tensor_map_ends_with_it() -> None:
    """Its bytes are read from there."""
    (folder,) = triton.backends.nvidia.__path__
    source = (Path(folder) / "driver.c").read_text()
    declared = source[: source.index("PyCUtensorMapObject;")].rsplit("typedef struct {", 1)[1]
    head, tensor_map, end = (line.strip() for line in declared.strip().splitlines())
    assert head == "PyObject_HEAD;"
    assert re.fullmatch(r"_Alignas\((128|alignof\(CUtensorMap\))\) CUtensorMap tensorMap;", tensor_map)
    assert end == "}"


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


def test_a_runner_without_a_table_runs_and_notes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "cuda_replays", lambda operation: None)
    runner = DeviceRunner.__new__(DeviceRunner)
    runner._run, runner._index, ran = (lambda stream, call: ran.append(stream)), 0, []
    runner._current_device, runner._current_stream = (lambda: 0), (lambda index: STREAM)
    args, call = simple_call()
    runner(call)
    assert ran == [STREAM]
    assert runner.note(args, call) is None


class View(NamedTuple):
    ptr: Any
    stride: Any


def test_parameters_lie_at_their_own_alignment() -> None:
    kernel = Kernel(1, 32, 0, False, False, ("i32", View("*bf16", None), None, (("i64", "i8"), "fp32")))
    block = block_of(kernel, (5, (0x1000, None), 64, ((-2, 3), 1.5)))
    assert sizes_of(kernel) == [4, 8, 8, 1, 4, 8, 8]
    assert block.offsets == (0, 8, 16, 24, 28, 32, 40)
    assert block.pointers == ((8, 0x1000, False),)
    assert struct.unpack("<i4xQqb3xfQQ", block.bytes) == (5, 0x1000, -2, 3, 1.5, 0, 0)
    with pytest.raises(NotReplayable, match="fp16"):
        sizes_of(Kernel(1, 32, 0, False, False, ("fp16",)))


COMPILE = """
import json, sys
from triton.backends.compiler import GPUTarget
from flashtile.kernels import combine, decode, launch
from flashtile.kernels.block import Kernel, sizes_of
from flashtile.kernels.cubin import parameter_sizes
from flashtile.planner.after_append import append_programs
from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device
from flashtile.problem import Problem

problem = Problem.from_json(sys.argv[1])
plan = plan_decode(problem, Device.named("a100"), num_splits=2)
for spec in (decode.decode_spec(problem, plan), combine.combine_spec(problem, plan)):
    compiled = launch.compile_spec(spec, GPUTarget("cuda", 80, 32))
    print(json.dumps([parameter_sizes(compiled.asm["cubin"]), sizes_of(Kernel(1, 32, 0, False, False, spec.parameters(None)))]))
"""


@pytest.mark.parametrize("name", ["length_17_bf16", "everything"])
def test_the_compilers_binary_takes_the_parameters_that_we_pass(name: str) -> None:
    """Fails at a Triton that appends other parameters than the two scratch pointers, or drops or reorders any."""
    (case,) = (case for case in SMALL_CASES if case.name == name)
    problem = Problem.decode(**{name: value for name, value in make_inputs(case).args.items() if value is not None}, lse=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE, problem.to_json()], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    pairs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(pairs) == 2
    for in_binary, passed in pairs:
        assert in_binary == passed
        assert len(passed) > 10


def test_a_descriptor_is_a_map_with_shape_and_strides() -> None:
    class Anything(NamedTuple):
        arg_names: tuple[str, ...]

    spec = Spec(Anything(("x", "n", "SIZE")), {"x": Descriptor("bf16", (1, 64, 1, 64)), "n": Arg("i32")}, {"SIZE": 1}, {})
    described, number, constant = spec.parameters(["meta"])
    assert (described.rank, number, constant) == (4, "i32", None)
    assert sizes_of(Kernel(1, 32, 0, False, False, (described, number, constant))) == [128, 4, 4, 4, 4, 8, 8, 8, 8, 4, 8, 8]
