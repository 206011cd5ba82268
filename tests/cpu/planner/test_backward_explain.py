"""explain for backward: right numbers of both passes, and a reason for every tile and kernel that lost."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, NamedTuple

import pytest

from flashtile.band import Band
from flashtile.errors import ArgumentError, UnsupportedError
from flashtile.planner.backward_explain import BackwardExplanation, explain_backward
from flashtile.planner.backward_rules import one_pass_plan
from flashtile.planner.backward_tiles import pass_tiles
from flashtile.planner.catalog import CPU_BACKWARD, GLUON_BACKWARD_SM90, TRITON_BACKWARD, TRITON_FORWARD
from flashtile.planner.device import Device
from flashtile.planner.explain import explain
from flashtile.planner.forward_explain import explain_forward
from flashtile.planner.plans import BackwardPlan, DecodePlan, ForwardPlan
from flashtile.problem import Problem

H200 = Device.named("H200")
A100 = Device.named("A100")
TRAINING = Problem("backward", 4, 4096, seqlen_k=4096, num_heads_q=16, num_heads_kv=4, head_dim=64, lse=True)
PLAN = BackwardPlan(TRITON_BACKWARD, 32, 64, 4, 2, 64, 32, 4, 2)


class Facts(NamedTuple):
    registers: int
    spilled_bytes: int
    shared_bytes: int
    mma: str


@pytest.mark.parametrize("name", Device.names())
def test_every_device_is_explained(name: str) -> None:
    explanation = explain_backward(TRAINING, Device.named(name))
    assert all(row.why for row in explanation.alternatives)
    assert all(row.feasible == (row.predicted_us is not None) for row in explanation.alternatives)
    assert explanation.predicted_us >= explanation.roofline_us
    assert len(explanation.lines()) >= 3


def test_numbers_of_both_passes() -> None:
    explanation = explain_backward(TRAINING, A100, PLAN)
    keys, queries = explanation.passes
    assert (keys.owned, keys.step, queries.owned, queries.step) == (64, 32, 64, 32)
    assert keys.tiles == 4 * 4 * 64
    assert queries.tiles == 4 * 16 * 64
    assert (keys.full_waves, keys.tail_tiles) == (1024 // 108, 1024 % 108)
    assert queries.waves == pytest.approx(4096 / 108)
    # of every query head: tile i of 64 keys is seen by the 64 - i tiles of 64 queries from its own on, two steps each
    assert keys.walked_tiles == queries.walked_tiles == 4 * 16 * 2 * (64 * 65 // 2)
    assert keys.masked_tiles == queries.masked_tiles == 4 * 16 * 64 * 2
    assert keys.masked_share == pytest.approx(2 / 65)
    assert explanation.flops == 5 * explain_forward(TRAINING.with_(operation="forward"), A100).flops // 2
    assert explanation.bytes_moved == 4 * 4 * 4096 * (16 + 4) * 64 * 2 + 4 * 4 * 16 * 4096
    assert explanation.predicted_us == pytest.approx(explanation.delta_us + keys.cost.total_us + queries.cost.total_us)


def test_a_window_of_keys_is_a_window_of_queries_turned_round() -> None:
    explanation = explain_backward(TRAINING.with_(band=Band(64, 0), num_heads_q=4), A100, PLAN)
    # 64 keys are seen by their own 64 queries and the next 64; all but the last tile
    assert explanation.keys.walked_tiles == 4 * 4 * (63 * 4 + 2)
    assert explanation.passes[1].walked_tiles == 4 * 4 * (63 * 4 + 2)


def test_fewer_queries_than_keys_leave_keys_without_any() -> None:
    problem = TRAINING.with_(seqlen_q=64, total_q=256, band=Band(63, 0), num_heads_q=4)
    explanation = explain_backward(problem, A100, PLAN)
    assert explanation.keys.tiles == 4 * 4 * 64
    assert explanation.keys.walked_tiles == 4 * 4 * 4
    assert explanation.passes[1].tiles == 4 * 4


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({}, "matrix"),
        ({"batch": 1, "num_heads_q": 1, "num_heads_kv": 1, "seqlen_q": 128, "total_q": 128, "seqlen_k": 65536}, "tail"),
        ({"batch": 1, "num_heads_q": 1, "num_heads_kv": 1, "seqlen_q": 16, "total_q": 16, "seqlen_k": 64}, "start"),
    ],
)
def test_the_bound_is_that_of_the_longer_pass(changes: dict[str, Any], bound: str) -> None:
    explanation = explain_backward(TRAINING.with_(**changes), A100)
    longer = max(explanation.passes, key=lambda one: one.predicted_us)
    assert explanation.bound == longer.bound == bound
    assert any(line.startswith(f"Bound by {bound}: predicted ") for line in explanation.lines())


def test_json_holds_everything() -> None:
    explanation = explain_backward(TRAINING, A100)
    data = json.loads(explanation.to_json())
    assert data["plan"]["kernel"] == TRITON_BACKWARD
    assert data["keys"]["cost"]["matrix_us"] == explanation.keys.cost.matrix_us
    assert data["queries"]["masked_share"] == explanation.passes[1].masked_share
    assert data["tflops"] == pytest.approx(explanation.tflops)
    assert len(data["alternatives"]) == len(explanation.alternatives)


def test_lines_say_both_passes_and_each_reason() -> None:
    explanation = explain_backward(TRAINING, A100, PLAN)
    text = "\n".join(explanation.lines())
    assert (
        "Gradients of 4 x 4096 queries over 4096 keys (causal), 16/4 heads, head dim 64, bfloat16 on A100: kernel triton.backward" in text
    )
    assert "Pass over keys (dK and dV): 64 keys a program, 32 queries a step, 4 warps, 2 stages" in text
    assert "Pass over queries (dQ): 64 queries a program, 32 keys a step, 4 warps, 2 stages" in text
    assert "1024 tiles of keys on 108 SMs: 9 full waves and a tail of 52 tiles; 3.1% of 266240 tiles of queries masked" in text
    assert "(2.5 times the forward's)" in text
    for row in explanation.alternatives:
        assert row.why in text


def test_both_passes_tiles_of_all_kernels_are_explained() -> None:
    explanation = explain_backward(TRAINING, A100, PLAN)
    tiles = {(row.owner, row.owned) for row in explanation.alternatives}
    assert tiles == {("keys", 128), ("queries", 128)}
    by_rule = explain_backward(TRAINING, A100)
    chosen = {(tile.owner, tile.owned) for tile in pass_tiles(by_rule.plan)}
    assert chosen.isdisjoint((row.owner, row.owned) for row in by_rule.alternatives)


def test_smaller_tiles_lose_by_what_they_read_again() -> None:
    explanation = explain_backward(TRAINING.with_(head_dim=256, head_dim_v=256), H200)
    row = next(row for row in explanation.alternatives if (row.kernel, row.owner, row.owned) == (TRITON_BACKWARD, "keys", 32))
    assert row.why.startswith("2048 tiles of keys instead of 1024, and each reads its queries")


def test_asked_for_plans_lose_to_nothing() -> None:
    explanation = explain_backward(TRAINING, A100, BackwardPlan(TRITON_BACKWARD, 16, 16, 1, 1, 16, 16, 1, 1, source="explicit"))
    assert any("the plan was asked for" in row.why for row in explanation.alternatives)


def test_a_plan_that_cannot_run_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="block_m 24"):
        explain_backward(TRAINING, A100, BackwardPlan(TRITON_BACKWARD, 24))


def test_a_compilers_findings_replace_the_estimates_of_both_passes() -> None:
    compiled = (Facts(200, 8, 99_999, "mma.sync m16n8k16"), Facts(100, 0, 50_000, "mma.sync m16n8k16"))
    explanation = explain_backward(TRAINING, A100, PLAN, compiled=compiled)
    assert (explanation.keys.registers, explanation.keys.shared_memory, explanation.keys.spilled_bytes) == (200, 99_999, 8)
    queries = explanation.passes[1]
    assert (queries.registers, queries.shared_memory, queries.spilled_bytes) == (100, 50_000, 0)
    assert "as compiled" in "\n".join(explanation.lines())


def test_the_cpu_is_explained_without_tiles() -> None:
    explanation = explain_backward(TRAINING, Device.named("cpu"))
    assert explanation.plan.kernel == CPU_BACKWARD
    assert explanation.alternatives == ()
    assert not any("shared memory" in line for line in explanation.lines())


@pytest.mark.parametrize("changes", [{"batch": 0, "total_q": 0}, {"seqlen_q": 0, "total_q": 0}, {"seqlen_k": 0}], ids=str)
def test_nothing_to_do_is_explained_too(changes: dict[str, int]) -> None:
    explanation = explain_backward(TRAINING.with_(**changes), H200)
    assert explanation.flops == 0
    assert explanation.bound == "start"


def test_one_pass_is_explained_without_a_second_and_with_its_workspace() -> None:
    problem = TRAINING.with_(num_heads_kv=16)
    plan = one_pass_plan(problem, H200, GLUON_BACKWARD_SM90).with_(source="explicit")
    explanation = explain_backward(problem, H200, plan, compiled=[Facts(240, 128, 165_296, "wgmma m64n64k16")])
    assert explanation.passes == (explanation.keys,)
    assert explanation.predicted_us == pytest.approx(explanation.delta_us + explanation.keys.predicted_us + explanation.dq_us)
    assert explanation.workspace == 4 * 4096 * 16 * (8 + 64 * 4)
    assert explanation.keys.spilled_bytes == 128
    text = "\n".join(explanation.lines())
    assert "One pass, over keys (dK, dV and dQ): 128 keys a program, 64 queries a step, 8 warps, 3 stages" in text
    assert "Workspace: 69.2 MB, most of it dQ's sums in float32, which come in no fixed order." in text
    assert "Pass over" not in text
    assert json.loads(explanation.to_json())["queries"] is None
    assert {(row.kernel, row.passes) for row in explanation.alternatives} == {(GLUON_BACKWARD_SM90, 2), (TRITON_BACKWARD, 2)}
    assert "Not two passes of triton.backward: " in text


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"seqlen_q": 512, "seqlen_k": 512, "total_q": 2048}, "dQ's sums in memory pay from 512 keys a query on, and there are 256"),
        ({"deterministic": True}, "dQ is summed in no fixed order"),
    ],
)
def test_one_pass_loses_for_a_reason(changes: dict[str, Any], why: str) -> None:
    explanation = explain_backward(TRAINING.with_(**changes), H200)
    [row] = [row for row in explanation.alternatives if row.passes]
    assert (row.kernel, row.passes, row.feasible) == (GLUON_BACKWARD_SM90, 1, "deterministic" not in changes)
    assert why in row.why
    assert f"Not one pass: {row.why}." in explanation.lines()


def test_explain_goes_by_the_operation_and_refuses_the_others_plan() -> None:
    assert isinstance(explain(TRAINING, H200), BackwardExplanation)
    assert isinstance(explain(TRAINING, A100, PLAN, compiled=[Facts(9, 0, 9, ""), Facts(9, 0, 9, "")]), BackwardExplanation)
    for plan in (ForwardPlan(TRITON_FORWARD), DecodePlan("triton.decode", 16)):
        with pytest.raises(ArgumentError, match="a BackwardPlan"):
            explain(TRAINING, H200, plan)
    with pytest.raises(ArgumentError, match="a ForwardPlan"):
        explain(TRAINING.with_(operation="forward"), H200, PLAN)


def test_explaining_needs_neither_torch_nor_triton() -> None:
    code = (
        "import sys; from flashtile.planner.explain import explain; from flashtile.planner.device import Device; "
        "from flashtile.problem import Problem; "
        "explain(Problem('backward', 4, 4096, seqlen_k=4096), Device.named('h200')).lines(); "
        "print([name for name in ('torch', 'triton') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
