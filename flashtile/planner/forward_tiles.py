"""Forward tiles: which tiles of query rows each kernel has, in which shapes, in order of preference, and the limits behind them.

Of the portable kernel, the first shape of each block_m that fits the device
is taken; Hopper's kernel has one shape for each kind of head and length.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from flashtile.planner.catalog import GLUON_FORWARD_SM90, TRITON_FORWARD
from flashtile.planner.figures import Mma

FORWARD_BLOCK_MS = (16, 32, 64, 128, 192)
SHORT_HEAD = 64  # head dims up to here leave registers for three warpgroups of rows, and wait for exp2
USUAL_HEAD = 128
LONG_WALK = 4096  # mean keys of a row from which three warpgroups of short heads pay: 16 more warps' start is spread over them


class ForwardTileShape(Protocol):
    """What a ForwardTile and a ForwardPlan share."""

    @property
    def kernel(self) -> str: ...
    @property
    def block_m(self) -> int: ...
    @property
    def block_n(self) -> int: ...
    @property
    def num_warps(self) -> int: ...
    @property
    def num_stages(self) -> int: ...
    @property
    def q_in_registers(self) -> bool: ...


class ForwardTile(NamedTuple):
    """The shape of one program: its rows, keys a step, warps, ring stages, and how it treats row maxima and q."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    kernel: str = TRITON_FORWARD
    rescale_log2: int = 0
    q_in_registers: bool = False


class ForwardLimits(NamedTuple):
    """What a kernel can be compiled for at all: ``warps`` by block_m, where not every power of two will do."""

    block_ms: tuple[int, ...]
    block_n: tuple[int, int]  # powers of two, from and to
    stages: tuple[int, int]
    warps: dict[int, tuple[int, ...]]


FORWARD_LIMITS: dict[str, ForwardLimits] = {
    GLUON_FORWARD_SM90: ForwardLimits((128, 192), (64, 128), (2, 4), {128: (8,), 192: (12,)}),
    TRITON_FORWARD: ForwardLimits((16, 32, 64, 128), (16, 128), (1, 4), {}),
}

# Hopper's kernel, measured on one H200 in bfloat16: benchmarks of 16,384 tokens at 1k to 16k keys, full and causal.
_SHORT_LONG_WALK = ForwardTile(192, 128, 12, 4, GLUON_FORWARD_SM90)
_SHORT = ForwardTile(128, 128, 8, 4, GLUON_FORWARD_SM90, q_in_registers=True)
_USUAL = ForwardTile(128, 128, 8, 2, GLUON_FORWARD_SM90, rescale_log2=8, q_in_registers=True)
_LONG = ForwardTile(128, 64, 8, 2, GLUON_FORWARD_SM90, rescale_log2=8)
HOPPER_TILES = (_SHORT_LONG_WALK, _SHORT, _USUAL, _LONG)


def hopper_tiles(head_dim: int, long_walk: bool) -> tuple[ForwardTile, ...]:
    """The tiles of Hopper's kernel for heads of ``head_dim`` (the larger one), best first; ``long_walk``: rows see LONG_WALK keys."""
    if head_dim <= SHORT_HEAD:
        return (_SHORT_LONG_WALK, _SHORT) if long_walk else (_SHORT, _SHORT_LONG_WALK)
    return (_USUAL,) if head_dim <= USUAL_HEAD else (_LONG,)


# The portable kernel: for each way to multiply the shapes (keys a step, warps, stages) of a block_m in order of preference; the
# later ones are for longer heads, wider types and less shared memory. A warp owns 16 rows, and where fragments go through registers
# a tile has no more keys than rows: else warps share rows, and have to agree on each row's maximum.
Shapes = dict[int, tuple[tuple[int, int, int], ...]]
_FEW_ROWS: Shapes = {
    32: ((32, 2, 4), (32, 2, 3), (32, 2, 2), (16, 2, 3), (16, 2, 2), (16, 2, 1), (16, 4, 2), (16, 4, 1), (16, 8, 1)),
    16: ((16, 1, 4), (16, 1, 2), (16, 1, 1), (16, 2, 2), (16, 2, 1), (16, 4, 2), (16, 4, 1), (16, 8, 1)),
}
_SHARED_OPERANDS: Shapes = {  # wgmma, tcgen05
    128: ((64, 8, 3), (64, 8, 2), (32, 8, 3), (32, 8, 2), (32, 8, 1), (16, 8, 2), (16, 8, 1)),
    64: ((64, 4, 3), (64, 4, 2), (32, 4, 3), (32, 4, 2), (16, 4, 2), (16, 4, 1), (16, 8, 1)),
} | _FEW_ROWS
_SHARED_OPERANDS_SHORT: Shapes = _SHARED_OPERANDS | {64: ((128, 4, 3), *_SHARED_OPERANDS[64])}
_REGISTER_OPERANDS: Shapes = {  # mma.sync, mfma, wmma
    128: ((64, 8, 3), (64, 8, 2), (32, 8, 3), (32, 8, 2), (32, 8, 1), (16, 8, 3), (16, 8, 2), (16, 8, 1)),
    64: ((64, 4, 3), (64, 4, 2), (32, 4, 3), (32, 4, 2), (16, 4, 3), (16, 4, 2), (16, 4, 1), (16, 8, 1)),
} | _FEW_ROWS
_FMA: Shapes = {  # no matrix instruction: results as square as possible
    64: ((32, 8, 2), (32, 8, 1), (16, 8, 1)),
    32: ((32, 8, 2), (32, 8, 1), (16, 8, 1)),
    16: ((32, 4, 2), (32, 4, 1), (16, 4, 1), (16, 8, 1)),
}


def portable_tiles(head_dim: int, mma: Mma | None) -> tuple[tuple[ForwardTile, ...], ...]:
    """The portable kernel's tiles for heads of ``head_dim`` and the preferred instruction of a tall tile: for each block_m its
    shapes, best first."""
    if mma is None:
        shapes = _FMA
    elif mma.warps == 1:
        shapes = _REGISTER_OPERANDS
    else:
        shapes = _SHARED_OPERANDS_SHORT if head_dim <= SHORT_HEAD and mma.name == "wgmma" else _SHARED_OPERANDS
    return tuple(tuple(ForwardTile(block_m, *shape) for shape in shapes[block_m]) for block_m in sorted(shapes, reverse=True))


def forward_candidates(kernel: str, head_dim: int, mma: Mma | None, long_walk: bool) -> tuple[tuple[ForwardTile, ...], ...]:
    """All tiles that a kernel's rule may choose, best first: a tuple for each of which the first that fits counts."""
    if kernel == TRITON_FORWARD:
        return portable_tiles(head_dim, mma)
    return tuple((tile,) for tile in hopper_tiles(head_dim, long_walk))
