"""The catalog: every kernel there is, in order of preference, and what each can run. Facts alone; nothing is imported."""

from __future__ import annotations

from dataclasses import dataclass

from flashtile.errors import ArgumentError, message
from flashtile.planner.device import Device
from flashtile.problem import MAX_HEAD_DIM, QUANTISED, Problem


@dataclass(frozen=True)
class Kernel:
    """One row: the name that plans carry, the module that is imported at launch, and its limits, each stated once."""

    name: str
    module: str
    operation: str
    backends: tuple[str, ...]
    dtypes: tuple[str, ...]  # of q, and of k and v
    dtypes_out: tuple[str, ...]
    architectures: tuple[str, ...] = ()  # empty: every architecture of its backends
    min_alignment: int = 1  # bytes, of every address and stride
    max_head_dim: int = MAX_HEAD_DIM
    head_dim_multiple: int = 8
    quantised: bool = False  # whether k and v beside a 16-bit q may be stored in one byte, with scales,
    quantised_above: int = 0  # for head dims above this one
    pages: bool = True  # whether keys may lie on pages,
    shaped_scores: bool = True  # and scores pass through a softcap or get ALiBi biases
    dropout: bool = False  # and entries of the softmax may be dropped

    def reasons_against(self, problem: Problem, device: Device) -> list[str]:
        """Why this kernel cannot run the problem on the device: empty where it can."""
        reasons = []
        if problem.operation != self.operation:
            reasons.append(f"it computes {self.operation}, not {problem.operation}")
        if device.backend not in self.backends:
            reasons.append(f"it runs on {' and '.join(self.backends)} devices, and {device.name} is a {device.backend} device")
        elif self.architectures and device.arch not in self.architectures:
            reasons.append(f"it is made for {' and '.join(self.architectures)}, and {device.name} is {device.arch}")
        for name in ("dtype_q", "dtype_k", "dtype_v", "dtype_out"):
            able = self.dtypes_out if name == "dtype_out" else self.dtypes
            if self.quantised and name in ("dtype_k", "dtype_v"):
                able = (*able, *QUANTISED)
            if getattr(problem, name) not in able:
                reasons.append(f"{name} {getattr(problem, name)} is none of {', '.join(able)}")
        dequantises = self.quantised and problem.quantised and problem.dtype_q in _HALVES and problem.dtype_k == problem.dtype_v
        if not problem.dtype_q == problem.dtype_k == problem.dtype_v and not dequantises:
            reasons.append(f"q, k and v have different dtypes: {problem.dtype_q}, {problem.dtype_k} and {problem.dtype_v}")
        for name in ("head_dim", "head_dim_v"):
            dim = getattr(problem, name)
            if dim > self.max_head_dim or dim % self.head_dim_multiple:
                reasons.append(f"{name} {dim} is not a multiple of {self.head_dim_multiple} up to {self.max_head_dim}")
        if problem.alignment < self.min_alignment:
            reasons.append(
                f"addresses and strides of q, k, v or out are multiples of {problem.alignment} bytes, "
                f"and it needs multiples of {self.min_alignment}"
            )
        if dequantises and min(problem.head_dim, problem.head_dim_v) <= self.quantised_above:
            reasons.append(f"quantised keys and values have head dims above {self.quantised_above} there")
        scales = {problem.k_scales, problem.v_scales} - {"none"}
        if scales and not dequantises:
            reasons.append(f"scales a {' and a '.join(sorted(scales))} are for quantised keys and values")
        if problem.page_size and not self.pages:
            reasons.append(f"keys lie on pages of {problem.page_size}, which have no gradient")
        if not self.shaped_scores:
            reasons += [f"scores with {name} are not its" for name in ("softcap", "alibi") if getattr(problem, name)]
        if problem.dropout and not self.dropout:
            reasons.append("it drops no entries of the softmax, and the call has dropout")
        return reasons


GLUON_SM90 = "gluon.decode_sm90"
TRITON = "triton.decode"
CPU = "cpu.decode"
GLUON_FORWARD_SM90 = "gluon.forward_sm90"
TRITON_FORWARD = "triton.forward"
CPU_FORWARD = "cpu.forward"
GLUON_BACKWARD_SM90 = "gluon.backward_sm90"
TRITON_BACKWARD = "triton.backward"
CPU_BACKWARD = "cpu.backward"

_FLOATS = ("float16", "bfloat16", "float32")
_HALVES = ("float16", "bfloat16")

CATALOG: tuple[Kernel, ...] = (
    Kernel(
        GLUON_SM90, "flashtile.kernels.gluon.decode_sm90", "decode", ("cuda",), _HALVES, _FLOATS,
        architectures=("sm_90",),
        min_alignment=16,  # what tensor maps take
        quantised=True,
        quantised_above=16,
    ),
    Kernel(TRITON, "flashtile.kernels.decode", "decode", ("cuda", "hip"), _FLOATS, _FLOATS, quantised=True),
    Kernel(CPU, "flashtile.kernels.cpu", "decode", ("cpu",), _FLOATS, _FLOATS, quantised=True),
    Kernel(
        GLUON_FORWARD_SM90, "flashtile.kernels.gluon.forward_sm90", "forward", ("cuda",), _HALVES, _HALVES,
        architectures=("sm_90",),
        min_alignment=16,  # what tensor maps take
    ),
    Kernel(TRITON_FORWARD, "flashtile.kernels.forward", "forward", ("cuda", "hip"), _FLOATS, _FLOATS, dropout=True),
    Kernel(CPU_FORWARD, "flashtile.kernels.cpu_forward", "forward", ("cpu",), _FLOATS, _FLOATS, dropout=True),
    Kernel(
        GLUON_BACKWARD_SM90, "flashtile.kernels.gluon.backward_sm90", "backward", ("cuda",), _HALVES, _HALVES,
        architectures=("sm_90",),
        min_alignment=16,  # what tensor maps take
        pages=False,
        shaped_scores=False,
    ),
    Kernel(TRITON_BACKWARD, "flashtile.kernels.backward", "backward", ("cuda", "hip"), _FLOATS, _FLOATS, pages=False, dropout=True),
    Kernel(CPU_BACKWARD, "flashtile.kernels.cpu_backward", "backward", ("cpu",), _FLOATS, _FLOATS, pages=False, dropout=True),
)  # fmt: skip


def kernels_of(operation: str) -> tuple[Kernel, ...]:
    """The rows of one operation, in order of preference: no other row has a say in it."""
    return tuple(kernel for kernel in CATALOG if kernel.operation == operation)


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
