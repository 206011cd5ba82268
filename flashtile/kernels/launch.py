"""How a kernel is compiled for its device and launched cheaply: what every kernel's module takes from here.

``spec.py`` describes kernels. They are compiled here, each once a process; a launch then costs one call into Triton's C launcher, with
pointers as plain ints (``direct.py``).
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import InterpretedFunction

from flashtile.errors import ToolchainError, UnsupportedError
from flashtile.kernels.call import DecodeCall
from flashtile.kernels.cubin import stack_bytes
from flashtile.kernels.direct import kernel_of, raw_launch
from flashtile.kernels.replay import DeviceRunner, cuda_replays
from flashtile.kernels.spec import TRITON_DTYPES, Arg, Descriptor, Spec

__all__ = [
    "TRITON_DTYPES",
    "Arg",
    "Descriptor",
    "Launch",
    "Spec",
    "c_compiler",
    "compilations",
    "compile_spec",
    "interpreted",
    "launcher",
    "on_device",
    "pointer_of",
    "workspace",
]

_MAX_REGISTERS = 255  # a thread of NVIDIA's
_REGISTERS_A_BLOCK = 65536


class Launch(NamedTuple):
    """``run(grid_x, grid_y, stream, *args)``: pointers and numbers, nested as the kernel's views are, then ``constants``."""

    run: Callable[..., None]
    constants: tuple[Any, ...]


_COMPILED: dict[Any, Launch] = {}
_COMPILING = threading.RLock()
_compilations = 0


def compilations() -> int:
    """Kernels compiled (or read from Triton's disk cache) for launching in this process so far."""
    return _compilations


def interpreted(kernel: Any) -> bool:
    """Whether Triton's interpreter runs the kernel (TRITON_INTERPRET=1 when it was defined)."""
    return isinstance(kernel, InterpretedFunction)


def compile_spec(spec: Spec, target: GPUTarget) -> Any:
    """The compiled kernel for any target; needs no GPU.

    NVIDIA's assembler sometimes spills a few registers to fit one more program on an SM, with many registers left. Then
    it is told to use them all.
    """
    options = dict(spec.options)
    compiled = triton.compile(spec.source(), target=target, options=options)
    shares_out = compiled.metadata.num_warps != options["num_warps"]  # its warps take what registers they need from each other
    if target.backend != "cuda" or shares_out or not stack_bytes(compiled.asm["cubin"]):
        return compiled
    most = min(_MAX_REGISTERS, _REGISTERS_A_BLOCK // (32 * options["num_warps"]))
    freed = triton.compile(spec.source(), target=target, options={**options, "maxnreg": most})
    return min(compiled, freed, key=lambda kernel: stack_bytes(kernel.asm["cubin"]))


def launcher(spec: Spec, device: torch.device) -> Launch:
    """A launch function for ``spec`` on ``device``: compiled once a process, thread-safe."""
    key = (device, spec.key())
    with _COMPILING:
        if key not in _COMPILED:
            run = _interpreter_launch(spec) if interpreted(spec.kernel) else _compiled_launch(spec, device)
            _COMPILED[key] = Launch(run, tuple(spec.constants[name] for name in spec.kernel.arg_names if name in spec.constants))
        return _COMPILED[key]


def pointer_of(kernel: Any) -> Callable[[torch.Tensor], Any]:
    """How a tensor is passed: by address, or as itself to the interpreter."""
    return _as_bytes if interpreted(kernel) else torch.Tensor.data_ptr


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as the interpreter is given it: codes of float8 as bytes, as TRITON_DTYPES has them."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def on_device(run: Callable[[int, Any], None], device: torch.device) -> Callable[[Any], None]:
    """Runs ``run(stream, call)`` with ``device`` current, on its current stream (0 where the interpreter runs on a CPU)."""
    if device.type != "cuda":
        return functools.partial(run, 0)
    return DeviceRunner(run, torch.cuda.current_device() if device.index is None else device.index)


def workspace(num_floats: int, device: torch.device) -> torch.Tensor:
    """Float32 scratch for one call, from torch's allocator.

    Not kept: torch orders the memory of a stream, gives a CUDA graph its own, and counts what lives in a graph's pool. A
    buffer of ours that outlived a call would break the last two under torch.compile's graphs, for 1 us of host time.
    """
    return torch.empty(num_floats, dtype=torch.float32, device=device)


def _compiled_launch(spec: Spec, device: torch.device) -> Callable[..., None]:
    global _compilations
    with torch.cuda.device(device):
        try:
            target = triton.runtime.driver.active.get_current_target()  # builds Triton's driver module at first use
            compiled = compile_spec(spec, target)
            run = compiled.run  # builds the launcher, and loads the binary on the current device
        except triton.runtime.errors.OutOfResources as error:
            raise UnsupportedError(
                f"{spec.kernel.__name__} does not fit {torch.cuda.get_device_name(device)}: {error}. Choose a smaller tile."
            ) from error
        except (RuntimeError, FileNotFoundError, subprocess.CalledProcessError) as error:
            if isinstance(error, RuntimeError) and c_compiler():
                raise
            raise _without_toolchain(error) from error
    _compilations += 1
    cuda_replays(DecodeCall)  # what repeats calls is built with the first kernel, so that warmup builds it too
    return raw_launch(compiled, run, target, spec.descriptors(), kernel_of(compiled, run, spec))


def _interpreter_launch(spec: Spec) -> Callable[..., None]:
    views = [spec.args.get(name) for name in spec.kernel.arg_names]

    def launch(grid_x: int, grid_y: int, stream: int, *args: Any) -> None:
        given = [type(view)(*value) if isinstance(view, tuple) else value for view, value in zip(views, args, strict=True)]
        spec.kernel[(grid_x, grid_y)](*given)

    return launch


def _without_toolchain(error: Exception) -> ToolchainError:
    """Triton builds its driver module, and before 3.7 a launcher for each kernel, with a C compiler at first use."""
    if c_compiler():
        found = f"one that failed ({error})"
        fix = "Install Python's headers (for example apt install python3-dev)."
    else:
        found = "none"
        fix = "Install one (for example apt install gcc), or set the environment variable CC."
    return ToolchainError(f"C compiler: expected gcc or clang on PATH, with which Triton builds what launches kernels, got {found}. {fix}")


def c_compiler() -> str | None:
    """The C compiler that Triton will use, if there is one."""
    configured: str | None = knobs.build.cc
    names = (configured,) if configured else ("gcc", "clang")
    return next((path for name in names if (path := shutil.which(name))), None)
