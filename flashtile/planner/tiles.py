"""Tiles: which query tiles each kernel has, in which shapes, in order of preference. Tables and the limits behind them.

A shape is (keys a step, warps, ring stages). For each query tile the first shape that fits the device is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from flashtile.planner.catalog import GLUON_SM90, TRITON

Variant = tuple[int, bool]  # (block_m, swapped)
Shape = tuple[int, int, int]

SPLIT_UNITS_PERCENT = 34  # units (sequences x key heads x row blocks) in percent of the SMs up to which splits fill SMs that are free
DEEP_UNITS_PERCENT = 61  # up to here a unit to an SM with a deep ring reads as fast as two splits do, and needs no combine
WAVE_UNITS_PERCENT = 100  # up to here a unit to an SM; beyond, several programs share one
RESIDENT_UNITS_PERCENT = 220  # up to here small rings let as good as all units be resident at once
MANY_UNITS_PERCENT = 600  # beyond, a program for each unit: small rings, so that more of them start while others end
MOST_GATHERED_KEYS = 64  # keys of a tile that are looked up one by one: all threads ask for them, so that small programs overlap better
ANY_UNITS = 2**62


class ProgramShape(Protocol):
    """What tiles and plans of decode and forward share."""

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


class TileShape(ProgramShape, Protocol):
    """What a Tile and a DecodePlan share."""

    @property
    def swapped(self) -> bool: ...


class Tile(NamedTuple):
    """The shape of one program: its rows, how they meet the matrix instruction, keys a step, warps, ring stages."""

    block_m: int
    swapped: bool
    block_n: int
    num_warps: int
    num_stages: int
    kernel: str = TRITON


class Regime(NamedTuple):
    """Shapes in order of preference for problems of at most so many units in percent of the SMs."""

    most_units_percent: int
    shapes: tuple[Shape, ...]


class Limits(NamedTuple):
    """What a kernel can be compiled for at all, on any device.

    ``variants`` are its query tiles; ``variants_why`` explains a missing one. ``warps`` names the numbers of warps that a
    query tile may have, where not every power of two will do; a warp owns at least ``keys_per_warp`` keys of a key tile
    where it owns keys.
    """

    variants: tuple[Variant, ...]
    variants_why: str
    block_n: tuple[int, int]  # powers of two, from and to
    stages: tuple[int, int]
    warps: Mapping[int, tuple[int, ...]]
    keys_per_warp: Mapping[int, int]


# The portable kernel. Measured on sm_90 with bfloat16 and head dim 128; the later ones are for longer heads, wider types,
# less shared memory and tensors that are not aligned.
_LAST = ((16, 4, 1), (16, 8, 1))
_FEW_ROWS = (
    (64, 4, 3), (32, 2, 4), (64, 4, 2), (32, 4, 3), (64, 8, 3), (32, 2, 2), (32, 4, 2), (64, 8, 2), (32, 8, 2), (32, 8, 1), *_LAST,
)  # fmt: skip
_ONE_ROW = (
    (64, 4, 3), (64, 8, 3), (32, 8, 3), (32, 8, 2), (64, 16, 2), (32, 16, 2), (32, 4, 2), (16, 4, 2), (16, 8, 2), *_LAST, (16, 16, 1),
)  # fmt: skip
_MANY_ROWS = (
    (64, 4, 3), (64, 4, 2), (64, 8, 3), (32, 4, 3), (64, 8, 2), (32, 8, 3), (32, 4, 2), (32, 8, 2), (32, 8, 1), (16, 8, 1),
)  # fmt: skip
_TRITON: dict[Variant, tuple[Shape, ...]] = {
    (16, False): _FEW_ROWS,
    # with four warps the keys' fragments take 172 registers, which spills on sm_80
    (8, True): ((64, 8, 3), (32, 4, 3), *_FEW_ROWS),
    (1, False): _ONE_ROW,
    (16, True): _FEW_ROWS,
    (32, False): _MANY_ROWS,
    (64, False): _MANY_ROWS,
    (128, False): ((64, 8, 3), (64, 8, 2), (32, 8, 3), (32, 8, 2), (32, 8, 1)),
}

# Hopper's kernel, for head dim 128 on one H200. The first shape of a regime is the best that benchmarks/results/hopper_tuning.json
# has for it; where that has none (16 rows at less than 128 units, 64 and more rows beyond 132) it is taken over from its neighbours.
# The later shapes are for longer heads.
_OWN_KEYS_SMALL = ((64, 4, 3), (64, 4, 2), (32, 2, 3), (32, 2, 2))
_OWN_KEYS_CROWDED = ((64, 2, 2), (64, 4, 2), (32, 2, 3), (32, 2, 2))
_OWN_KEYS = (
    Regime(SPLIT_UNITS_PERCENT, _OWN_KEYS_SMALL),
    Regime(DEEP_UNITS_PERCENT, ((128, 4, 3), *_OWN_KEYS_SMALL)),
    Regime(WAVE_UNITS_PERCENT, _OWN_KEYS_SMALL),
    Regime(RESIDENT_UNITS_PERCENT, _OWN_KEYS_CROWDED),
    Regime(MANY_UNITS_PERCENT, _OWN_KEYS_SMALL),
    Regime(ANY_UNITS, _OWN_KEYS_CROWDED),
)
_OWN_ROWS = (
    Regime(WAVE_UNITS_PERCENT, ((64, 4, 3), (64, 4, 2), (32, 4, 3), (32, 4, 2))),
    Regime(ANY_UNITS, ((64, 4, 2), (32, 4, 2))),
)
_GLUON: dict[Variant, tuple[Regime, ...]] = {
    (8, False): _OWN_KEYS,
    (16, False): (
        Regime(SPLIT_UNITS_PERCENT, _OWN_KEYS_SMALL),
        Regime(WAVE_UNITS_PERCENT, ((128, 4, 2), *_OWN_KEYS_SMALL)),
        *_OWN_KEYS[3:],
    ),
    (64, False): _OWN_ROWS,
    (128, False): tuple(Regime(most, tuple((keys, 8, stages) for keys, _, stages in shapes)) for most, shapes in _OWN_ROWS),
}

# Quantised keys, of one byte an element. A program wants as many bytes on their way and an SM the same speed of each warp, so that
# Hopper's kernel has twice the keys and twice the warps, or programs, and the portable one twice the tiles in its ring. Reckoned;
# what the rule takes of it up to 16 rows was then measured (benchmarks/results/decode_fp8.json).
_HALF_KEYS = ((64, 4, 3), (64, 4, 2), (32, 2, 3), (32, 2, 2))
_QUANTISED_OWN_KEYS = (
    Regime(SPLIT_UNITS_PERCENT, ((128, 8, 3), (128, 8, 2), *_HALF_KEYS)),
    Regime(DEEP_UNITS_PERCENT, ((256, 8, 3), (128, 8, 3), (128, 8, 2), *_HALF_KEYS)),
    Regime(WAVE_UNITS_PERCENT, ((128, 8, 3), (128, 8, 2), *_HALF_KEYS)),
    Regime(RESIDENT_UNITS_PERCENT, ((128, 4, 2), *_HALF_KEYS)),
    Regime(MANY_UNITS_PERCENT, ((128, 4, 3), (128, 4, 2), *_HALF_KEYS)),
    Regime(ANY_UNITS, ((128, 4, 2), *_HALF_KEYS)),
)
# asked for page by page: four warps do with half an SM's registers
_QUANTISED_PAGES = (Regime(ANY_UNITS, ((64, 4, 6), (64, 4, 4), *_HALF_KEYS)),)
# 16 rows: the warps' accumulators take twice the memory where they meet, beside which only smaller rings let two programs share an SM
_QUANTISED_OWN_KEYS_16 = (*_QUANTISED_OWN_KEYS[:3], Regime(ANY_UNITS, ((128, 4, 2), *_HALF_KEYS)))
_QUANTISED_PAGES_16 = (
    Regime(WAVE_UNITS_PERCENT, ((64, 4, 6), (64, 4, 4), *_HALF_KEYS)),
    Regime(ANY_UNITS, ((64, 4, 4), *_HALF_KEYS)),
)
PAGE_OF_QUANTISED = 128  # keys: pages of a multiple hold the tiles of _QUANTISED_OWN_KEYS whole

SHAPES: dict[str, dict[Variant, tuple[Regime, ...]]] = {
    TRITON: {variant: (Regime(ANY_UNITS, shapes),) for variant, shapes in _TRITON.items()},
    GLUON_SM90: _GLUON,
}
"""For each kernel's query tiles, in order of preference where several are as good: shapes by how many units there are."""

