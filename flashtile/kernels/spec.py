"""How a kernel is described to the compiler: its arguments, constants and options, never example tensors.

What runs on a GPU and what tests compile without one are therefore the same binary, and nothing but the description decides how often a
kernel is compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from flashtile.kernels.block import Described
from flashtile.kernels.direct import encoded

GLUON_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "u16": "uint16", "i16": "int16"}
TRITON_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float8_e4m3fn": "u8", "int8": "i8"}
"""Codes of float8 are bytes to a kernel, which says itself what they mean: Triton would not let old GPUs hold them."""


@dataclass(frozen=True)
class Arg:
    """One run-time argument: its Triton type ("*bf16", "i32", "i64", "fp32") and a power of two known to divide it."""

    type: str
    divisible: int = 1


@dataclass(frozen=True)
class Descriptor:
    """A tensor that a Gluon kernel reads, writes or adds to by TMA, in boxes of ``box`` elements; the launch takes the tensor itself.

    Its base and strides are multiples of 16 bytes and its last dimension is contiguous. What a box reaches beyond the
    tensor's shape, in either direction, reads as zero and is not written.
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
                return Described(len(value.box), functools.partial(encoded, next(described, None)))
            return None if value is None else value.type

        return tuple(visit(self.args.get(name)) for name in self.kernel.arg_names)
