"""The tiles among which a rule chooses: for each query tile of a kernel the preferred shape that fits the device."""

from __future__ import annotations

from functools import lru_cache
from math import gcd

from flashtile.planner.catalog import GLUON_SM90
from flashtile.planner.cost import row_blocks_of, work_of
from flashtile.planner.device import Device
from flashtile.planner.feasible import misfits
from flashtile.planner.footprint import footprint_of
from flashtile.planner.resources import Footprint
from flashtile.planner.tiles import MOST_GATHERED_KEYS, Tile, Variant, shapes_of
from flashtile.problem import Problem

Fit = tuple[Tile, Footprint]

MAX_BLOCK_N = 256


def fitting_tiles(problem: Problem, device: Device, kernel: str) -> tuple[Fit, ...]:
    """For each query tile of a kernel the preferred shape that fits the device; query tiles without one are left out."""
    kind = (problem.head_dim, problem.head_dim_v, problem.dtype_q, problem.dtype_k, problem.dtype_v, problem.allow_tf32)
    features = (problem.softcap, problem.alibi, problem.ragged_q, problem.batch > 1)
    # of a page's size only its powers of two matter, for keys are gathered where it is no multiple of block_n
    page_size = gcd(problem.page_size, MAX_BLOCK_N) if problem.page_size else 0
    work = work_of(problem)
    fitting = []
    for block_m, regimes in _fitting_tiles(device, kernel, kind, features, page_size, problem.alignment):
        units = row_blocks_of(work, block_m) * work.num_heads_kv
        *limited, (_, fit) = regimes  # the last holds however many units there are
        fit = next((fit for most_percent, fit in limited if 100 * units <= most_percent * device.num_sms), fit)
        if fit is not None:
            fitting.append(fit)
    return tuple(fitting)


@lru_cache(maxsize=1024)
def _fitting_tiles(
    device: Device,
    kernel: str,
    kind: tuple[int, int, str, str, str, bool],
    features: tuple[bool, bool, bool, bool],
    page_size: int,
    alignment: int,
) -> tuple[tuple[int, tuple[tuple[int, Fit | None], ...]], ...]:
    """For each query tile and regime of units the first shape that fits, if one does."""
    head_dim, head_dim_v, dtype_q, dtype_k, dtype_v, allow_tf32 = kind
    softcap, alibi, ragged_q, several = features
    problem = Problem(
        batch=2 if several else 1,  # whether programs may share tiles
        head_dim=head_dim, head_dim_v=head_dim_v, dtype_q=dtype_q, dtype_k=dtype_k, dtype_v=dtype_v, allow_tf32=allow_tf32,
        softcap=softcap, alibi=alibi, ragged_q=ragged_q, page_size=page_size, alignment=alignment,
    )  # fmt: skip

    def first(variant: Variant, shapes: tuple[tuple[int, int, int], ...]) -> Fit | None:
        fits = [
            (tile, footprint_of(problem, tile, device))
            for tile in (Tile(*variant, *shape, kernel) for shape in shapes)
            if not misfits(problem, tile, device)
        ]
        if kernel == GLUON_SM90:
            copied = [fit for fit in fits if not fit[1].gathers]
            fits = copied or [fit for fit in fits if fit[0].block_n <= MOST_GATHERED_KEYS]
        return fits[0] if fits else None

    return tuple(
        (variant[0], tuple((regime.most_units_percent, first(variant, regime.shapes)) for regime in regimes))
        for variant, regimes in shapes_of(kernel, problem.quantised, page_size).items()
    )
