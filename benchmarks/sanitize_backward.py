"""Backward calls for compute-sanitizer: every kernel's own choice, Hopper's in two passes and in one, small portable tiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from flashtile import Device, UnsupportedError
from flashtile.kernels.call import BackwardCall
from flashtile.ops.prepared import bound, kernel_module
from flashtile.planner.backward_rules import choose_backward_plan
from flashtile.planner.catalog import CPU_BACKWARD, GLUON_BACKWARD_SM90, TRITON_BACKWARD, kernel_named, kernels_of
from flashtile.planner.choose import plan_backward
from flashtile.planner.plans import BackwardPlan
from flashtile.problem import Problem
from flashtile.testing import poison
from flashtile.testing.backward_inputs import BACKWARD_CASES, Gradients, assert_gradients, backward_call, backward_problem, gradients_of
from flashtile.testing.forward_cases import ForwardCase
from flashtile.testing.forward_inputs import make_forward_inputs
from flashtile.testing.tensors import on_device

BASE = "dim_128_group_4"
ALSO_ALONE = (BASE, "varlen_cross_bf16")  # a program for each tile as well
NAMES = (
    BASE, "q193_k191_causal", "varlen", "varlen_cross_bf16", "varlen_spare_rows", "varlen_seqused", "window_both_sides", "sinks",
    "softcap_window_bf16", "alibi", "large_logits_dim_128_bf16", "dim_96", "dim_192_value_128", "dim_256", "dim_64_value_128",
)  # fmt: skip
CASES = tuple(case for name in NAMES for case in BACKWARD_CASES if case.name == name)
# Hopper's tiles for heads up to 128 and up to 64, whichever the case's head dims let in; two programs walk all tiles
USUAL = BackwardPlan(GLUON_BACKWARD_SM90, 64, 128, 8, 3, 128, 64, 8, 4, num_programs=2, source="explicit")
SHORT = BackwardPlan(GLUON_BACKWARD_SM90, 128, 128, 8, 3, 128, 128, 8, 3, num_programs=2, source="explicit")
WHOLE = (USUAL.with_(one_pass=True, num_stages=2), SHORT.with_(one_pass=True, num_stages=2))
HOPPER_PLANS = (USUAL, SHORT, USUAL.with_(num_stages=2, dq_num_stages=3), *WHOLE)
PORTABLE_PLANS = tuple(BackwardPlan(TRITON_BACKWARD, m, n, 4, 2, n, m, 4, 2, source="explicit") for m, n in ((64, 64), (32, 64), (16, 32)))


class Trial(NamedTuple):
    """One call: a case, a kernel, and its plan (None: the kernel's own choice)."""

    case: ForwardCase
    kernel: str
    plan: BackwardPlan | None = None

    def __str__(self) -> str:
        return " ".join((self.kernel, *_words(self.plan), self.case.name))

    def run(self, device: str) -> None:
        """One checked call; raises UnsupportedError where no such plan fits.

        The reference stays on the CPU: torch's own kernels have names that the tools would take for ours.
        """
        inputs, there = (make_forward_inputs(self.case, where, seed=1) for where in ("cpu", device))
        problem, call = backward_problem(there), backward_call(inputs)
        plan = self.chosen(problem, Device.of(device))
        fields = {name: on_device(value, device) if isinstance(value, torch.Tensor) else value for name, value in call._asdict().items()}
        moved = BackwardCall(**fields | {name: there.args[name] for name in ("q", "k", "v")})
        with poison.allocations():
            bound(kernel_module(plan), problem, plan, moved.q.device)(moved)
        found = (None if gradient is None else gradient.cpu() for gradient in gradients_of(moved))
        assert_gradients(inputs, call, Gradients(*found), what=str(self))  # type: ignore[arg-type]

    def chosen(self, problem: Problem, device: Device) -> BackwardPlan:
        """The plan that runs; raises UnsupportedError, with its reasons, where the planner refuses it."""
        plan: BackwardPlan | list[str] = self.plan or kernel_named(self.kernel).reasons_against(problem, device)
        plan = plan or choose_backward_plan(problem, device, self.kernel)
        if not isinstance(plan, BackwardPlan):
            raise UnsupportedError("No plan of one kernel alone:", {self.kernel: plan})
        return plan_backward(problem, device, plan=plan)


def _words(plan: BackwardPlan | None) -> tuple[str, ...]:
    """What tells a plan from the others of its kernel."""
    if plan is None:
        return ("own choice",)
    keys = f"n{plan.block_n}m{plan.block_m}r{plan.num_stages}"
    queries = "one pass" if plan.one_pass else f"m{plan.dq_block_m}n{plan.dq_block_n}r{plan.dq_num_stages}"
    return (keys, queries, *([f"programs{plan.num_programs}"] if plan.num_programs else []))


def trials(device: str) -> list[Trial]:
    """Every variant of every kernel with every case."""
    return [trial for case in CASES for trial in _variants(case, device)]


def _variants(case: ForwardCase, device: str) -> Iterator[Trial]:
    if device == "cpu":
        yield Trial(case, CPU_BACKWARD)
        return
    known = Device.of(device)
    for kernel in kernels_of("backward"):
        if known.backend in kernel.backends and known.arch in (kernel.architectures or (known.arch,)):
            yield Trial(case, kernel.name)
    if known.arch == "sm_90":
        for plan in HOPPER_PLANS:
            yield Trial(case, GLUON_BACKWARD_SM90, plan)
            if case.name in ALSO_ALONE:
                yield Trial(case, GLUON_BACKWARD_SM90, plan.with_(num_programs=0))
    yield from (Trial(case, TRITON_BACKWARD, plan) for plan in PORTABLE_PLANS)
