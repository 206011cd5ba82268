"""A kernel that is described but never compiled, and a compiled one that only notes how it is launched."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from flashtile.kernels import direct
from flashtile.kernels.spec import Arg, Spec

SM90 = GPUTarget("cuda", 90, 32)


class View(NamedTuple):
    ptr: Any
    stride: Any


class Outer(NamedTuple):
    view: Any
    number: Any


def device_function(x, y, n, SIZE):  # type: ignore[no-untyped-def]
    """Stands for a kernel: three run-time parameters and a constant."""


KERNEL = JITFunction(device_function)


def spec_of(**changes: Any) -> Spec:
    args = {"x": View(Arg("*bf16", 16), Arg("i64", 8)), "y": Outer(View(None, Arg("i32")), None), "n": Arg("i32")}
    return Spec(KERNEL, args | changes, {"SIZE": 64}, {"num_warps": 4})


class FakeKernel:
    """A compiled kernel that notes how it is launched: ("direct" or "triton", arguments)."""

    function = 1234
    packed_metadata = (4, 1, 0)
    metadata = SimpleNamespace(target=GPUTarget("hip", "gfx942", 64))

    def __init__(self, **attributes: Any) -> None:
        self.calls: list[tuple[str, Any]] = []
        known = {"launch_cooperative_grid": False, "launch_pdl": True, "arg_annotations": "annotations", "kernel_signature": b"signature"}
        self.run = SimpleNamespace(launch=lambda *args: self.calls.append(("direct", args)), **(known | attributes))

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *args, stream: self.calls.append(("triton", (grid, stream, args)))

    def launched(self, target: GPUTarget = SM90) -> list[tuple[str, Any]]:
        direct.raw_launch(self, self.run, target)(7, 3, 99, (10, 20), None, 5)
        return self.calls
