"""Forward tiles: which tiles of query rows each kernel has, in which shapes, in order of preference, and the limits behind them.

Of each block_m, the first shape that fits the device and the problem's features is taken.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from flashtile.planner.catalog import GLUON_FORWARD_SM90, TRITON_FORWARD
from flashtile.planner.figures import Mma
from flashtile.planner.tiles import ProgramShape

SHORT_HEAD = 64  # head dims up to here leave registers for three warpgroups of rows, and wait for exp2
USUAL_HEAD = 128
LONG_KEYS_HEAD = 192  # key dims up to here leave registers for as many keys a step as usual heads have, where values are no longer; or else
# for q, so that shared memory need not deliver it with every block of keys
LONG_WALK = 2048  # mean keys of a query from which three warpgroups of short heads pay: 1.06x of two at 4 x 4096 tokens, causal, on an H200


class ForwardTileShape(ProgramShape, Protocol):
    """What a ForwardTile and a ForwardPlan share."""

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
    GLUON_FORWARD_SM90: ForwardLimits((128, 192), (32, 128), (2, 4), {128: (8,), 192: (12,)}),
    TRITON_FORWARD: ForwardLimits((16, 32, 64, 128), (16, 128), (1, 4), {}),
}


# Hopper's kernel, as timed on one H200 in bfloat16 with 16,384 tokens at 1k to 16k keys, full and causal. The first shape of
# each block_m is what measured best; the later ones are for features that want registers.
def _hopper(block_m: int, block_n: int, num_stages: int, rescale_log2: int = 0, q_in_registers: bool = False) -> ForwardTile:
    return ForwardTile(block_m, block_n, block_m // 16, num_stages, GLUON_FORWARD_SM90, rescale_log2, q_in_registers)


_SHORT_TALL = (_hopper(192, 128, 4), _hopper(192, 64, 4))
_SHORT = (_hopper(128, 128, 4, 8, True), _hopper(128, 128, 4, 8), _hopper(128, 64, 4, 8))
_USUAL_TALL = (_hopper(192, 64, 3), _hopper(192, 32, 4))
_USUAL = (_hopper(128, 128, 2, 8, True), _hopper(128, 128, 2, 8), _hopper(128, 64, 3, 8))
_LONG = (_hopper(128, 64, 2, 8), _hopper(128, 32, 2, 8))
_LONG_KEYS = (_hopper(128, 128, 2, 8), *_LONG)
_LONG_BOTH = (_hopper(128, 64, 2, 8, True), *_LONG)


def hopper_tiles(head_dim: int, head_dim_v: int, long_walk: bool) -> tuple[tuple[ForwardTile, ...], ...]:
    """The tiles of Hopper's kernel for such heads: for each block_m, best first, its shapes; ``long_walk``: queries see LONG_WALK keys."""
    longest = max(head_dim, head_dim_v)
    if longest <= SHORT_HEAD:
        return (_SHORT_TALL, _SHORT) if long_walk else (_SHORT, _SHORT_TALL)
    if longest <= USUAL_HEAD:
        return _USUAL, _USUAL_TALL
    if head_dim > LONG_KEYS_HEAD or head_dim_v > LONG_KEYS_HEAD:
        return (_LONG,)
    return (_LONG_KEYS if head_dim_v <= USUAL_HEAD else _LONG_BOTH,)


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


def forward_candidates(
    kernel: str, head_dim: int, head_dim_v: int, mma: Mma | None, long_walk: bool
) -> tuple[tuple[ForwardTile, ...], ...]:
    """All tiles that a kernel's rule may choose, best first: a tuple for each block_m, of which the first that fits counts."""
    if kernel == TRITON_FORWARD:
        return portable_tiles(max(head_dim, head_dim_v), mma)
    return hopper_tiles(head_dim, head_dim_v, long_walk)
