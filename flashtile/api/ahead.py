"""warmup: plan and compile ahead of the first call."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from flashtile import ops
from flashtile.planner.choose import plan_backward, plan_decode, plan_forward
from flashtile.planner.device import Device
from flashtile.planner.plans import Plan
from flashtile.problem import Problem

_PLANNERS: dict[str, Callable[[Problem, Device], Plan]] = {"decode": plan_decode, "forward": plan_forward, "backward": plan_backward}


def warmup(problems: Iterable[Problem], device: torch.device | str | None = None) -> list[Plan]:
    """Plans problems and compiles their kernels ahead of the first call.

    Args:
        problems: what will be called; ``Problem.decode(...)`` and ``Problem.forward(...)`` make one from a call's arguments,
            ``Problem(operation=..., batch=...)`` from numbers alone. The gradients of a forward problem are one of their own:
            ``problem.with_(operation="backward", lse=True)``, with ``deterministic=True`` beside it where calls ask for that.
        device: where they will run; by default the current GPU, or the CPU where there is none.

    Returns:
        The plan of each problem, in order: a DecodePlan, a ForwardPlan or a BackwardPlan.

    Raises:
        UnsupportedError: no kernel can run a problem on this device.
        ToolchainError: a kernel cannot be compiled on this machine.
    """
    where = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.empty(0, device=where).device  # "cuda" alone means the current GPU: give it its index
    figures = Device.of(where)
    plans: list[Plan] = []
    for problem in problems:
        plan = _PLANNERS[problem.operation](problem, figures)
        prepare = getattr(ops.kernel_module(plan), "prepare", None)
        if prepare is not None:
            prepare(problem, plan, where)
        plans.append(plan)
    return plans
