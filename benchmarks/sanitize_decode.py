"""Decode calls for compute-sanitizer: every query tile of every kernel, with every kind of cache, mask and share of the keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import flashtile
from flashtile import Device, Problem, reference
from flashtile.planner.tiles import Variant
from flashtile.testing import poison
from flashtile.testing.cases import Case
from flashtile.testing.inputs import hide_unseen, make_inputs
from flashtile.testing.tolerance import assert_close
from flashtile.testing.variants import HOPPER, HOPPER_SHAPES, ONE, PORTABLE, PORTABLE_TILES, Shape, Share, explicit_plan, fitting_plan

SHARES = (ONE, Share(3), Share(1, 5))
BASE = Case("contiguous", (130, 17), 1, 8, 2, head_dim=128, dtype="bfloat16")
CASES = (
    BASE,
    replace(BASE, name="pages of 16", page_size=16),
    replace(BASE, name="packed queries", seqlens_q=(3, 9), ragged_q=True, spare_rows=2),
    replace(BASE, name="window", window=(31, 0), seqlens_q=4),
    replace(BASE, name="sinks", sinks=True),
    replace(BASE, name="pages of 64", page_size=64),
    replace(BASE, name="pages of 1", page_size=1),
    replace(BASE, name="head dim 64", head_dim=64, head_dim_v=64, dtype="float16"),
    replace(BASE, name="e4m3", dtype_kv="float8_e4m3fn", k_scales="head", v_scales="sequence"),
    replace(BASE, name="int8, pages of 16", dtype_kv="int8", k_scales="tensor", v_scales="head", page_size=16),
    replace(BASE, name="head dims 192 and 128", head_dim=192),
    replace(BASE, name="head dim 256", head_dim=256, head_dim_v=256),
    replace(BASE, name="softcap and ALiBi, HND", softcap=9.0, alibi=True, layout="HND", seqlens_q=2),
)


class Trial(NamedTuple):
    """One call: a case with a kernel, the query tile (block_m, swapped) and how programs share the keys."""

    case: Case
    kernel: str
    tile: Variant
    share: Share

    def __str__(self) -> str:
        return f"{self.kernel} m{self.tile[0]}{'s' if self.tile[1] else ''} {self.share} {self.case.name}"

    def run(self, device: str) -> None:
        """One checked call; raises UnsupportedError where no shape with that query tile fits."""
        case, kernel, tile, share = self
        inputs = hide_unseen(make_inputs(case, device, seed=1))
        problem = Problem.decode(**inputs.args, lse=True)
        if device == "cpu":
            plan = explicit_plan(problem, Device.of(device), kernel, Shape(*tile[:1], 64, 4, 2), share)
        else:
            plan = fitting_plan(problem, Device.of(device), kernel, tile, share)
        out, _ = poison.outputs(inputs.args["q"], case.head_dim_v)
        got, lse = flashtile.decode_with_lse(**inputs.args, out=out, plan=plan)
        expected = reference.decode(**make_inputs(case, "cpu", seed=1).args)
        assert_close(got.cpu(), lse.cpu(), *expected, dtype=got.dtype, cpu_engine=device == "cpu", what=str(self))


def trials(device: str) -> list[Trial]:
    """Every query tile of every kernel with every case, and with every share of the keys; the shares take turns at the cases."""
    found = []
    for position, case in enumerate(CASES):
        for turn, (kernel, tile) in enumerate(_tiles(device)):
            ways = SHARES[:2] if device == "cpu" else SHARES  # the CPU engine has no programs to share
            shares = ways if position == 0 else (ways[(position + turn) % len(ways)],)
            found += [Trial(case, kernel, tile, share) for share in shares]
    return found


def _tiles(device: str) -> Iterator[tuple[str, Variant]]:
    if device == "cpu":
        yield from (("cpu.decode", (rows, False)) for rows in (8, 64))
        return
    if Device.of(device).arch == "sm_90":
        yield from ((HOPPER, (rows, False)) for rows in HOPPER_SHAPES)
    yield from ((PORTABLE, tile) for tile in PORTABLE_TILES if tile[0] < 128)
