"""A forward plan in words and numbers: what it does, what limits it, and why each other tile lost. Needs no GPU and no Triton."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from flashtile.errors import UnsupportedError
from flashtile.planner.catalog import GLUON_FORWARD_SM90
from flashtile.planner.choose import plan_decode, plan_forward
from flashtile.planner.cost import predict_us
from flashtile.planner.device import Device
from flashtile.planner.forward_alternatives import ForwardAlternative, forward_alternatives, forward_kernels_passed_over
from flashtile.planner.forward_cost import forward_bytes, forward_cost, forward_flops, roofline_us
from flashtile.planner.forward_footprint import forward_footprint, forward_mma_name
from flashtile.planner.forward_work import TileKinds, row_tiles, tile_kinds
from flashtile.planner.plans import ForwardPlan
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

FEW_TILES_PERCENT = 50  # row tiles in percent of the SMs below which most of the device idles, and decode may be faster: it splits keys


@dataclass(frozen=True)
class ForwardExplanation(Prediction):
    """One forward plan explained. Bytes, FLOP and microseconds.

    ``row_tiles`` are those of all sequences and heads; ``key_tiles`` are walked by all of them together, ``masked_tiles`` of them
    with a mask. ``waves`` is row tiles over SMs; ``tail_tiles`` are those of the last, unfilled wave. ``decode_us`` is what
    ``decode`` is predicted to take, where it may be faster.
    """

    plan: ForwardPlan
    mma: str
    row_tiles: int
    rows_wasted: int
    key_tiles: int
    masked_tiles: int
    programs: int
    programs_per_sm: int
    waves: float
    full_waves: int
    tail_tiles: int
    shared_memory: int
    registers: int
    is_compiled: bool
    spilled_bytes: int | None
    cost: WalkCost
    alternatives: tuple[ForwardAlternative, ...]
    other_kernels: tuple[OtherKernel, ...]
    decode_us: float | None

    @property
    def masked_share(self) -> float:
        """Share of the walked key tiles that need a mask."""
        return self.masked_tiles / self.key_tiles if self.key_tiles else 0.0

    def to_json(self) -> str:
        """Everything as JSON text; the cost by cause."""
        data: dict[str, Any] = asdict(self)
        data["cost"] = self.cost._asdict()
        data |= {"masked_share": self.masked_share, **self.derived()}
        return json.dumps(data, sort_keys=True)

    def lines(self) -> list[str]:
        """Plain sentences for a person."""
        return [*_lines(self)]


def explain_forward(
    problem: Problem, device: Device, plan: ForwardPlan | None = None, *, compiled: Compiled | None = None
) -> ForwardExplanation:
    """Explains a forward plan, by default the one that the planner chooses.

    ``compiled`` replaces the estimates of registers and shared memory by a compiler's. Raises UnsupportedError for a plan
    that cannot run.
    """
    plan = plan_forward(problem, device, plan=plan)
    footprint = as_compiled(forward_footprint(problem, plan, device), compiled, plan.num_warps, device)
    cost = forward_cost(problem, plan, footprint, device)
    tiles = row_tiles(problem, plan.block_m)
    heads = problem.batch * problem.num_heads_q
    kinds = tile_kinds(problem, plan.block_m, plan.block_n) if device.is_gpu else TileKinds(0, 0)
    matrix_us, exp_us, memory_us = roofline_us(problem, device)
    return ForwardExplanation(
        problem=problem,
        device=device,
        plan=plan,
        mma=(compiled.mma if compiled else "") or forward_mma_name(problem, plan, device),
        row_tiles=tiles,
        rows_wasted=-problem.seqlen_q % plan.block_m,
        key_tiles=heads * kinds.walked,
        masked_tiles=heads * kinds.masked,
        programs=plan.num_programs or tiles,
        programs_per_sm=footprint.resident,
        waves=tiles / device.num_sms,
        full_waves=tiles // device.num_sms,
        tail_tiles=tiles % device.num_sms,
        shared_memory=footprint.shared_memory,
        registers=footprint.registers,
        is_compiled=compiled is not None,
        spilled_bytes=compiled.spilled_bytes if compiled else None,
        bytes_moved=forward_bytes(problem),
        flops=forward_flops(problem),
        roofline_matrix_us=matrix_us,
        roofline_exp_us=exp_us,
        roofline_memory_us=memory_us,
        cost=cost,
        predicted_us=cost.total_us,
        bound=cost.bound,
        alternatives=tuple(forward_alternatives(problem, device, plan, cost)) if device.is_gpu and not idle_in_words(problem) else (),
        other_kernels=tuple(forward_kernels_passed_over(problem, device, plan)),
        decode_us=_decode_us(problem, device, tiles, cost),
    )


def _decode_us(problem: Problem, device: Device, tiles: int, cost: WalkCost) -> float | None:
    """What decode would take, where a few queries over many keys leave most SMs idle and it is faster; packed keys are not its."""
    if not device.is_gpu or problem.ragged_k or idle_in_words(problem) or 100 * tiles > FEW_TILES_PERCENT * device.num_sms:
        return None
    decode = problem.with_(operation="decode", seqused_k=False)
    try:
        plan = plan_decode(decode, device)
    except UnsupportedError:
        return None
    us = predict_us(decode, plan, device).total_us
    return us if plan.num_splits > 1 and us < cost.total_us else None


def _lines(e: ForwardExplanation) -> Iterator[str]:
    plan, problem, device = e.plan, e.problem, e.device
    yield f"{asked_in_words(problem, plan, device)}."
    idle = idle_in_words(problem)
    if idle:
        yield idle
        return
    if device.is_gpu:
        loading = " and one that loads" if plan.kernel == GLUON_FORWARD_SM90 else ""
        yield (
            f"Tile: block_m {plan.block_m}, {plan.block_n} keys a step, {counted(plan.num_warps, 'warp')}{loading}, "
            f"{counted(plan.num_stages, 'stage')}; {e.rows_wasted} rows of a head's last tile empty; products by {e.mma}."
        )
        yield footprint_in_words(e.shared_memory, e.registers, e.spilled_bytes, e.programs_per_sm, device)
        stay = "stays" if e.programs == 1 else "stay"
        who = f"{counted(e.programs, 'program')} that {stay}" if plan.num_programs else "a program each"
        yield (
            f"Schedule: {counted(e.row_tiles, 'tile')} of rows, {who}, on {device.num_sms} SMs: {counted(e.full_waves, 'full wave')} "
            f"and a tail of {counted(e.tail_tiles, 'tile')}; {100 * e.masked_share:.1f}% of {e.key_tiles} key tiles masked."
        )
    yield e.work_in_words()
    yield e.time_in_words(causes_in_words(e.cost))
    if e.decode_us is not None:
        yield (
            f"Consider decode, which splits the keys (predicted {e.decode_us:.1f} us): "
            f"there is a tile of rows for {e.row_tiles} of {device.num_sms} SMs."
        )
    for kernel in e.other_kernels:
        yield f"Not kernel {kernel.kernel}: {'; '.join(kernel.reasons)}."
    for other in e.alternatives:
        owner = "" if other.kernel == plan.kernel else f" of {other.kernel}"
        yield f"Not block_m {other.block_m}{owner}: {other.why}."
