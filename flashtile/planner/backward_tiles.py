"""Backward tiles: what a program of either pass owns and walks, in which shapes, in order of preference, and the limits behind them.

A pass owns keys (it sums dK and dV) or queries (it sums dQ), and walks the others. Of each number of rows that it may own, the
first shape that fits the device and the problem's features is taken.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from flashtile.planner.backward_shapes import shapes_of
from flashtile.planner.catalog import GLUON_BACKWARD_SM90, TRITON_BACKWARD
from flashtile.planner.forward_tiles import SHORT_HEAD
from flashtile.planner.plans import BackwardPlan, Source
from flashtile.problem import Problem

Owner = Literal["keys", "queries"]
OWNERS: tuple[Owner, Owner] = ("keys", "queries")


class PassTile(NamedTuple):
    """The shape of one program of a pass: rows that it owns, rows that it walks a step, warps, ring stages.

    ``adds_dq``: it owns keys, and there is no pass over queries: it adds what its keys give to dQ in memory. ``key_slots`` tiles of
    keys lie in shared memory: with two, the next one comes while results of the last one leave.
    """

    kernel: str
    owner: Owner
    owned: int
    step: int
    num_warps: int
    num_stages: int
    adds_dq: bool = False
    key_slots: int = 2


class BackwardLimits(NamedTuple):
    """What a kernel can be compiled for at all: powers of two, from and to; ``warps`` where not every power of two will do."""

    owned: tuple[int, int]
    step: tuple[int, int]
    stages: dict[Owner, tuple[int, int]]  # by what the pass owns
    warps: int = 0


BACKWARD_LIMITS: dict[str, BackwardLimits] = {
    GLUON_BACKWARD_SM90: BackwardLimits((128, 128), (64, 128), {"keys": (2, 4), "queries": (3, 4)}, 8),
    TRITON_BACKWARD: BackwardLimits((16, 128), (16, 128), {"keys": (1, 4), "queries": (1, 4)}),
}


WIDE_HEAD = 128  # heads wider than this have kernels of their own on Hopper: registers do not hold their dK beside dV
_HOPPER_WIDE_LIMITS: dict[Owner, BackwardLimits] = {
    "keys": BackwardLimits((64, 64), (64, 64), {"keys": (2, 4)}, 8),
    "queries": BackwardLimits((128, 128), (64, 64), {"queries": (2, 4)}, 8),
}


def limits_of(problem: Problem, tile: PassTile) -> BackwardLimits:
    """The limits of the kernel that runs a tile of a pass."""
    if tile.kernel == GLUON_BACKWARD_SM90 and not tile.adds_dq and max(problem.head_dim, problem.head_dim_v) > WIDE_HEAD:
        return _HOPPER_WIDE_LIMITS[tile.owner]
    return BACKWARD_LIMITS[tile.kernel]


def pass_tiles(plan: BackwardPlan) -> tuple[PassTile, ...]:
    """The tiles of a plan's passes: over keys, then over queries, unless the first does it all."""
    keys = PassTile(plan.kernel, "keys", plan.block_n, plan.block_m, plan.num_warps, plan.num_stages, plan.one_pass)
    if plan.one_pass:
        return (keys._replace(key_slots=2 if plan.num_programs else 1),)
    return keys, PassTile(plan.kernel, "queries", plan.dq_block_m, plan.dq_block_n, plan.dq_num_warps, plan.dq_num_stages)


def plan_of_passes(keys: PassTile, queries: PassTile | None, num_programs: int = 0, source: Source = "rule") -> BackwardPlan:
    """The plan whose ``pass_tiles`` these are."""
    plan = BackwardPlan(
        kernel=keys.kernel,
        block_m=keys.step,
        block_n=keys.owned,
        num_warps=keys.num_warps,
        num_stages=keys.num_stages,
        num_programs=num_programs,
        one_pass=queries is None,
        source=source,
    )
    if queries is None:
        return plan
    return plan.with_(
        dq_block_m=queries.owned, dq_block_n=queries.step, dq_num_warps=queries.num_warps, dq_num_stages=queries.num_stages
    )  # fmt: skip


# Hopper's kernel: rows a step and ring stages of both passes.
_HOPPER_SHORT: dict[Owner, tuple[int, int]] = {"keys": (128, 3), "queries": (128, 3)}
_HOPPER_USUAL: dict[Owner, tuple[int, int]] = {"keys": (64, 3), "queries": (64, 4)}
_HOPPER_WHOLE = {"short": (64, 3), "usual": (64, 2)}  # of one pass, which keeps gradients of scores in shared memory beside the ring


_HOPPER_WIDE: dict[Owner, tuple[int, tuple[int, ...]]] = {"keys": (64, (3, 2)), "queries": (128, (4, 3, 2))}  # owned rows, stages


def hopper_pass_tiles(owner: Owner, head_dim: int) -> tuple[PassTile, ...]:
    """The tiles of a pass of Hopper's kernel for heads of ``head_dim``, of which the first that fits counts."""
    if head_dim <= WIDE_HEAD:
        return (hopper_pass_tile(owner, head_dim),)
    owned, depths = _HOPPER_WIDE[owner]
    return tuple(PassTile(GLUON_BACKWARD_SM90, owner, owned, 64, 8, stages) for stages in depths)


def hopper_pass_tile(owner: Owner, head_dim: int) -> PassTile:
    """The one tile of a pass of Hopper's kernel for heads that are not wide: two warpgroups of 64 rows."""
    step, stages = (_HOPPER_SHORT if head_dim <= SHORT_HEAD else _HOPPER_USUAL)[owner]
    return PassTile(GLUON_BACKWARD_SM90, owner, 128, step, 8, stages)


def hopper_whole_tile(head_dim: int) -> PassTile:
    """The tile of Hopper's kernel in one pass."""
    step, stages = _HOPPER_WHOLE["short" if head_dim <= SHORT_HEAD else "usual"]
    return PassTile(GLUON_BACKWARD_SM90, "keys", 128, step, 8, stages, adds_dq=True, key_slots=1)


def pass_candidates(kernel: str, owner: Owner, head_dim: int, family: str) -> tuple[tuple[PassTile, ...], ...]:
    """All tiles of a pass that a kernel's rule may choose, best first: a tuple for each number of owned rows, of which the first
    that fits counts. ``family`` is the portable kernel's, a key of ``SHAPES``."""
    if kernel == GLUON_BACKWARD_SM90:
        return (hopper_pass_tiles(owner, head_dim),)
    shapes = shapes_of(family, owner, head_dim)
    return tuple(
        tuple(PassTile(kernel, owner, *shape[:4]) for shape in shapes if shape.owned == owned)
        for owned in sorted({shape.owned for shape in shapes}, reverse=True)
    )
