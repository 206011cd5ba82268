"""The C module beside this one: built at first use, with the compiler that Triton needs anyway, and joined to the driver.

What the module does stands at the top of ``replay.c``. It includes nothing but Python's headers and the ``cuda.h`` that
Triton ships, and it links nothing: the driver's functions are looked up here and passed as addresses.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.backends import nvidia
from triton.runtime.build import compile_module_from_src

from flashtile.planner.plans import DecodePlan, ForwardPlan

_SOURCE = Path(__file__).with_name("replay.c")
_TENSORS = (torch.Tensor, torch.nn.Parameter)  # exactly these: a subclass may mean something of its own by every operation
_CONSTANTS = (torch.dtype, DecodePlan, ForwardPlan)


class Driver(NamedTuple):
    """Addresses of the driver's functions."""

    launch: int  # cuLaunchKernelEx
    replace_address: int  # cuTensorMapReplaceAddress, or 0
    error_name: int  # cuGetErrorName
    is_capturing: int  # cuStreamIsCapturing

    @classmethod
    def of_this_machine(cls) -> Driver:
        """Raises OSError or AttributeError where there is no driver, or an old one."""
        library = ctypes.CDLL("libcuda.so.1")
        names = ("cuLaunchKernelEx", "cuTensorMapReplaceAddress", "cuGetErrorName", "cuStreamIsCapturing")
        return cls(*(ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in names))


@functools.lru_cache(maxsize=1)
def module() -> ModuleType:
    """The compiled module. Raises RuntimeError, OSError, ImportError or CalledProcessError where it cannot be built."""
    headers = [str(Path(path) / "include") for path in nvidia.__path__]
    built: ModuleType = compile_module_from_src(src=_SOURCE.read_text(), name="flashtile_replay", include_dirs=headers)
    return built


def table(driver: Driver, current_device: Callable[[], int], current_stream: Callable[[int], int], listeners: Sequence[list[Any]]) -> Any:
    """An empty table of recorded calls; while a list of ``listeners`` holds something, it repeats none."""
    exchange = torch.Tensor.__dlpack_c_exchange_api__
    return module().Table(exchange, _TENSORS, _CONSTANTS, tuple(listeners), torch.empty_like, current_device, current_stream, driver)


def cuda_table() -> Any | None:
    """An empty table of calls on GPUs, or None where the C module or the driver's functions cannot be had."""
    listeners = [getattr(hook, "calls", None) for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)]
    if not all(isinstance(calls, list) for calls in listeners):
        return None
    try:
        return table(Driver.of_this_machine(), torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream, listeners)  # type: ignore[arg-type]
    except (AttributeError, ImportError, OSError, RuntimeError, ValueError, subprocess.CalledProcessError):
        return None  # every call takes the longer way, which asks for none of this
