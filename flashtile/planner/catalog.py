"""The catalog: every kernel there is, in order of preference, and what each can run. Facts alone; nothing is imported."""

from __future__ import annotations

from dataclasses import dataclass

from flashtile.errors import ArgumentError, message
from flashtile.planner.device import Device
from flashtile.problem import MAX_HEAD_DIM, Problem


@dataclass(frozen=True)
class Kernel:
    """One row: the name that plans carry, the module that is imported at launch, and its limits, each stated once."""

    name: str
    module: str
    operation: str
    backends: tuple[str, ...]
    dtypes: tuple[str, ...]
    max_head_dim: int = MAX_HEAD_DIM
    head_dim_multiple: int = 8
    kv_scales: tuple[str, ...] = ("none",)

    def reasons_against(self, problem: Problem, device: Device) -> list[str]:
        """Why this kernel cannot run the problem on the device: empty where it can."""
        reasons = []
        if problem.operation != self.operation:
            reasons.append(f"it computes {self.operation}, not {problem.operation}")
        if device.backend not in self.backends:
            reasons.append(f"it runs on {' and '.join(self.backends)} devices, and {device.name} is a {device.backend} device")
        for name in ("dtype_q", "dtype_k", "dtype_v", "dtype_out"):
            if getattr(problem, name) not in self.dtypes:
                reasons.append(f"{name} {getattr(problem, name)} is none of {', '.join(self.dtypes)}")
        if not problem.dtype_q == problem.dtype_k == problem.dtype_v:
            reasons.append(f"q, k and v have different dtypes: {problem.dtype_q}, {problem.dtype_k} and {problem.dtype_v}")
        for name in ("head_dim", "head_dim_v"):
            dim = getattr(problem, name)
            if dim > self.max_head_dim or dim % self.head_dim_multiple:
                reasons.append(f"{name} {dim} is not a multiple of {self.head_dim_multiple} up to {self.max_head_dim}")
        if problem.kv_scales not in self.kv_scales:
            reasons.append(f"scales a {problem.kv_scales} are none of {', '.join(self.kv_scales)}")
        return reasons


_FLOATS = ("float16", "bfloat16", "float32")

CATALOG: tuple[Kernel, ...] = (
    Kernel("triton.decode", "flashtile.kernels.decode", "decode", ("cuda", "hip"), _FLOATS),
    Kernel("cpu.decode", "flashtile.kernels.cpu", "decode", ("cpu",), _FLOATS),
)


def kernel_named(name: str) -> Kernel:
    """The row of that name."""
    for kernel in CATALOG:
        if kernel.name == name:
            return kernel
    names = ", ".join(kernel.name for kernel in CATALOG)
    raise ArgumentError(message("kernel", f"one of {names}", repr(name), "A plan carries its kernel's name."))


def module_of(name: str) -> str:
    """The module to import for the kernel of that name."""
    return kernel_named(name).module
