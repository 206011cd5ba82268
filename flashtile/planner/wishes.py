"""A plan as the caller wishes it, or the first kernel's that has one; else why not, kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from flashtile.errors import ArgumentError, UnsupportedError, message
from flashtile.planner.catalog import kernel_named, kernels_of
from flashtile.planner.device import Device
from flashtile.planner.plans import Plan
from flashtile.problem import Problem

AnyPlan = TypeVar("AnyPlan", bound=Plan)


def first_able(operation: str, problem: Problem, device: Device, plan_of: Callable[[str], AnyPlan | list[str]], wished: bool) -> AnyPlan:
    """The plan of the first kernel of the catalog that has one; UnsupportedError with each kernel's reasons if none has."""
    reasons: dict[str, list[str]] = {}
    able = False
    for kernel in kernels_of(operation):
        reasons[kernel.name] = kernel.reasons_against(problem, device)
        if reasons[kernel.name]:
            continue
        able = True
        found = plan_of(kernel.name)
        if not isinstance(found, list):
            return found
        reasons[kernel.name] = found
    if not able:
        raise UnsupportedError(f"No kernel can run this {operation} on {device.name}:", reasons)
    raise UnsupportedError(f"No plan{' as asked' if wished else ''} can run this {operation} on {device.name}:", reasons)


def known(operation: str, plan: Plan) -> bool:
    """Whether the plan names a kernel of the operation."""
    return any(kernel.name == plan.kernel for kernel in kernels_of(operation))


def obeyed(operation: str, problem: Problem, device: Device, plan: AnyPlan, against: list[str], **wishes: int | None) -> AnyPlan:
    """The caller's plan as it is, unless it contradicts another wish, names no kernel of this operation, or has something against it."""
    for name, wanted in wishes.items():
        has = getattr(plan, name)
        if wanted is not None and wanted != has:
            raise ArgumentError(message(name, f"the plan's own, {has}", wanted, f"Leave {name} out beside a plan, or use plan.with_()."))
    if not known(operation, plan):
        names = ", ".join(kernel.name for kernel in kernels_of(operation))
        raise UnsupportedError("The plan cannot be obeyed:", {plan.kernel: [f"there is no such kernel; there are {names}"]})
    reasons = kernel_named(plan.kernel).reasons_against(problem, device) + against
    if reasons:
        raise UnsupportedError(f"The plan cannot be obeyed on {device.name}:", {plan.kernel: reasons})
    return plan
