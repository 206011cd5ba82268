"""warmup: plan and compile ahead of the first call."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from flashtile import ops
from flashtile.arguments import is_int
from flashtile.errors import ArgumentError, message
from flashtile.ops.ahead import PLANNERS, compile_ahead, distinct_kernels
from flashtile.planner.device import Device
from flashtile.planner.plans import Plan
from flashtile.problem import Problem


def warmup(problems: Iterable[Problem], device: torch.device | str | Device | None = None, *, jobs: int = 1) -> list[Plan]:
    """Plans problems and compiles their kernels ahead of the first call, on the GPU that they are for or without it.

    What is compiled lies in Triton's cache on disk, where later processes find it. A GPU that is here gets its kernels loaded too.
    Kernels are those of tensors as torch allocates them: contiguous, with addresses of a multiple of 16 bytes
    (docs/performance.md has what asks for others). Appends and rotary embeddings are no Problems: their kernels, which take a
    fraction of a second, are compiled at their first call.

    Args:
        problems: what will be called; ``Problem.decode(...)`` and ``Problem.forward(...)`` make one from a call's arguments,
            ``Problem(operation=..., batch=...)`` from numbers alone. A training step takes two: the forward call's ``with_(lse=True)``,
            which its gradients need, and that one's ``with_(operation="backward")``, with ``deterministic=True`` beside it where
            calls ask for that.
        device: where they will run; by default the current GPU, or the CPU where there is none. A Device, or the name of a GPU's
            model as ``Device.named`` knows it ("h200"), compiles for that GPU and loads nothing: none has to be here.
        jobs: processes that compile. More than one begin anew, as multiprocessing's "spawn" does: a script that asks for them
            guards its main part by ``if __name__ == "__main__"``.

    Returns:
        The plan of each problem, in order: a DecodePlan, a ForwardPlan or a BackwardPlan.

    Raises:
        ArgumentError: the device is neither torch's nor a model that is known.
        UnsupportedError: no kernel can run a problem on this device.
        ToolchainError: a kernel cannot be compiled on this machine.
    """
    if not is_int(jobs) or jobs < 1:
        raise ArgumentError(message("jobs", "an int of at least 1", repr(jobs), "Leave it out to compile in this process."))
    where = device_or_model(device)
    elsewhere = isinstance(where, Device)
    figures = where if isinstance(where, Device) else Device.of(where)
    planned = [(problem, PLANNERS[problem.operation](problem, figures)) for problem in _listed(problems)]
    if figures.is_gpu and (elsewhere or jobs > 1):
        kernels = [kernel for _, kernel in distinct_kernels(planned)]
        for _ in compile_ahead(kernels, figures.arch, jobs):
            pass
    for problem, plan in planned:
        prepare = None if elsewhere else getattr(ops.kernel_module(plan), "prepare", None)
        if prepare is not None:
            prepare(problem, plan, where)
    return [plan for _, plan in planned]


def _listed(problems: Iterable[Problem]) -> list[Problem]:
    found = list(problems) if isinstance(problems, Iterable) else [problems]
    for problem in found:
        if not isinstance(problem, Problem):
            raise ArgumentError(
                message("problems", "Problems, several of them", repr(problem), "Problem.decode describes a call, for one.")
            )
    return found


def device_or_model(device: torch.device | str | Device | None) -> torch.device | Device:
    """A device of torch's, with its index; or a GPU's model, by its figures or its name. None: the current GPU, else the CPU."""
    if isinstance(device, Device):
        return device
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device, str):
        known = Device.model(device)
        if known is not None:
            return known
        try:
            device = torch.device(device)
        except RuntimeError:
            names = ", ".join(name for name in Device.names() if name != "cpu")
            expected = f"a device of torch's (cuda, cuda:1, cpu) or a GPU's model ({names})"
            raise ArgumentError(message("device", expected, repr(device), "Case, spaces and dashes of a model do not count.")) from None
    return torch.empty(0, device=device).device  # "cuda" alone means the current GPU: give it its index
