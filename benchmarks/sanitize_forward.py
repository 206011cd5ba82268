"""Forward calls for compute-sanitizer: every tile of every kernel, with every kind of keys, mask and head dim."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import flashtile
from flashtile import Device, Problem, UnsupportedError
from flashtile.planner.catalog import GLUON_FORWARD_SM90, TRITON_FORWARD
from flashtile.planner.choose import forward_plan_for_tile, plan_forward
from flashtile.planner.forward_footprint import forward_mma
from flashtile.planner.forward_rules import forward_misfits
from flashtile.planner.forward_tiles import ForwardTile, hopper_tiles, portable_tiles
from flashtile.planner.plans import ForwardPlan
from flashtile.testing import poison
from flashtile.testing.forward_cases import FORWARD_CASES, ForwardCase
from flashtile.testing.forward_inputs import expected_forward, make_forward_inputs
from flashtile.testing.tolerance import assert_close

BASE = "dim_128_group_4"
ALSO_ALONE = (BASE, "varlen_cross_bf16")  # a program for each tile as well
NAMES = (
    BASE, "q193_k191_causal", "varlen", "varlen_cross_bf16", "varlen_spare_rows", "varlen_everything", "pages_of_16", "pages_of_128_bf16",
    "pages_missing", "window_both_sides", "sinks", "softcap_window_bf16", "alibi", "large_logits_dim_128_bf16", "dim_96",
    "dim_192_value_128", "dim_256", "dim_64_value_128",
)  # fmt: skip
CASES = tuple(case for name in NAMES for case in FORWARD_CASES if case.name == name)
PORTABLE_ROWS = (128, 64, 16)
KINDS_OF_HEADS = ((64, 64), (128, 128), (192, 128), (256, 256))
HOPPER_TILES = tuple(dict.fromkeys(tile for dims in KINDS_OF_HEADS for shapes in hopper_tiles(*dims, False) for tile in shapes))
CPU = "cpu.forward"


class Trial(NamedTuple):
    """One call: a case, a kernel, its tile (None: the first of ``rows`` rows that fits) and how many programs stay (0: the plan's own)."""

    case: ForwardCase
    kernel: str
    rows: int
    tile: ForwardTile | None = None
    num_programs: int = 0

    def __str__(self) -> str:
        held = " q held" if self.tile is not None and self.tile.q_in_registers else ""
        shape = "" if self.tile is None else f"n{self.tile.block_n}r{self.tile.num_stages}{held} "
        programs = f"programs{self.num_programs} " if self.num_programs else ""
        return f"{self.kernel} m{self.rows} {shape}{programs}{self.case.name}"

    def run(self, device: str) -> None:
        """One checked call; raises UnsupportedError where no such plan fits."""
        inputs = make_forward_inputs(self.case, device, seed=1)
        problem = Problem.forward(**inputs.args, lse=True)
        out, _ = poison.outputs(inputs.args["q"], self.case.head_dim_v)
        function = flashtile.attention_varlen_with_lse if inputs.varlen else flashtile.attention_with_lse
        with poison.allocations():
            got, lse = function(**inputs.args, out=out, plan=self._plan(problem, Device.of(device)))
        expected = expected_forward(make_forward_inputs(self.case, "cpu", seed=1))
        assert_close(got.cpu(), lse.cpu(), *expected, dtype=got.dtype, cpu_engine=device == "cpu", what=str(self))

    def _plan(self, problem: Problem, device: Device) -> ForwardPlan:
        if self.kernel == CPU:
            return plan_forward(problem, device)
        tile = self.tile or self._fitting(problem, device)
        plan = forward_plan_for_tile(problem, device, tile, "explicit")
        if self.num_programs:
            plan = plan.with_(num_programs=self.num_programs)
        return plan_forward(problem, device, plan=plan)

    def _fitting(self, problem: Problem, device: Device) -> ForwardTile:
        longest = max(problem.head_dim, problem.head_dim_v)
        base = ForwardTile(self.rows, 64, 4, 2)
        for shapes in portable_tiles(longest, forward_mma(problem, base, device)):
            for tile in shapes:
                if tile.block_m == self.rows and not forward_misfits(problem, tile, device):
                    return tile
        raise UnsupportedError("No such tile:", {self.kernel: [f"no tile of {self.rows} rows fits"]})


def trials(device: str) -> list[Trial]:
    """Every tile of every kernel with every case; Hopper's also where two programs walk all tiles."""
    return [trial for case in CASES for trial in _tiles(case, device)]


def _tiles(case: ForwardCase, device: str) -> Iterator[Trial]:
    if device == "cpu":
        yield Trial(case, CPU, 0)
        return
    if Device.of(device).arch == "sm_90":
        for tile in HOPPER_TILES:
            yield Trial(case, GLUON_FORWARD_SM90, tile.block_m, tile, 2)
            if case.name in ALSO_ALONE:
                yield Trial(case, GLUON_FORWARD_SM90, tile.block_m, tile)
    yield from (Trial(case, TRITON_FORWARD, rows) for rows in PORTABLE_ROWS)
