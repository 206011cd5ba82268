"""The backward problems that are measured, most telling first: the same kinds as forward's, with a gradient that flows into out.

``beside`` names a second problem that is timed in turn with it: as many key heads as query heads beside a group, even lengths beside
uneven ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from benchmarks import forward_grids
from benchmarks.forward_grids import KEYS, Shape, square, squares
from benchmarks.grids import DTYPE_BYTES

PORTABLE = "triton.backward"
GRID_NAMES = ("dense", "wide", "deterministic", "gqa", "varlen", "portable", "dims", "host", "memory", "cpu")
BOTH_WAYS = 1.4  # operations of forward and backward, of backward's
EVERY_NAME = (*GRID_NAMES, "block")  # the last one is of whole blocks of a model (backward_block.py)
FORWARDS = 2.5  # five matrix products over visible pairs instead of two; what a kernel computes twice does not count
EVEN_LENGTH = 128  # of which the even batch's sequences have a multiple


@dataclass(frozen=True)
class BackwardShape(Shape):
    """One problem, forward's with its gradients.

    ``kernel`` is a backward kernel's name; ``deterministic`` asks for the same bits each time.
    """

    deterministic: bool = False

    @property
    def flops(self) -> float:
        return FORWARDS * super().flops

    @property
    def bytes_in(self) -> int:
        """Bytes of q, k, v, out and the gradient of out."""
        rows = sum(self.seqlens_q) * self.num_heads_q * self.head_dim_v
        return super().bytes_in + 2 * rows * DTYPE_BYTES[self.dtype]


def backward_of(shape: Shape, **changes: Any) -> BackwardShape:
    """The backward half of a forward problem."""
    return BackwardShape(**{field.name: getattr(shape, field.name) for field in fields(Shape)} | changes)


def _all(shapes: Iterable[Shape], **changes: Any) -> list[BackwardShape]:
    return [backward_of(shape, **changes) for shape in shapes]


def dense() -> list[BackwardShape]:
    """16k tokens, 2048 features: head dims 128 and 64, full and causal, every length, and one sequence of 32k."""
    return [shape for head_dim in (128, 64) for shape in _all(squares(KEYS, head_dim))]


def wide() -> list[BackwardShape]:
    """The same for head dim 256."""
    return _all(squares(KEYS, 256))


def deterministic() -> list[BackwardShape]:
    """``dense`` once more, the same bits each time."""
    return [replace(shape, deterministic=True) for shape in dense()]


def gqa() -> list[BackwardShape]:
    """32 query heads over 8 key heads, beside as many key heads as query heads."""
    pairs = zip(*(squares((4096, 16384, 1024), 128, heads=heads) for heads in ((32, 8), (32, 32))))
    return [backward_of(grouped, beside=backward_of(single)) for grouped, single in pairs]


def varlen() -> list[BackwardShape]:
    """64 sequences of log-uniform lengths, causal, beside as many of one length with about the same operations."""
    (uneven,) = forward_grids.varlen()
    mean_square = sum(n * n for n in uneven.seqlens_k) / uneven.batch
    length = max(1, round(mean_square**0.5 / EVEN_LENGTH)) * EVEN_LENGTH
    even = square(uneven.batch, length, (uneven.num_heads_q, uneven.num_heads_kv), uneven.head_dim, causal=True)
    return [backward_of(uneven, beside=backward_of(even))]


def portable() -> list[BackwardShape]:
    """The portable kernel where another one would be chosen."""
    return [replace(shape, name=f"{shape.name} portable", kernel=PORTABLE) for shape in _all(squares(KEYS, 128))]


def dims() -> list[BackwardShape]:
    """Head dims 96 and 192."""
    return [shape for head_dim in (192, 96) for shape in _all(squares((4096, 16384), head_dim))]


def host() -> list[BackwardShape]:
    """Training steps, forward and backward, where the host's work is longer than the kernels'."""
    return _all([square(1, 256, (16, 16), causal=True), square(2, 512, (16, 16))])


def memory() -> list[BackwardShape]:
    """Training steps of one sequence that grows."""
    return _all(square(1, n, (16, 16), causal=True) for n in (2048, 4096, 8192, 16384, 32768, 65536))


def cpu() -> list[BackwardShape]:
    """What the CPU engine is timed on, beside torch SDPA."""
    return _all([square(1, 512, (8, 8), causal=causal) for causal in (False, True)])


def grid(name: str) -> list[BackwardShape]:
    """The problems of the grid called ``name``."""
    makers: dict[str, Callable[[], list[BackwardShape]]] = {
        "dense": dense, "wide": wide, "deterministic": deterministic, "gqa": gqa, "varlen": varlen, "portable": portable,
        "dims": dims, "host": host, "memory": memory, "cpu": cpu,
    }  # fmt: skip
    return makers[name]()
