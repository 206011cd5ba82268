"""How a kernel is compiled and launched cheaply: the one place that knows Triton's internals.

A kernel is compiled from an explicit description of its arguments (``Arg`` trees), never from example tensors: what runs
on a GPU and what tests compile without one are the same binary, and nothing but the description decides how often it is
compiled. A launch then costs one call into Triton's C launcher, with pointers as plain ints.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import make_tensordesc_arg
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.runtime.interpreter import InterpretedFunction

from flashtile.errors import ToolchainError, UnsupportedError
from flashtile.kernels.block import Described, Kernel, NotReplayable, sizes_of
from flashtile.kernels.call import DecodeCall
from flashtile.kernels.cubin import parameter_sizes, stack_bytes
from flashtile.kernels.replay import DeviceRunner, Recorder, cuda_replays

_MAX_REGISTERS = 255  # a thread of NVIDIA's
_REGISTERS_A_BLOCK = 65536

GLUON_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "u16": "uint16", "i16": "int16"}
_CACHED_MAPS = 4096  # tensor maps of 128 bytes: an engine has two for each layer's cache
TRITON_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float8_e4m3fn": "u8", "int8": "i8"}
"""Codes of float8 are bytes to a kernel, which says itself what they mean: Triton would not let old GPUs hold them."""


class Launch(NamedTuple):
    """``run(grid_x, grid_y, stream, *args)``: pointers and numbers, nested as the kernel's views are, then ``constants``."""

    run: Callable[..., None]
    constants: tuple[Any, ...]


@dataclass(frozen=True)
class Arg:
    """One run-time argument: its Triton type ("*bf16", "i32", "i64", "fp32") and a power of two known to divide it."""

    type: str
    divisible: int = 1


@dataclass(frozen=True)
class Descriptor:
    """A tensor that a Gluon kernel reads by TMA, in boxes of ``box`` elements; the launch takes the tensor itself.

    Its base and strides are multiples of 16 bytes and its last dimension is contiguous. What a box reaches beyond the
    tensor's shape, in either direction, reads as zero.
    """

    dtype: str
    box: tuple[int, ...]

    @property
    def layout(self) -> NVMMASharedLayout:
        """How a box lies in shared memory."""
        return NVMMASharedLayout.get_default_for(list(self.box), getattr(gl, GLUON_DTYPES[self.dtype]))

    def signature(self) -> str:
        return f"tensordesc<{self.dtype}{list(self.box)},{self.layout!r}>"


