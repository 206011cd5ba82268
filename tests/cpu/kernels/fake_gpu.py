"""A driver that only takes notes, and the host code of calls that takes it for a GPU's."""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from flashtile.planner.device import Device

pytest.importorskip("triton")

from flashtile.kernels import append, decode, forward, launch, native, replay
from flashtile.kernels.block import Block, Kernel, block_of, sizes_of
from flashtile.kernels.launch import Launch, Spec
from flashtile.kernels.replay import RECORDED_CALL, DeviceRunner, Recorder, Replays
from flashtile.ops import append as append_ops
from flashtile.ops import decode as ops
from flashtile.ops import forward as forward_ops

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
