"""A backward plan in words and numbers: both passes, what limits them, and why each other tile lost. Needs no GPU and no Triton."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flashtile.planner.backward_alternatives import BackwardAlternative, backward_alternatives, backward_kernels_passed_over
from flashtile.planner.backward_cost import backward_bytes, backward_cost, backward_flops, backward_roofline_us, backward_workspace
from flashtile.planner.backward_footprint import pass_footprint, pass_mma_name
from flashtile.planner.backward_tiles import Owner, PassTile, pass_tiles
from flashtile.planner.backward_work import owned_tiles, seen_by
from flashtile.planner.choose import plan_backward
from flashtile.planner.device import Device
from flashtile.planner.forward_work import TileKinds, tile_kinds
from flashtile.planner.plans import BackwardPlan
from flashtile.planner.resources import Footprint
from flashtile.planner.walk_cost import WalkCost
from flashtile.planner.wording import (
    Compiled,
    OtherKernel,
    Prediction,
    as_compiled,
    asked_in_words,
    causes_in_words,
    counted,
    footprint_in_words,
    idle_in_words,
)
from flashtile.problem import Problem


@dataclass(frozen=True)
class PassExplanation:
    """One pass explained. Bytes and microseconds.

    ``tiles`` of ``owned`` keys or queries are those of all sequences and heads; ``walked_tiles`` are steps of all of them together,
    ``masked_tiles`` of them with a mask. ``waves`` is tiles over SMs; ``tail_tiles`` are those of the last, unfilled wave.
    """

    owner: Owner
    adds_dq: bool
    owned: int
    step: int
    mma: str
    tiles: int
    rows_wasted: int
    walked_tiles: int
    masked_tiles: int
    programs_per_sm: int
    waves: float
    full_waves: int
    tail_tiles: int
    shared_memory: int
    registers: int
    spilled_bytes: int | None
    cost: WalkCost
    predicted_us: float
    bound: str

    @property
    def masked_share(self) -> float:
        """Share of the walked tiles that need a mask."""
        return self.masked_tiles / self.walked_tiles if self.walked_tiles else 0.0


@dataclass(frozen=True)
class BackwardExplanation(Prediction):
    """One backward plan explained. Bytes, FLOP and microseconds; ``bound`` is that of the longer pass.

    In one pass ``queries`` is None, and ``dq_us`` what zeroing and rounding dQ's sums takes. ``workspace`` is what the call allocates
    beside its results.
    """

    plan: BackwardPlan
    keys: PassExplanation
    queries: PassExplanation | None
    delta_us: float
    dq_us: float
    workspace: int
    is_compiled: bool
    alternatives: tuple[BackwardAlternative, ...]
    other_kernels: tuple[OtherKernel, ...]

    @property
    def passes(self) -> tuple[PassExplanation, ...]:
        """The passes that there are."""
        return (self.keys,) if self.queries is None else (self.keys, self.queries)

    def to_json(self) -> str:
        """Everything as JSON text; the passes' costs by cause."""
        data: dict[str, Any] = asdict(self)
        for one in self.passes:
            data[one.owner] |= {"cost": one.cost._asdict(), "masked_share": one.masked_share}
        return json.dumps(data | self.derived(), sort_keys=True)

    def lines(self) -> list[str]:
        """Plain sentences for a person."""
        return [*_lines(self)]


def explain_backward(
    problem: Problem, device: Device, plan: BackwardPlan | None = None, *, compiled: Sequence[Compiled] = ()
) -> BackwardExplanation:
    """Explains a backward plan, by default the one that the planner chooses.

    ``compiled`` replaces the estimates of the passes, over keys and over queries, by a compiler's findings. Raises
    UnsupportedError for a plan that cannot run.
    """
    plan = plan_backward(problem, device, plan=plan)
    tiles = pass_tiles(plan)
    facts: Sequence[Compiled | None] = compiled or [None] * len(tiles)
    footprints = [as_compiled(pass_footprint(problem, tile, device), found, tile.num_warps, device) for tile, found in zip(tiles, facts)]
    cost = backward_cost(problem, tiles, footprints, device)
    keys = _pass(problem, tiles[0], footprints[0], cost.keys, device, facts[0])
    queries = None if cost.queries is None else _pass(problem, tiles[1], footprints[1], cost.queries, device, facts[1])
    matrix_us, exp_us, memory_us = backward_roofline_us(problem, device)
    return BackwardExplanation(
        problem=problem,
        device=device,
        plan=plan,
        keys=keys,
        queries=queries,
        delta_us=cost.delta_us,
        dq_us=cost.dq_us,
        workspace=backward_workspace(problem, one_pass=plan.one_pass) if device.is_gpu else 0,
        is_compiled=bool(compiled),
        bytes_moved=backward_bytes(problem),
        flops=backward_flops(problem),
        roofline_matrix_us=matrix_us,
        roofline_exp_us=exp_us,
        roofline_memory_us=memory_us,
        predicted_us=cost.total_us,
        bound=max(keys, queries or keys, key=lambda one: one.predicted_us).bound,
        alternatives=tuple(backward_alternatives(problem, device, plan, cost)) if device.is_gpu and not idle_in_words(problem) else (),
        other_kernels=tuple(backward_kernels_passed_over(problem, device, plan)),
    )