@dataclass(frozen=True)
class Spec:
    """A kernel with everything that compilation depends on.

    ``args`` maps each parameter to an Arg, a Descriptor, None (compiled away), or a view (NamedTuple) of these;
    ``constants`` are the constexpr parameters; ``options`` are num_warps, num_stages and launch_pdl.
    """

    kernel: Any
    args: Mapping[str, Any]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]

    def key(self) -> Any:
        """Hashable: equal keys compile to the same binary."""
        return (self.kernel, tuple(self.args.items()), tuple(self.constants.items()), tuple(self.options.items()))

    def source(self) -> ASTSource:
        signature: dict[str, Any] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attrs: dict[tuple[int, ...], Any] = {}

        def visit(value: Any, path: tuple[int, ...]) -> Any:
            if isinstance(value, tuple):
                return type(value)(*(visit(field, (*path, i)) for i, field in enumerate(value)))
            if value is None:
                constants[path] = None
                return "constexpr"
            if isinstance(value, Descriptor):
                return value.signature()
            if value.divisible > 1:
                attrs[path] = [["tt.divisibility", value.divisible]]
            return value.type

        for position, name in enumerate(self.kernel.arg_names):
            if name in self.args:
                signature[name] = visit(self.args[name], (position,))
            else:
                signature[name] = "constexpr"
                constants[position,] = self.constants[name]
        source = GluonASTSource if self.kernel.is_gluon() else ASTSource
        return source(self.kernel, signature, constants, attrs)

    def descriptors(self) -> tuple[int, ...]:
        """Positions of the parameters that are tensor descriptors."""
        return tuple(i for i, name in enumerate(self.kernel.arg_names) if isinstance(self.args.get(name), Descriptor))

    def parameters(self, metas: Any) -> tuple[Any, ...]:
        """The run-time parameters as `block.Kernel` wants them; ``metas`` are what Triton says of each descriptor."""
        described = iter(metas or ())

        def visit(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(visit(field) for field in value)
            if isinstance(value, Descriptor):
                return Described(len(value.box), functools.partial(_encoded, next(described, None)))
            return None if value is None else value.type

        return tuple(visit(self.args.get(name)) for name in self.kernel.arg_names)


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
    return _raw_launch(compiled, run, target, spec.descriptors(), kernel_of(compiled, run, spec))


def kernel_of(compiled: Any, run: Any, spec: Spec) -> Kernel | None:
    """The kernel as the driver launches it; None where it needs more than that, or does not take what Triton was seen to pass."""
    try:
        metadata = compiled.metadata
        if metadata.target.backend != "cuda" or _scratch(run) or metadata.num_ctas != 1:
            return None
        kernel = Kernel(
            compiled.function, 32 * metadata.num_warps, metadata.shared, metadata.launch_pdl, metadata.launch_cooperative_grid,
            spec.parameters(getattr(metadata, "tensordesc_meta", None)),
        )  # fmt: skip
        return kernel if sizes_of(kernel) == parameter_sizes(compiled.asm["cubin"]) else None
    except (AttributeError, NotReplayable):  # a Triton that names its facts otherwise, or a type that is never passed so far
        return None


def _scratch(run: Any) -> int:
    """Bytes that Triton has to allocate for each launch."""
    return getattr(run, "global_scratch_size", 0) or getattr(run, "profile_scratch_size", 0)


def _raw_launch(
    compiled: Any, run: Any, target: GPUTarget, descriptors: tuple[int, ...] = (), kernel: Kernel | None = None
) -> Callable[..., None]:
    """The shortest way into the driver through a Triton that is known; ``compiled.run`` on any other.

    A profiler that listens to Triton's launch hooks is served by Triton's own, slower way. A Recorder that comes in the
    stream's place is told what would be launched.
    """
    function, metadata = compiled.function, compiled.packed_metadata
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    enter, leave = (getattr(hook, "calls", ()) for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook))

    def by_triton(grid_x: int, grid_y: int, stream: Any, *args: Any) -> None:
        if stream.__class__ is Recorder:
            return stream.note(kernel, grid_x, grid_y, args)
        described = (_described(arg) if i in descriptors else arg for i, arg in enumerate(args))
        compiled[grid_x, grid_y, 1](*described, stream=stream)

    if target.backend != "cuda" or _scratch(run) or not hasattr(run, "launch"):
        return by_triton
    raw, cooperative, pdl = run.launch, run.launch_cooperative_grid, run.launch_pdl
    mapped = None
    if descriptors:
        # Triton's launch encodes each tensor map anew; the C function that it wraps takes maps that are kept
        raw = dict(zip(raw.__code__.co_freevars, raw.__closure__, strict=True))["launcher"].cell_contents
        mapped = tensor_maps(compiled.metadata.tensordesc_meta, descriptors)
    if version == (3, 6):

        def by_launcher_36(grid_x: int, grid_y: int, stream: Any, *args: Any) -> None:
            if enter or leave or stream.__class__ is Recorder:
                return by_triton(grid_x, grid_y, stream, *args)
            if mapped is not None:
                args = mapped(args)
            raw(grid_x, grid_y, 1, stream, function, cooperative, pdl, None, None, metadata, None, None, None, *args)

        return by_launcher_36
    if version == (3, 7) and hasattr(run, "arg_annotations"):
        annotations, signature = run.arg_annotations, run.kernel_signature

        def by_launcher_37(grid_x: int, grid_y: int, stream: Any, *args: Any) -> None:
            if enter or leave or stream.__class__ is Recorder:
                return by_triton(grid_x, grid_y, stream, *args)
            if mapped is not None:
                args = mapped(args)
            raw(
                grid_x, grid_y, 1, stream, function, cooperative, pdl, metadata, None, None, None, None, None,
                annotations, signature, args,
            )  # fmt: skip

        return by_launcher_37
    return by_triton


def tensor_maps(metas: Any, positions: tuple[int, ...]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """A function that replaces tensors among a launch's arguments by what the kernel takes: map, shape and strides.

    A map depends on address, shape and strides alone, so it is kept: encoding one takes half a microsecond.
    """
    kept: dict[Any, tuple[Any, ...]] = {}

    def mapped(args: tuple[Any, ...]) -> tuple[Any, ...]:
        flat: list[Any] = []
        done = 0
        for meta, position in zip(metas, positions):
            tensor = args[position]
            key = (position, tensor.data_ptr(), tensor.shape, tensor.stride())
            known = kept.get(key)
            if known is None:
                if len(kept) >= _CACHED_MAPS:
                    kept.clear()
                known = kept[key] = _encoded(meta, tensor)
            flat += args[done:position]
            flat += known
            done = position + 1
        return (*flat, *args[done:])

    return mapped


def _encoded(meta: Any, tensor: torch.Tensor) -> tuple[Any, ...]:
    """What Triton passes for a tensor descriptor: the tensor map, then shape and strides.

    The driver encodes nothing in a thread that has not touched the GPU yet: then any call of CUDA's runtime makes the
    device's context the thread's own.
    """
    try:
        return tuple(make_tensordesc_arg(_described(tensor), meta))
    except RuntimeError:
        torch.cuda.mem_get_info(tensor.device)
        return tuple(make_tensordesc_arg(_described(tensor), meta))


def _described(tensor: torch.Tensor) -> SimpleNamespace:
    """A tensor as Triton's encoder of tensor maps reads it; one of a byte an element, as elements of two such bytes."""
    shape, strides = list(tensor.shape), list(tensor.stride())
    if tensor.itemsize == 1:
        shape[-1] //= 2
        strides[:-1] = [stride // 2 for stride in strides[:-1]]
    return SimpleNamespace(base=tensor, shape=shape, strides=strides, padding="zero", round_f32_to_tf32=False)


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
