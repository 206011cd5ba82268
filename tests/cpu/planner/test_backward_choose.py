"""plan_backward: wishes are obeyed or refused, tuned tiles come before the rule, plans are cheap."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from flashtile.band import Band
from flashtile.errors import UnsupportedError
from flashtile.planner import table
from flashtile.planner.backward_rules import backward_infeasible
from flashtile.planner.catalog import CPU_BACKWARD, GLUON_BACKWARD_SM90, TRITON_BACKWARD, TRITON_FORWARD, kernels_of, module_of
from flashtile.planner.choose import plan_backward, plan_forward
from flashtile.planner.device import Device
from flashtile.planner.plans import BackwardPlan
from flashtile.problem import Problem

H200 = Device.named("H200")
A100 = Device.named("A100")
TRAINING = Problem("backward", 4, 4096, seqlen_k=4096, num_heads_q=32, num_heads_kv=8, lse=True)
KERNELS = [kernel.name for kernel in kernels_of("backward")]


def test_kernels_in_order() -> None:
    assert KERNELS == [GLUON_BACKWARD_SM90, TRITON_BACKWARD, CPU_BACKWARD]
    modules = ["flashtile.kernels.gluon.backward_sm90", "flashtile.kernels.backward", "flashtile.kernels.cpu_backward"]
    assert [module_of(name) for name in KERNELS] == modules


@pytest.mark.parametrize(
    ("device", "kernel"), [("H200", GLUON_BACKWARD_SM90), ("A100", TRITON_BACKWARD), ("MI300X", TRITON_BACKWARD), ("cpu", CPU_BACKWARD)]
)
def test_each_device_has_its_kernel(device: str, kernel: str) -> None:
    assert plan_backward(TRAINING, Device.named(device)).kernel == kernel


@pytest.mark.parametrize("name", Device.names())
@pytest.mark.parametrize("head_dim", [8, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_device_trains_every_head_dim_that_its_registers_hold(name: str, head_dim: int, dtype: str) -> None:
    device = Device.named(name)
    problem = Problem("backward", 1, 512, seqlen_k=512, head_dim=head_dim, dtype_q=dtype, softcap=True, alibi=True, ragged_q=True)
    if name == "T4" and head_dim > 128:
        with pytest.raises(UnsupportedError, match="it has no tile for head dims"):
            plan_backward(problem, device)
    else:
        assert backward_infeasible(problem, plan_backward(problem, device), device) == []


def test_an_explicit_plan_is_obeyed_as_it_is() -> None:
    for wish in (
        BackwardPlan(TRITON_BACKWARD, 32, 128, 8, 2, 64, 32, 4, 2),
        BackwardPlan(GLUON_BACKWARD_SM90, num_stages=3, dq_num_stages=4),
    ):
        assert plan_backward(TRAINING, H200, plan=wish) is wish


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (BackwardPlan(TRITON_BACKWARD, 24), "block_m 24 is not a power of two"),
        (BackwardPlan(TRITON_BACKWARD, 128, 128, num_stages=4), "bytes of shared memory"),
        (BackwardPlan(CPU_BACKWARD), "cuda"),
        (BackwardPlan("no.backward"), "no such kernel"),
        (BackwardPlan(TRITON_FORWARD), "no such kernel"),
    ],
)
def test_an_impossible_plan_is_refused_with_reasons(wish: BackwardPlan, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason) as raised:
        plan_backward(TRAINING, H200, plan=wish)
    assert list(raised.value.reasons) == [wish.kernel]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"k_scales": "tensor"}, "scales a tensor"), ({"page_size": 16}, "keys lie on pages of 16, which have no gradient")],
)
def test_no_kernel_lists_every_kernel_of_the_operation_alone(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match="No kernel can run this backward") as raised:
        plan_backward(TRAINING.with_(**changes), H200)
    assert set(raised.value.reasons) == set(KERNELS)
    assert reason in "; ".join(raised.value.reasons[TRITON_BACKWARD])


def test_a_problem_of_another_operation_has_no_kernel() -> None:
    with pytest.raises(UnsupportedError, match="it computes backward, not forward"):
        plan_backward(TRAINING.with_(operation="forward"), H200)
    with pytest.raises(UnsupportedError, match="it computes forward, not backward"):
        plan_forward(TRAINING, H200)


@pytest.mark.parametrize("device", [H200, A100], ids=lambda device: device.name)
def test_a_miss_is_cheap(device: Device) -> None:
    """Two passes take twice what a forward's plan may; the fastest of many is what the work takes."""
    times = []
    for extra in range(200):
        problem = TRAINING.with_(seqlen_k=4096 + 37 * extra, band=Band(None, 0))
        start = time.perf_counter()
        plan_backward(problem, device)
        times.append(time.perf_counter() - start)
    assert min(times) < 600e-6


def test_growing_lengths_need_few_tiles() -> None:
    """A tile is a compilation: lengths from 64 to 16384 may cost few of them."""
    for device in (H200, A100):
        plans = {plan_backward(TRAINING.with_(seqlen_q=n, seqlen_k=n, total_q=4 * n), device) for n in range(64, 16384, 320)}
        assert len({(p.kernel, p.block_m, p.block_n, p.num_warps, p.num_stages) for p in plans}) <= 3
        assert len({(p.kernel, p.dq_block_m, p.dq_block_n, p.dq_num_warps, p.dq_num_stages) for p in plans}) <= 3


def test_a_tuned_tile_comes_before_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = {"kernel": TRITON_BACKWARD, "block_m": 32, "block_n": 32, "num_warps": 4, "num_stages": 1}
    tile |= {f"dq_{name}": value for name, value in tile.items() if name != "kernel"}
    text = json.dumps({"arch": "sm_90", "rows": [{"key": list(table.key_of(TRAINING)), "tile": tile}]})
    monkeypatch.setattr(table, "tuned_table", lambda arch: table.read_table(text))
    plan = plan_backward.__wrapped__(TRAINING, H200)
    assert (plan.block_m, plan.block_n, plan.dq_num_warps, plan.source) == (32, 32, 4, "tuned")
    assert plan_backward.__wrapped__(TRAINING.with_(band=Band()), H200).source == "rule"


def test_a_tuned_tile_that_does_not_fit_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = {"kernel": TRITON_BACKWARD, "block_m": 128, "block_n": 128, "num_warps": 8, "num_stages": 4}
    text = json.dumps({"arch": "sm_90", "rows": [{"key": list(table.key_of(TRAINING)), "tile": tile}]})
    monkeypatch.setattr(table, "tuned_table", lambda arch: table.read_table(text))
    assert plan_backward.__wrapped__(TRAINING, H200).source == "rule"


def test_forward_and_backward_have_keys_of_their_own() -> None:
    assert table.key_of(TRAINING) != table.key_of(TRAINING.with_(operation="forward"))