_QUANTISED_TRITON: dict[Variant, tuple[Regime, ...]] = {
    variant: (Regime(ANY_UNITS, tuple((keys, warps, max(1, 2 * stages - 1)) for keys, warps, stages in shapes)),)
    for variant, shapes in _TRITON.items()
}


def shapes_of(kernel: str, quantised: bool, page_size: int) -> dict[Variant, tuple[Regime, ...]]:
    """A kernel's SHAPES, for keys of one byte an element where ``quantised``; ``page_size`` is 0 without pages."""
    if not quantised:
        return SHAPES[kernel]
    if kernel == TRITON:
        return _QUANTISED_TRITON
    if page_size % PAGE_OF_QUANTISED:
        return {(8, False): _QUANTISED_PAGES, (16, False): _QUANTISED_PAGES_16}
    return {(8, False): _QUANTISED_OWN_KEYS, (16, False): _QUANTISED_OWN_KEYS_16}


def candidates_of(kernel: str, variant: Variant, quantised: bool, page_size: int) -> tuple[Tile, ...]:
    """Every tile of one query tile that the rule may choose; none where the kernel has it for other keys only."""
    regimes = shapes_of(kernel, quantised, page_size).get(variant, ())
    return tuple(dict.fromkeys(Tile(*variant, *shape, kernel) for regime in regimes for shape in regime.shapes))


