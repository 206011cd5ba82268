"""What the operations share: bound kernels and how many are remembered, calls that need no kernel, and a call's results."""

from __future__ import annotations

import importlib
import math
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch

from flashtile.arguments import check_number, is_int
from flashtile.errors import ArgumentError, message
from flashtile.facts import Key
from flashtile.kernels.call import DecodeCall, ForwardCall
from flashtile.ops.modes import apart_from_callers_modes
from flashtile.planner.catalog import module_of
from flashtile.planner.plans import Plan
from flashtile.problem import Problem

MAX_PREPARED = 4096  # kinds of calls of one operation
PREPARING = threading.RLock()

Call = DecodeCall | ForwardCall
Result = tuple[torch.Tensor, torch.Tensor | None]
T = TypeVar("T")


class Shape(NamedTuple):
    """What a prepared call's results are, and its default scale."""

    dtype_out: torch.dtype
    out_like_q: bool
    head_dim_v: int
    scale: float


def shape_of(problem: Problem) -> Shape:
    like_q = problem.dtype_out == problem.dtype_q and problem.head_dim_v == problem.head_dim
    return Shape(getattr(torch, problem.dtype_out), like_q, problem.head_dim_v, problem.head_dim**-0.5)


def results(q: torch.Tensor, out: torch.Tensor | None, shape: Shape, want_lse: bool) -> Result:
    """out, allocated unless given, and lse if it is wanted: both to be written."""
    if out is None:
        if shape.out_like_q:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
        else:
            out = torch.empty((*q.shape[:-1], shape.head_dim_v), dtype=shape.dtype_out, device=q.device)
    if not want_lse:
        return out, None
    *batch, queries, heads, _ = q.shape
    return out, torch.empty((*batch, heads, queries), dtype=torch.float32, device=q.device)


def remember(prepared: dict[Key, T], key: Key | None, value: T) -> T:
    """Stores a value under its key, and forgets the oldest where there are too many. PREPARING has to be held."""
    if key is not None:
        if len(prepared) >= MAX_PREPARED:
            prepared.pop(next(iter(prepared)))
        prepared[key] = value
    return value


def kernel_module(plan: Plan) -> ModuleType:
    """The module of the kernel that a plan names, imported now."""
    return importlib.import_module(module_of(plan.kernel))


def bound(module: ModuleType, problem: Problem, plan: Plan, device: torch.device) -> Any:
    """The kernel's runner for calls of the problem."""
    run = module.bind(problem, plan, device)
    return _apart_from_callers_modes(run, device) if device.type == "cpu" else run


def _apart_from_callers_modes(run: Callable[[Any], None], device: torch.device) -> Callable[[Any], None]:
    """The runner of a CPU engine, whose operations are torch's."""

    def run_apart(call: Any) -> None:
        with apart_from_callers_modes(device):
            run(call)

    return run_apart


def has_scores(problem: Problem, holds_keys: bool) -> bool:
    """Whether a call may have both queries and keys; else there is nothing for a kernel to do."""
    return problem.total_q > 0 and holds_keys and problem.seqlen_k > 0 and problem.batch > 0


def runner_without_kernel(problem: Problem, holds_keys: bool) -> Callable[[Call], None] | None:
    """The runner of calls without queries or keys; None where there are both."""
    if has_scores(problem, holds_keys):
        return None
    return _run_nothing if problem.total_q == 0 else _run_without_keys


def _run_nothing(call: Call) -> None:
    """No query: out and lse have no element."""


@torch.no_grad()
def _run_without_keys(call: Call) -> None:
    """No sequence, or none that could have a key: out 0, lse that of the sink alone."""
    call.out.zero_()
    if call.lse is not None:
        call.lse.fill_(-math.inf)
        if call.sinks is not None:
            call.lse.copy_(call.sinks[:, None].expand_as(call.lse))
            _forget_unowned_rows(call)


def _forget_unowned_rows(call: Call) -> None:
    """Packed rows beyond the last sequence belong to nobody: their lse is -inf, sink or none."""
    if call.cu_seqlens_q is not None and call.lse is not None:
        rows = torch.arange(call.q.shape[0], device=call.q.device)
        call.lse.masked_fill_(rows >= call.cu_seqlens_q[-1], -math.inf)


def as_float(name: str, value: object, minimum: float | None = None) -> float:
    """The number as a float; raises ArgumentError unless it is finite and at least ``minimum``."""
    check_number(name, value, minimum)
    return float(value)  # type: ignore[arg-type]


def check_choice(plan: object, kind: type[Plan], **counts: object) -> None:
    """What a caller chose instead of the planner: counts by their names, or a whole plan of the operation's kind."""
    for name, value in counts.items():
        if value is not None and not (is_int(value) and value > 0):  # type: ignore[operator]
            raise ArgumentError(message(name, "an int of at least 1, or None", repr(value), "Leave it out to have it planned."))
    if plan is None:
        return
    if not isinstance(plan, kind):
        raise ArgumentError(
            message("plan", f"a {kind.__name__} or None", type(plan).__name__, f"{kind.__name__}.from_json reads one from text.")
        )
    if plan.block_m < 1:
        raise ArgumentError(message("plan", "a block_m of at least 1", plan.block_m, "The planner's own plans have one."))
