"""What explanations share: a compiler's findings, kernels that cannot run, work and time of a prediction, and a few turns of phrase."""

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


@dataclass(frozen=True)
class Prediction:
    """Bytes, FLOP and microseconds of a plan for whole sequences; ``bound`` is what takes the time."""

    problem: Problem
    device: Device
    bytes_moved: int
    flops: int
    roofline_matrix_us: float
    roofline_exp_us: float
    roofline_memory_us: float
    predicted_us: float
    bound: str

    @property
    def intensity(self) -> float:
        """FLOP a byte."""
        return self.flops / self.bytes_moved if self.bytes_moved else 0.0

    @property
    def roofline_us(self) -> float:
        """What the device needs at least."""
        return max(self.roofline_matrix_us, self.roofline_exp_us, self.roofline_memory_us)

    @property
    def tflops(self) -> float:
        """Predicted 1e12 FLOP a second."""
        return self.flops / self.predicted_us * 1e-6 if self.predicted_us else 0.0

    def derived(self) -> dict[str, float]:
        """What follows from the fields, for a JSON document that has them."""
        return {"intensity": self.intensity, "roofline_us": self.roofline_us, "tflops": self.tflops}

    def work_in_words(self, of_flops: str = "") -> str:
        """The work and its roofline in a sentence; ``of_flops`` says something of the FLOP."""
        return (
            f"Work: {self.flops / 1e9:.2f} GFLOP{of_flops}, {self.bytes_moved / 1e6:.1f} MB, {self.intensity:.0f} FLOP a byte; "
            f"roofline {self.roofline_us:.1f} us (matrix {self.roofline_matrix_us:.1f}, exp {self.roofline_exp_us:.1f}, "
            f"memory {self.roofline_memory_us:.1f})."
        )

    def time_in_words(self, parts: str) -> str:
        """The predicted time in a sentence, with its parts in brackets where there are any."""
        which = f" ({parts})" if parts else ""
        return f"Bound by {self.bound}: predicted {self.predicted_us:.1f} us, {self.tflops:.1f} TFLOP/s{which}."


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


def asked_in_words(problem: Problem, plan: Plan, device: Device) -> str:
    """A problem of whole sequences, the device, the kernel, and who chose it."""
    return (
        f"{problem.batch} x {queries_in_words(problem)} over {problem.seqlen_k} keys ({mask_in_words(problem)}), "
        f"{problem.num_heads_q}/{problem.num_heads_kv} heads, head dim {head_dims_in_words(problem)}, {problem.dtype_k} on {device.name}: "
        f"kernel {plan.kernel}, chosen by {chooser(plan)}"
    )


def causes_in_words(cost: WalkCost) -> str:
    """Predicted microseconds by cause: "matrix 12.3, exp 4.5, ..."."""
    return ", ".join(f"{name.removesuffix('_us')} {value:.1f}" for name, value in cost._asdict().items())


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