CANDIDATES: dict[str, dict[Variant, tuple[Tile, ...]]] = {
    kernel: {
        variant: tuple(dict.fromkeys(Tile(*variant, *shape, kernel) for regime in regimes for shape in regime.shapes))
        for variant, regimes in variants.items()
    }
    for kernel, variants in SHAPES.items()
}
"""Every tile that a rule may choose, by kernel and query tile."""

LIMITS: dict[str, Limits] = {
    TRITON: Limits(
        variants=tuple(_TRITON),
        variants_why="a matrix instruction's row side takes 16 rows at least, and swapped operands put 8 or 16 rows on its small side",
        block_n=(16, 256),  # the second product's inner dimension is 16 at least
        stages=(1, 8),
        warps={},
        keys_per_warp={},
    ),
    GLUON_SM90: Limits(
        variants=tuple(_GLUON),
        variants_why="8 and 16 rows go through mma.sync, 64 and 128 through wgmma, and operands are never swapped",
        block_n=(32, 256),
        stages=(2, 8),
        warps={8: (1, 2, 4, 8), 16: (1, 2, 4, 8), 64: (4,), 128: (8,)},  # by wgmma each warp holds 16 rows
        keys_per_warp={8: 16, 16: 16},  # the second product's inner dimension, for each warp's own keys
    ),
}


def variant_name(block_m: int, swapped: bool) -> str:
    """A query tile in words: "block_m 8 swapped"."""
    return f"block_m {block_m}{' swapped' if swapped else ''}"


def variants_in_words(kernel: str) -> str:
    """A kernel's query tiles in words: "block_m 8, 16, 64 and 128"."""
    names = [f"{block_m}{' swapped' if swapped else ''}" for block_m, swapped in sorted(LIMITS[kernel].variants)]
    return f"block_m {', '.join(names[:-1])} and {names[-1]}"
