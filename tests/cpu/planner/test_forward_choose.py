"""plan_forward: wishes are obeyed or refused, tuned tiles come before the rule, plans are cheap."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from flashtile.band import Band
from flashtile.errors import ArgumentError, UnsupportedError
from flashtile.planner import table
from flashtile.planner.catalog import CPU_FORWARD, GLUON_FORWARD_SM90, TRITON, TRITON_FORWARD, kernel_named, kernels_of, module_of
from flashtile.planner.choose import plan_decode, plan_forward
from flashtile.planner.device import Device
from flashtile.planner.forward_rules import forward_infeasible
from flashtile.planner.plans import ForwardPlan
from flashtile.problem import Problem

H200 = Device.named("H200")
A100 = Device.named("A100")
PREFILL = Problem("forward", 4, 4096, seqlen_k=4096, num_heads_q=32, num_heads_kv=8)


def test_kernels_in_order() -> None:
    assert [kernel.name for kernel in kernels_of("forward")] == [GLUON_FORWARD_SM90, TRITON_FORWARD, CPU_FORWARD]
    modules = ["flashtile.kernels.gluon.forward_sm90", "flashtile.kernels.forward", "flashtile.kernels.cpu_forward"]
    assert [module_of(kernel.name) for kernel in kernels_of("forward")] == modules


@pytest.mark.parametrize(("device", "kernel"), [("H200", GLUON_FORWARD_SM90), ("A100", TRITON_FORWARD), ("cpu", CPU_FORWARD)])
def test_each_device_has_its_kernel(device: str, kernel: str) -> None:
    assert plan_forward(PREFILL, Device.named(device)).kernel == kernel


@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [
        ({}, "A100", "sm_80"),
        ({"dtype_q": "float32", "dtype_k": "float32", "dtype_v": "float32"}, "H200", "float32 is none of float16, bfloat16"),
        ({"alignment": 8}, "H200", "multiples of 8 bytes"),
    ],
)
def test_what_hoppers_kernel_cannot_take_goes_to_the_portable_one(changes: dict[str, Any], device: str, reason: str) -> None:
    problem = PREFILL.with_(**changes)
    assert plan_forward(problem, Device.named(device)).kernel == TRITON_FORWARD
    assert reason in " ".join(kernel_named(GLUON_FORWARD_SM90).reasons_against(problem, Device.named(device)))


def test_an_explicit_plan_is_obeyed_as_it_is() -> None:
    wish = ForwardPlan(TRITON_FORWARD, 64, 32, num_warps=4, num_stages=2)
    assert plan_forward(PREFILL, H200, plan=wish) is wish
    assert plan_forward(PREFILL, H200, plan=wish, block_m=64) is wish


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (ForwardPlan(TRITON_FORWARD, 24), "24"),
        (ForwardPlan(TRITON_FORWARD, 128, 128, num_stages=4), "bytes of shared memory"),
        (ForwardPlan(CPU_FORWARD), "cuda"),
        (ForwardPlan("no.forward"), "no such kernel"),
        (ForwardPlan(TRITON), "no such kernel"),
        (ForwardPlan(GLUON_FORWARD_SM90, 32), "block_m 32"),
    ],
)
def test_an_impossible_plan_is_refused_with_reasons(wish: ForwardPlan, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason) as raised:
        plan_forward(PREFILL, H200, plan=wish)
    assert list(raised.value.reasons) == [wish.kernel]


@pytest.mark.parametrize("block_m", [16, 32, 64, 128, 192])
def test_block_m_is_obeyed(block_m: int) -> None:
    problem = PREFILL.with_(head_dim=64, head_dim_v=64)
    plan = plan_forward(problem, H200, block_m=block_m)
    kernel = GLUON_FORWARD_SM90 if block_m >= 128 else TRITON_FORWARD
    assert (plan.kernel, plan.block_m, plan.source) == (kernel, block_m, "explicit")
    assert forward_infeasible(problem, plan, H200) == []


def test_block_m_asks_for_hoppers_kernel_even_for_few_queries() -> None:
    few = PREFILL.with_(seqlen_q=4, total_q=16)
    assert plan_forward(few, H200).kernel == TRITON_FORWARD
    assert plan_forward(few, H200, block_m=128).kernel == GLUON_FORWARD_SM90


def test_block_m_that_no_kernel_has_lists_every_kernel() -> None:
    with pytest.raises(UnsupportedError, match="No plan as asked") as raised:
        plan_forward(PREFILL, H200, block_m=48)
    assert set(raised.value.reasons) == {GLUON_FORWARD_SM90, TRITON_FORWARD, CPU_FORWARD}
    assert "it has no block_m 48, only 16, 32, 64, 128" in raised.value.reasons[TRITON_FORWARD]


def test_block_m_that_would_spill_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="spill"):
        plan_forward(PREFILL.with_(head_dim=256, head_dim_v=256, alignment=2), A100, block_m=128)


def test_a_wish_that_contradicts_the_plan() -> None:
    with pytest.raises(ArgumentError, match="block_m"):
        plan_forward(PREFILL, H200, plan=ForwardPlan(TRITON_FORWARD, 64), block_m=16)


def test_no_kernel_lists_every_kernel_of_the_operation_alone() -> None:
    with pytest.raises(UnsupportedError, match="No kernel can run this forward") as raised:
        plan_forward(PREFILL.with_(k_scales="tensor"), H200)
    assert set(raised.value.reasons) == {GLUON_FORWARD_SM90, TRITON_FORWARD, CPU_FORWARD}
    assert "scales" in raised.value.reasons[TRITON_FORWARD][0]


def test_a_problem_of_another_operation_has_no_kernel() -> None:
    with pytest.raises(UnsupportedError, match="it computes forward, not decode"):
        plan_forward(PREFILL.with_(operation="decode"), H200)
    with pytest.raises(UnsupportedError, match="it computes decode, not forward"):
        plan_decode(PREFILL, H200)


@pytest.mark.parametrize("device", [H200, A100], ids=lambda device: device.name)
def test_a_miss_is_cheap(device: Device) -> None:
    """100 us are promised; the fastest of many is what the work takes, and a slow machine gets twice that."""
    times = []
    for extra in range(200):
        problem = PREFILL.with_(seqlen_k=4096 + 37 * extra, band=Band(None, 0))
        start = time.perf_counter()
        plan_forward(problem, device)
        times.append(time.perf_counter() - start)
    assert min(times) < 200e-6


def test_growing_lengths_need_few_tiles() -> None:
    """A tile is a compilation: lengths from 64 to 16384 may cost few of them."""
    for device in (H200, A100):
        plans = [plan_forward(PREFILL.with_(seqlen_q=n, seqlen_k=n, total_q=4 * n), device) for n in range(64, 16384, 320)]
        assert len({(p.kernel, p.block_m, p.block_n, p.num_warps, p.num_stages) for p in plans}) <= 3


def test_a_tuned_tile_comes_before_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = {"kernel": TRITON_FORWARD, "block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2}
    text = json.dumps({"arch": "sm_90", "rows": [{"key": list(table.key_of(PREFILL)), "tile": tile}]})
    monkeypatch.setattr(table, "tuned_table", lambda arch: table.read_table(text))
    plan = plan_forward.__wrapped__(PREFILL, H200)
    assert (plan.kernel, plan.block_m, plan.block_n, plan.num_warps, plan.source) == (TRITON_FORWARD, 64, 32, 4, "tuned")
    assert plan_forward.__wrapped__(PREFILL.with_(band=Band()), H200).source == "rule"
    asked = plan_forward.__wrapped__(PREFILL, H200, block_m=16)
    assert (asked.block_m, asked.source) == (16, "explicit")


def test_a_tuned_tile_that_does_not_fit_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = {"kernel": GLUON_FORWARD_SM90, "block_m": 128, "block_n": 128, "num_warps": 8, "num_stages": 4}
    text = json.dumps({"arch": "sm_90", "rows": [{"key": list(table.key_of(PREFILL)), "tile": tile}]})
    monkeypatch.setattr(table, "tuned_table", lambda arch: table.read_table(text))
    assert plan_forward.__wrapped__(PREFILL, H200).source == "rule"
