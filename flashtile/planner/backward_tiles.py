"""Backward tiles: what a program of either pass owns and walks, in which shapes, in order of preference, and the limits behind them.

A pass owns keys (it sums dK and dV) or queries (it sums dQ), and walks the others. Of each number of rows that it may own, the
first shape that fits the device and the problem's features is taken.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from flashtile.planner.catalog import TRITON_BACKWARD
from flashtile.planner.figures import Mma
from flashtile.planner.plans import BackwardPlan, Source

Owner = Literal["keys", "queries"]
OWNERS: tuple[Owner, Owner] = ("keys", "queries")


class PassTile(NamedTuple):
    """The shape of one program of a pass: rows that it owns, rows that it walks a step, warps, ring stages."""

    kernel: str
    owner: Owner
    owned: int
    step: int
    num_warps: int
    num_stages: int


class BackwardLimits(NamedTuple):
    """What a kernel can be compiled for at all: powers of two, from and to."""

    owned: tuple[int, int]
    step: tuple[int, int]
    stages: tuple[int, int]


BACKWARD_LIMITS: dict[str, BackwardLimits] = {
    TRITON_BACKWARD: BackwardLimits((16, 128), (16, 128), (1, 4)),
}


def pass_tiles(plan: BackwardPlan) -> tuple[PassTile, PassTile]:
    """The tiles of a plan's passes: over keys, then over queries."""
    return (
        PassTile(plan.kernel, "keys", plan.block_n, plan.block_m, plan.num_warps, plan.num_stages),
        PassTile(plan.kernel, "queries", plan.dq_block_m, plan.dq_block_n, plan.dq_num_warps, plan.dq_num_stages),
    )


def plan_of_passes(keys: PassTile, queries: PassTile, source: Source = "rule") -> BackwardPlan:
    """The plan whose ``pass_tiles`` these are."""
    return BackwardPlan(
        kernel=keys.kernel,
        block_m=keys.step,
        block_n=keys.owned,
        num_warps=keys.num_warps,
        num_stages=keys.num_stages,
        dq_block_m=queries.owned,
        dq_block_n=queries.step,
        dq_num_warps=queries.num_warps,
        dq_num_stages=queries.num_stages,
        source=source,
    )


# The portable kernel: for each way to multiply the shapes (rows a step, warps, stages) of a number of owned rows in order of
# preference; the later ones are for longer heads, wider types and less shared memory.
Shapes = dict[int, tuple[tuple[int, int, int], ...]]
_FEW: Shapes = {
    32: ((32, 2, 2), (32, 2, 1), (16, 2, 2), (16, 2, 1), (16, 4, 2), (16, 4, 1), (16, 8, 1)),
    16: ((16, 1, 2), (16, 1, 1), (16, 2, 2), (16, 2, 1), (16, 4, 2), (16, 4, 1), (16, 8, 1)),
}
_MATRIX: Shapes = {
    128: ((64, 8, 2), (64, 8, 1), (32, 8, 2), (32, 8, 1), (16, 8, 2), (16, 8, 1)),
    64: ((64, 4, 2), (64, 4, 1), (32, 4, 2), (32, 4, 1), (16, 4, 2), (16, 4, 1), (32, 8, 1), (16, 8, 1)),
} | _FEW
_FMA: Shapes = {  # no matrix instruction: results as square as possible
    64: ((32, 8, 2), (32, 8, 1), (16, 8, 1)),
    32: ((32, 8, 2), (32, 8, 1), (16, 8, 1)),
    16: ((16, 4, 2), (16, 4, 1), (16, 8, 1)),
}


def pass_candidates(kernel: str, owner: Owner, mma: Mma | None) -> tuple[tuple[PassTile, ...], ...]:
    """All tiles of a pass that a kernel's rule may choose, best first: a tuple for each number of owned rows, of which the first
    that fits counts. ``mma`` is the preferred instruction of a tall tile."""
    shapes = _FMA if mma is None else _MATRIX
    return tuple(tuple(PassTile(kernel, owner, owned, *shape) for shape in shapes[owned]) for owned in sorted(shapes, reverse=True))
