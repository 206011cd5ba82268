"""Tests that need a GPU: without one, each is skipped and says why."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import flashtile
from flashtile import DecodePlan, Problem, reference
from flashtile.planner.device import Device
from flashtile.testing import poison
from flashtile.testing.cases import Case
from flashtile.testing.inputs import Inputs, hide_unseen, make_inputs
from flashtile.testing.tolerance import assert_close
from flashtile.testing.variants import PORTABLE, Share, kernels_choice

HERE = Path(__file__).parent
Check = Callable[..., None]
PlanOf = Callable[[Problem, Device, Share], DecodePlan]

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # of processes as many as cores, each computes its references


def _missing() -> str:
    """Why kernels cannot run on a GPU in this process; empty where they can."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter is on in this process: run tests/gpu by itself"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _missing()
    if not reason:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The current CUDA device; freed memory goes back after each test, since other workers share it."""
    yield torch.device("cuda", torch.cuda.current_device())
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


class Library:
    """``flashtile`` as it is, or with the portable kernel alone: what the planner prefers elsewhere must not leave that untested."""

    def __init__(self, kernel: str | None) -> None:
        self.kernel = kernel

    def decode_with_lse(self, *tensors: torch.Tensor, num_splits: int | None = None, **args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        args |= dict(zip(("q", "k_cache", "v_cache", "seqlens_k"), tensors))
        if self.kernel is None:
            return flashtile.decode_with_lse(**args, num_splits=num_splits)
        facts = {name: value for name, value in args.items() if name != "out"}
        problem = Problem.decode(**facts, out=args.get("out"), lse=True)
        plan = kernels_choice(problem, Device.of(args["q"]), self.kernel, num_splits)
        return flashtile.decode_with_lse(**args, plan=plan)

    def decode(self, *tensors: torch.Tensor, **args: Any) -> torch.Tensor:
        return self.decode_with_lse(*tensors, **args)[0]


@pytest.fixture(params=[None, PORTABLE], ids=["choice", "portable"])
def library(request: pytest.FixtureRequest) -> Library:
    return Library(request.param)


@pytest.fixture
def check_plans(device: torch.device) -> Check:
    """``check_plans(case, plan_of, shares, seed=0)``: plans of one kernel, shared out in several ways, against the reference in float64.

    ``plan_of(problem, device, share)`` makes a plan. Outputs and workspace start as NaN, and so does every key that no query
    sees. Raises UnsupportedError where the planner refuses the plan.
    """

    def check(case: Case, plan_of: PlanOf, shares: tuple[Share, ...], seed: int = 0) -> None:
        inputs = hide_unseen(make_inputs(case, device, seed=seed))
        expected = reference.decode(**make_inputs(case, "cpu", seed=seed).args)
        problem = Problem.decode(**inputs.args, lse=True)
        for share in shares:
            plan = plan_of(problem, Device.of(device), share)
            run_poisoned(inputs, expected, plan, f"{case.name}, {plan.to_json()}")

    return check


def run_poisoned(inputs: Inputs, expected: tuple[torch.Tensor, torch.Tensor], plan: DecodePlan, what: str) -> None:
    args: dict[str, Any] = inputs.args
    out, _ = poison.outputs(args["q"], inputs.case.head_dim_v)
    with poison.allocations():
        got, lse = flashtile.decode_with_lse(**args, out=out, plan=plan)
    assert got is out
    assert_close(out.cpu(), lse.cpu(), *expected, dtype=inputs.dtype, what=what)
