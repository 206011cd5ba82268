"""Plans of every operation: round trips through JSON, the cache, problems of nothing, and GPUs that nobody has seen."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from flashtile.errors import ArgumentError
from flashtile.planner.backward_rules import backward_infeasible
from flashtile.planner.choose import plan_backward, plan_decode, plan_forward
from flashtile.planner.device import Device
from flashtile.planner.feasible import infeasible
from flashtile.planner.forward_rules import forward_infeasible
from flashtile.problem import Problem

H200 = Device.named("H200")
SHAPE: dict[str, Any] = {"seqlen_k": 4096, "num_heads_q": 32, "num_heads_kv": 8}
PROBLEMS = {
    "decode": Problem(**SHAPE),
    "forward": Problem("forward", 4, 4096, **SHAPE),
    "backward": Problem("backward", 4, 4096, lse=True, **SHAPE),
}
PLANNERS: dict[str, Callable[[Problem, Device], Any]] = {"decode": plan_decode, "forward": plan_forward, "backward": plan_backward}
AGAINST: dict[str, Callable[..., list[str]]] = {"decode": infeasible, "forward": forward_infeasible, "backward": backward_infeasible}

pytestmark = pytest.mark.parametrize("operation", PROBLEMS)


def test_plans_survive_json(operation: str) -> None:
    plan = PLANNERS[operation](PROBLEMS[operation], H200)
    assert type(plan).from_json(plan.to_json()) == plan


def test_plans_are_cached_and_threads_agree(operation: str) -> None:
    planned, problem = PLANNERS[operation], PROBLEMS[operation]
    assert planned(problem, H200) is planned(problem.with_(), H200)
    with ThreadPoolExecutor(8) as pool:
        plans = list(pool.map(lambda n: (n % 4, planned(problem.with_(seqlen_k=5000 + n % 4), H200)), range(64)))
    assert len(set(plans)) == 4, "one plan for each of four lengths"


@pytest.mark.parametrize("changes", [{"batch": 0, "total_q": 0}, {"seqlen_q": 0, "total_q": 0}, {"seqlen_k": 0}], ids=str)
@pytest.mark.parametrize("device", ["H200", "A100", "cpu"])
def test_nothing_to_do_is_planned_too(operation: str, changes: dict[str, int], device: str) -> None:
    plan = PLANNERS[operation](PROBLEMS[operation].with_(**changes), Device.named(device))
    assert min(getattr(plan, name) for name in ("block_m", "block_n", "dq_block_m", "dq_block_n") if hasattr(plan, name)) > 0
    assert plan.num_programs >= 0


@pytest.mark.parametrize(("name", "major"), [("NVIDIA Never Seen", 15), ("Old", 5)])
def test_unknown_gpus_get_a_plan(operation: str, name: str, major: int) -> None:
    device = Device.from_properties(SimpleNamespace(name=name, major=major, minor=0, multi_processor_count=33), "cuda")
    problem = PROBLEMS[operation]
    assert AGAINST[operation](problem, PLANNERS[operation](problem, device), device) == []


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", "3", "{}", '{"kernel": 3, "block_m": 16}', '{"kernel": "triton.decode", "block_m": "16"}', '{"kernel": "a", "tile": 1}'],
)
def test_text_that_is_no_plan_is_refused(operation: str, text: str) -> None:
    plan = type(PLANNERS[operation](PROBLEMS[operation], H200))
    with pytest.raises(ArgumentError, match=rf"plan: expected a {operation} plan with fields .*to_json"):
        plan.from_json(text)
