"""Which plans an operation runs by."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from flashtile.planner.plans import Plan
from flashtile.problem import Problem


def bound_plans(ops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that gets each plan that the operation of a module of `flashtile.ops` binds from now on, when it binds it."""
    found: list[Any] = []
    module_of = ops.kernel_module

    def bind(problem: Problem, plan: Plan, device: torch.device) -> Any:
        found.append(plan)
        return module_of(plan).bind(problem, plan, device)

    monkeypatch.setattr(ops, "kernel_module", lambda plan: SimpleNamespace(bind=bind))
    monkeypatch.setattr(ops, "_PREPARED", {})
    return found
