"""What the compile matrix compiles: a Point is one combination of AXES, or of HOPPER_AXES for Hopper's own kernel.

Its plan is the one that the planner takes for that query tile: the first shape that fits, with the deeper ring or the half tile that
the number of splits calls for. The full matrix is every architecture x query tile x pair of head dims, each with RECIPES for the
other axes (what serves most, every feature at once, float32), and beside it a pairwise cover of all axes: about 1,300 points.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

from flashtile.band import Band
from flashtile.planner.catalog import GLUON_SM90, TRITON, kernel_named
from flashtile.planner.choose import plan_for_tile, with_splits
from flashtile.planner.device import Device
from flashtile.planner.feasible import infeasible, why_none_fits
from flashtile.planner.fitting import fitting_tiles
from flashtile.planner.plans import DecodePlan
from flashtile.planner.rules import with_deep_ring, with_half_tiles
from flashtile.planner.splits import choose_splits
from flashtile.planner.tiles import CANDIDATES
from flashtile.problem import DTYPE_BYTES, QUANTISED, Problem
from flashtile.testing.pairwise import pairwise

if TYPE_CHECKING:
    pass

DEVICES = {
    "sm_75": "T4", "sm_80": "A100", "sm_89": "L40S", "sm_90": "H200", "sm_100": "B200", "sm_120": "RTX 5090", "gfx942": "MI300X",
}  # fmt: skip
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {"band": Band(None, None)},
    "causal": {"seqlen_q": 4},
    "shaped": {"band": Band(1023, 0), "softcap": True, "alibi": True, "sinks": True},
    "ragged": {"seqlen_q": 4, "total_q": 9, "ragged_q": True, "lse": True},
    "all": {
        "seqlen_q": 4, "total_q": 9, "ragged_q": True, "lse": True,
        "band": Band(1023, 0), "softcap": True, "alibi": True, "sinks": True,
    },
}  # fmt: skip
AXES: dict[str, tuple[Any, ...]] = {
    "kernel": (TRITON,),
    "arch": tuple(DEVICES),
    "tile": tuple(CANDIDATES[TRITON]),  # (block_m, swapped)
    "head_dims": ((64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128)),
    # of all tensors; a quantised cache is beside a q of 16 bits
    "dtype": ("float16", "bfloat16", "float32", "tf32", *QUANTISED),
    "page_size": (0, 1, 16, 64),
    "features": tuple(FEATURES),
    "batch": (1, 3, 100),
    # as the rule shares the keys, many keys a program, one key tile a program, more splits than one warp combines
    "splits": (0, 1, 4, 100),
    "group": (1, 4, 8, 16),
    "aligned": (True, False),  # pointers and strides are multiples of 16 bytes, or only of an element
}
HOPPER_AXES: dict[str, tuple[Any, ...]] = AXES | {
    "kernel": (GLUON_SM90,),
    "arch": ("sm_90",),
    "tile": tuple(CANDIDATES[GLUON_SM90]),
    "dtype": ("float16", "bfloat16", *QUANTISED),
    "page_size": (0, 8, 16, 64),
    "aligned": (True,),
}
RECIPES: tuple[dict[str, Any], ...] = (
    {"dtype": "bfloat16", "page_size": 0, "features": "causal", "batch": 1, "splits": 100, "group": 4, "aligned": True},
    {"dtype": "float16", "page_size": 16, "features": "all", "batch": 1, "splits": 1, "group": 8, "aligned": True},
    {"dtype": "float32", "page_size": 64, "features": "shaped", "batch": 1, "splits": 1, "group": 1, "aligned": True},
)
HOPPER_RECIPES: tuple[dict[str, Any], ...] = tuple(
    {"dtype": "bfloat16", "page_size": page_size, "features": features, "batch": batch, "splits": 0, "group": 4, "aligned": True}
    for page_size, features, batch in product((0, 16), ("causal", "all"), (1, 3, 100))
)


@dataclass(frozen=True)
class Point:
    """One combination of AXES; ``splits`` 0 shares the keys by the kernel's rule, which is stream-K for several sequences."""

    kernel: str
    arch: str
    tile: tuple[int, bool]
    head_dims: tuple[int, int]
    dtype: str
    page_size: int
    features: str
    batch: int
    splits: int
    group: int
    aligned: bool

    @cached_property
    def device(self) -> Device:
        return Device.named(DEVICES[self.arch])

    @cached_property
    def problem(self) -> Problem:
        dtype = {"tf32": "float32", "float8_e4m3fn": "bfloat16", "int8": "float16"}.get(self.dtype, self.dtype)
        stored = self.dtype if self.dtype in QUANTISED else dtype
        scales: dict[str, Any] = {"k_scales": "head", "v_scales": "sequence"} if self.dtype in QUANTISED else {}
        return Problem(
            batch=self.batch, seqlen_k=256 if self.splits == 4 else 65536, num_heads_q=2 * self.group, num_heads_kv=2,
            head_dim=self.head_dims[0], head_dim_v=self.head_dims[1],
            dtype_q=dtype, dtype_k=stored, dtype_v=stored, allow_tf32=self.dtype == "tf32", page_size=self.page_size,
            alignment=16 if self.aligned else DTYPE_BYTES[stored], **scales, **FEATURES[self.features],
        )  # fmt: skip

    def plan(self) -> DecodePlan | list[str]:
        """The planner's plan for this query tile, or its reasons why there is none."""
        problem, device = self.problem, self.device
        reasons = kernel_named(self.kernel).reasons_against(problem, device)
        if reasons:
            return reasons
        tile = next((tile for tile, _ in fitting_tiles(problem, device, self.kernel) if (tile.block_m, tile.swapped) == self.tile), None)
        if tile is None:
            return why_none_fits(problem, device, self.kernel, self.tile)
        splits = self.splits or choose_splits(problem, device, tile).num_splits
        if self.kernel == TRITON:
            tile, splits = with_half_tiles(problem, device, with_deep_ring(problem, device, tile, splits), splits)
        plan = plan_for_tile(problem, device, tile)
        if self.splits or not plan.num_programs:
            plan = with_splits(plan, problem, device, splits)
        return infeasible(problem, plan, device) or plan


def full() -> list[Point]:
    """Every architecture, query tile and pair of head dims with each recipe, and a pairwise cover of everything."""
    fixed = [
        Point(kernel=kernel, arch=arch, tile=tile, head_dims=dims, **recipe)
        for axes, recipes in ((AXES, RECIPES), (HOPPER_AXES, HOPPER_RECIPES))
        for kernel, arch, tile, dims, recipe in product(axes["kernel"], axes["arch"], axes["tile"], axes["head_dims"], recipes)
    ]
    return list(dict.fromkeys([*fixed, *cover(0)]))


def cover(seed: int, least: int = 0) -> list[Point]:
    """Points in which every two values of two axes of a kernel meet; more covers from the seeds after it, until there are ``least``."""
    points: dict[Point, None] = {}
    while not points or len(points) < least:
        points.update(dict.fromkeys(Point(**row) for axes in (AXES, HOPPER_AXES) for row in pairwise(axes, seed)))
        seed += 1
    return list(points)[: max(least, 0) or None]