def _pass(
    problem: Problem, tile: PassTile, footprint: Footprint, cost: WalkCost, device: Device, compiled: Compiled | None
) -> PassExplanation:
    seen = seen_by(problem, tile.owner)
    tiles = owned_tiles(problem, tile)
    walks = problem.batch * problem.num_heads_q  # each query head of a group is walked by itself
    kinds = tile_kinds(seen, tile.owned, tile.step) if device.is_gpu else TileKinds(0, 0)
    return PassExplanation(
        owner=tile.owner,
        adds_dq=tile.adds_dq,
        owned=tile.owned,
        step=tile.step,
        mma=(compiled.mma if compiled else "") or pass_mma_name(problem, tile, device),
        tiles=tiles,
        rows_wasted=-seen.seqlen_q % tile.owned,
        walked_tiles=walks * kinds.walked,
        masked_tiles=walks * kinds.masked,
        programs_per_sm=footprint.resident,
        waves=tiles / device.num_sms,
        full_waves=tiles // device.num_sms,
        tail_tiles=tiles % device.num_sms,
        shared_memory=footprint.shared_memory,
        registers=footprint.registers,
        spilled_bytes=compiled.spilled_bytes if compiled else None,
        cost=cost,
        predicted_us=cost.total_us,
        bound=cost.bound,
    )


def _lines(e: BackwardExplanation) -> Iterator[str]:
    plan, problem, device = e.plan, e.problem, e.device
    yield f"Gradients of {asked_in_words(problem, plan, device)}."
    idle = idle_in_words(problem)
    if idle:
        yield idle
        return
    if device.is_gpu:
        for tile, one in zip(pass_tiles(plan), e.passes):
            yield from _pass_lines(tile, one, device)
        sums = ", most of it dQ's sums in float32, which come in no fixed order" if plan.one_pass else ""
        yield f"Workspace: {e.workspace / 1e6:.1f} MB{sums}."
    yield e.work_in_words(" (2.5 times the forward's)")
    parts = f"delta {e.delta_us:.1f}, "
    if e.queries is None:
        parts += f"dK, dV and dQ's sums {e.keys.predicted_us:.1f}, their zeros and rounding {e.dq_us:.1f}"
    else:
        parts += f"dK and dV {e.keys.predicted_us:.1f}, dQ {e.queries.predicted_us:.1f}"
    yield e.time_in_words(parts if device.is_gpu else "")
    for kernel in e.other_kernels:
        yield f"Not kernel {kernel.kernel}: {'; '.join(kernel.reasons)}."
    for other in e.alternatives:
        owner = "" if other.kernel == plan.kernel else f" of {other.kernel}"
        if other.passes:
            yield f"Not {other.passes_in_words}{owner}: {other.why}."
            continue
        yield f"Not {other.owned} {other.owner} a program{owner}: {other.why}."


def _pass_lines(tile: PassTile, one: PassExplanation, device: Device) -> Iterator[str]:
    name, walked = ("dK and dV", "queries") if one.owner == "keys" else ("dQ", "keys")
    which = "One pass, over keys (dK, dV and dQ)" if one.adds_dq else f"Pass over {one.owner} ({name})"
    yield (
        f"{which}: {one.owned} {one.owner} a program, {one.step} {walked} a step, "
        f"{counted(tile.num_warps, 'warp')}, {counted(tile.num_stages, 'stage')}; "
        f"{one.rows_wasted} {one.owner} of a head's last tile empty; products by {one.mma}."
    )
    yield f"  {footprint_in_words(one.shared_memory, one.registers, one.spilled_bytes, one.programs_per_sm, device)}"
    yield (
        f"  Schedule: {counted(one.tiles, 'tile')} of {one.owner} on {device.num_sms} SMs: {counted(one.full_waves, 'full wave')} "
        f"and a tail of {counted(one.tail_tiles, 'tile')}; {100 * one.masked_share:.1f}% of {one.walked_tiles} tiles of {walked} masked."
    )
    yield f"  Bound by {one.bound}: predicted {one.predicted_us:.1f} us ({causes_in_words(one.cost)})."
