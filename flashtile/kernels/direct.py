"""The shortest way from a compiled kernel into the driver: the one place that knows how each version of Triton launches."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import make_tensordesc_arg

from flashtile.kernels.block import Kernel, NotReplayable, sizes_of
from flashtile.kernels.cubin import parameter_sizes
from flashtile.kernels.replay import Recorder

if TYPE_CHECKING:
    from flashtile.kernels.spec import Spec

_CACHED_MAPS = 4096  # tensor maps of 128 bytes: an engine has two for each layer's cache


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


def raw_launch(
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
                known = kept[key] = encoded(meta, tensor)
            flat += args[done:position]
            flat += known
            done = position + 1
        return (*flat, *args[done:])

    return mapped


def encoded(meta: Any, tensor: torch.Tensor) -> tuple[Any, ...]:
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
