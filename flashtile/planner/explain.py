"""explain: a plan of any operation in words and numbers."""

from __future__ import annotations

from collections.abc import Sequence

from flashtile.errors import ArgumentError, message
from flashtile.planner.backward_explain import BackwardExplanation, explain_backward
from flashtile.planner.decode_explain import Explanation, explain_decode
from flashtile.planner.device import Device
from flashtile.planner.forward_explain import ForwardExplanation, explain_forward
from flashtile.planner.plans import BackwardPlan, DecodePlan, ForwardPlan, Plan
from flashtile.planner.wording import Compiled
from flashtile.problem import Problem


def explain(
    problem: Problem, device: Device, plan: Plan | None = None, *, compiled: Compiled | Sequence[Compiled] | None = None
) -> Explanation | ForwardExplanation | BackwardExplanation:
    """Explains a plan of the problem's operation, by default the one that the planner chooses.

    ``compiled`` replaces the estimates of registers and shared memory by a compiler's; a backward plan has one for each pass, first of
    that over keys. Raises UnsupportedError for a plan that cannot run, ArgumentError for one of another operation.
    """
    facts = () if compiled is None else tuple(compiled) if isinstance(compiled, Sequence) else (compiled,)
    if problem.operation == "backward":
        if not isinstance(plan, BackwardPlan | None):
            raise _of_another("BackwardPlan", "plan_backward", plan)
        return explain_backward(problem, device, plan, compiled=facts)
    first = facts[0] if facts else None
    if problem.operation == "forward":
        if not isinstance(plan, ForwardPlan | None):
            raise _of_another("ForwardPlan", "plan_forward", plan)
        return explain_forward(problem, device, plan, compiled=first)
    if not isinstance(plan, DecodePlan | None):
        raise _of_another("DecodePlan", "plan_decode", plan)
    return explain_decode(problem, device, plan, compiled=first)


def _of_another(expected: str, maker: str, plan: Plan) -> ArgumentError:
    return ArgumentError(message("plan", f"a {expected}", f"a {type(plan).__name__}", f"{maker} makes one."))
