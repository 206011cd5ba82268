"""A kernel's parameters as the driver takes them: which there are, and one launch's in one piece of memory."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

_TENSOR_MAP = 128  # bytes of a CUtensorMap, and its alignment
_FORMATS = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u32": "I", "fp32": "f", "fp64": "d"}
_POINTER = "Q"
_MAP = f"{_TENSOR_MAP}s"


class NotReplayable(Exception):
    """Why a call cannot be repeated from its record."""


@dataclass(frozen=True)
class Described:
    """A parameter that is a tensor descriptor: ``encode(tensor)`` gives (tensor map, *shape, *strides) of Triton's."""

    rank: int
    encode: Callable[[torch.Tensor], tuple[Any, ...]]


class Kernel(NamedTuple):
    """A loaded kernel, as the driver launches it.

    ``parameters`` are those of the kernel's source in order, as nested as they are passed: a Triton type ("*bf16",
    "i32", ...), a Described, or None for what was compiled away. ``scratch`` is the number of pointers that Triton
    appends, here null.
    """

    function: int
    threads: int
    shared: int  # bytes
    dependent: bool
    cooperative: bool
    parameters: tuple[Any, ...]
    scratch: int = 2


class Block(NamedTuple):
    """One launch's parameters: where each begins, and the pointers among them (offset, address, whether within a tensor map)."""

    bytes: bytes
    offsets: tuple[int, ...]
    pointers: tuple[tuple[int, int, bool], ...]


@dataclass(frozen=True)
class _Layout:
    """Where each parameter stands, each at its own alignment; and which of them hold addresses."""

    packing: struct.Struct
    offsets: tuple[int, ...]
    pointers: tuple[int, ...]
    maps: tuple[int, ...]


def sizes_of(kernel: Kernel) -> list[int]:
    """Bytes of each parameter in order, Triton's scratch pointers included. Raises NotReplayable."""
    return [struct.calcsize("=" + form) for form in _forms(kernel)]


def block_of(kernel: Kernel, args: tuple[Any, ...]) -> Block:
    """The parameters of a launch with ``args``, nested as the kernel's parameters are. Raises NotReplayable."""
    layout = _layout_of(kernel)
    values: list[Any] = []
    mapped: list[torch.Tensor] = []
    for parameter, value in zip(kernel.parameters, args, strict=True):
        _flatten(parameter, value, values, mapped)
    packed = layout.packing.pack(*values, *[0] * kernel.scratch)
    # a null pointer stays one
    pointers = [(layout.offsets[i], values[i], False) for i in layout.pointers if values[i]]
    pointers += [(layout.offsets[i], tensor.data_ptr(), True) for i, tensor in zip(layout.maps, mapped, strict=True)]
    return Block(packed, layout.offsets, tuple(pointers))


def _flatten(parameter: Any, value: Any, values: list[Any], mapped: list[torch.Tensor]) -> None:
    """Appends what the driver takes for one argument, and the tensors behind tensor maps."""
    if isinstance(parameter, str):
        values.append(value)
    elif isinstance(parameter, tuple):
        for part, part_value in zip(parameter, value, strict=True):
            _flatten(part, part_value, values, mapped)
    elif parameter is not None:
        tensor_map, *sizes = parameter.encode(value)
        values += [_bytes_of(tensor_map), *sizes]
        mapped.append(value)


def _bytes_of(tensor_map: Any) -> bytes:
    """The CUtensorMap in Triton's object, which ends with it."""
    return ctypes.string_at(id(tensor_map) + type(tensor_map).__basicsize__ - _TENSOR_MAP, _TENSOR_MAP)


@functools.lru_cache(maxsize=1024)
def _layout_of(kernel: Kernel) -> _Layout:
    offsets: list[int] = []
    forms = list(_forms(kernel))
    packing, end = "=", 0
    for form in forms:
        size = struct.calcsize("=" + form)
        padding = -end % size
        packing += f"{padding}x{form}"
        offsets.append(end + padding)
        end += padding + size
    num_given = len(forms) - kernel.scratch
    pointers = tuple(i for i, form in enumerate(forms[:num_given]) if form == _POINTER)
    return _Layout(struct.Struct(packing), tuple(offsets), pointers, tuple(i for i, form in enumerate(forms) if form == _MAP))


def _forms(kernel: Kernel) -> Iterator[str]:
    """How each of the driver's parameters is packed, in struct's letters."""

    def visit(parameter: Any) -> Iterator[str]:
        if isinstance(parameter, tuple):
            for part in parameter:
                yield from visit(part)
        elif isinstance(parameter, Described):
            yield from (_MAP, *["i"] * parameter.rank, *["q"] * parameter.rank)
        elif parameter is not None:
            if not parameter.startswith("*") and parameter not in _FORMATS:
                raise NotReplayable(f"a parameter of type {parameter}")
            yield _POINTER if parameter.startswith("*") else _FORMATS[parameter]

    yield from visit(kernel.parameters)
    yield from [_POINTER] * kernel.scratch
