"""What explanations of all operations share: a compiler's findings, kernels that cannot run, and a few turns of phrase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from flashtile.planner.device import Device
from flashtile.planner.plans import Plan
from flashtile.planner.resources import Footprint, programs_that_fit
from flashtile.planner.walk_cost import WalkCost
from flashtile.problem import Problem

ASKED = {"explicit": "the plan was asked for", "tuned": "a measurement overruled the model"}


class Compiled(Protocol):
    """What a compiler made of the plan's kernel."""

    @property
    def registers(self) -> int: ...
    @property
    def spilled_bytes(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def mma(self) -> str: ...


@dataclass(frozen=True)
class OtherKernel:
    """A kernel for this kind of device that cannot run the problem, or not with the tile that was asked for."""

    kernel: str
    reasons: tuple[str, ...]


def chooser(plan: Plan) -> str:
    """Who chose a plan."""
    return {"rule": "the rule", "tuned": "a tuned table", "explicit": "the caller"}[plan.source]


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 program", "4 programs"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def queries_in_words(problem: Problem) -> str:
    """Queries of a sequence: "1 query", "4 queries"."""
    return "1 query" if problem.seqlen_q == 1 else f"{problem.seqlen_q} queries"


def mask_in_words(problem: Problem) -> str:
    """The mask: "full", "causal", "window 1023, 0"."""
    band = problem.band
    if band.is_full:
        return "full"
    if band.left is None and band.right == 0:
        return "causal"
    left, right = ("unbounded" if side is None else str(side) for side in (band.left, band.right))
    return f"window {left}, {right}"


def head_dims_in_words(problem: Problem) -> str:
    """The head dim, or both where the values' is another."""
    return str(problem.head_dim) if problem.head_dim == problem.head_dim_v else f"{problem.head_dim} and {problem.head_dim_v}"


def dtypes_in_words(problem: Problem) -> str:
    """The dtype of all tensors, or q's and that of quantised keys and values."""
    return f"{problem.dtype_q} over {problem.dtype_k} keys and values" if problem.quantised else problem.dtype_k


def idle_in_words(problem: Problem) -> str | None:
    """What is done in the place of a plan where there is nothing to compute; None where there is."""
    if problem.total_q == 0:
        return "There is no query: nothing is launched."
    if problem.batch == 0 or problem.seqlen_k == 0:
        return "There is no key: results are filled in, and no kernel is launched."
    return None


def as_compiled(footprint: Footprint, compiled: Compiled | None, num_warps: int, device: Device) -> Footprint:
    """The footprint of ``num_warps`` with a compiler's findings, where there are any, in the place of the estimates."""
    if compiled is None:
        return footprint
    resident = programs_that_fit(compiled.shared_bytes, compiled.registers, num_warps, device)
    return footprint._replace(shared_memory=compiled.shared_bytes, registers=compiled.registers, resident=resident)


def footprint_in_words(shared_memory: int, registers: int, spilled_bytes: int | None, programs_per_sm: int, device: Device) -> str:
    """A footprint in a sentence; ``spilled_bytes`` is None where it is an estimate."""
    source, spilled = ("estimated", "") if spilled_bytes is None else ("as compiled", f", {spilled_bytes} bytes spilled")
    return (
        f"Footprint ({source}): {shared_memory} of {device.smem_per_block} bytes of shared memory, "
        f"{registers} registers a thread{spilled}; {counted(programs_per_sm, 'program')} an SM."
    )


def why_slower(cost: WalkCost, its: WalkCost, tiles: int, its_tiles: int, owned: str, walked: str) -> str:
    """Why tiles of the second cost lost to those of the first: the cause of time that differs most. ``owned`` and ``walked`` are nouns."""
    causes = {name: getattr(its, name) - getattr(cost, name) for name in WalkCost._fields}
    most = max(causes, key=lambda name: causes[name])
    took = f"{getattr(its, most):.1f} us instead of {getattr(cost, most):.1f}"
    words = {
        "memory_us": f"{its_tiles} tiles of {owned} instead of {tiles}, and each reads its {walked}: copies take {took}",
        "matrix_us": f"more {owned} and {walked} are computed for nobody: products take {took}",
        "exp_us": f"more scores are computed for nobody: exponentials take {took}",
        "exposed_us": f"less of it overlaps: {took} are exposed",
        "tail_us": f"SMs have no tile left for {took}",
        "start_us": f"{its_tiles} tiles of {owned} instead of {tiles} start and end: {took}",
    }
    return f"{words[most]}: {its.total_us:.1f} us against {cost.total_us:.1f}"
