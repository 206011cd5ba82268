"""Forward rules: tiles are counted exactly, what is chosen fits, and what is refused says the number that decided."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtile.band import Band
from flashtile.planner.catalog import GLUON_FORWARD_SM90, TRITON_FORWARD
from flashtile.planner.choose import plan_forward
from flashtile.planner.device import Device
from flashtile.planner.forward_cost import forward_cost, forward_flops
from flashtile.planner.forward_footprint import (
    forward_footprint,
    forward_mma_name,
    forward_registers,
    forward_registers_limit,
    forward_shared_memory,
    held_dim,
)
from flashtile.planner.forward_rules import ROWS_GAIN_PERCENT, choose_forward_tile, forward_fits, forward_infeasible
from flashtile.planner.forward_tiles import FORWARD_LIMITS, ForwardTile, forward_candidates
from flashtile.planner.forward_work import mean_keys, row_tiles, tile_kinds, visible_pairs, walked_tiles
from flashtile.planner.plans import ForwardPlan
from flashtile.planner.walk_cost import WalkCost
from flashtile.problem import Problem
from tests.cpu.planner.drawn import bands, problems

H200 = Device.named("H200")
A100 = Device.named("A100")
GPUS = [Device.named(name) for name in Device.names() if name != "cpu"]
FULL, CAUSAL = Band(), Band(None, 0)


def prefill(seqlen: int = 4096, batch: int = 4, **facts: Any) -> Problem:
    return Problem("forward", batch, seqlen, **{"seqlen_k": seqlen, "num_heads_q": 16, "num_heads_kv": 16, **facts})


@settings(max_examples=300, deadline=None)
@given(
    seqlen_q=st.integers(0, 90), seqlen_k=st.integers(0, 90), band=bands,
    block_m=st.sampled_from([1, 16, 48]), block_n=st.sampled_from([1, 8, 32]),
)  # fmt: skip
def test_tiles_and_pairs_are_counted_as_the_mask_has_them(seqlen_q: int, seqlen_k: int, band: Band, block_m: int, block_n: int) -> None:
    problem = prefill(seqlen_q, seqlen_k=seqlen_k, band=band)
    mask = problem.band.dense(seqlen_q, seqlen_k)
    walked = masked = 0
    for row in range(0, seqlen_q, block_m):
        rows = mask[row : row + block_m]
        for key in range(0, seqlen_k, block_n):
            tile = rows[:, key : key + block_n]
            walked += bool(tile.any())
            masked += bool(tile.any() and (not tile.all() or tile.shape[1] < block_n))
    assert visible_pairs(problem) == int(mask.sum())
    assert walked_tiles(problem, block_m, block_n) == walked
    assert tile_kinds(problem, block_m, block_n) == (walked, masked)


def test_packed_queries_have_a_tile_a_sequence_beside_what_their_rows_fill() -> None:
    packed = prefill(8192, batch=64, ragged_q=True, total_q=70_000)
    assert row_tiles(packed, 128) == 16 * (64 + 547)
    assert row_tiles(prefill(100, batch=64, ragged_q=True, total_q=6400), 128) == 16 * 64
    assert row_tiles(prefill(100, batch=64), 128) == 16 * 64


def test_flops_are_those_of_visible_pairs() -> None:
    assert forward_flops(prefill(1024, band=FULL)) == 4 * 16 * 1024 * 1024 * 4 * 128
    assert forward_flops(prefill(1024, band=CAUSAL)) == 4 * 16 * (1024 * 1025 // 2) * 4 * 128
    packed = prefill(1024, band=FULL, ragged_q=True, total_q=2048)
    assert forward_flops(packed) == forward_flops(prefill(1024, band=FULL)) // 2
    assert mean_keys(prefill(1024, band=Band(99, 0), seqlen_k=5000)) == 100


@settings(max_examples=200, deadline=None)
@given(problem=problems("forward", page_size=st.sampled_from([0, 1, 16, 128])), device=st.sampled_from([*GPUS, Device.named("cpu")]))
def test_every_planned_forward_is_feasible(problem: Problem, device: Device) -> None:
    plan = plan_forward(problem, device)
    assert forward_infeasible(problem, plan, device) == []
    assert forward_cost(problem, plan, forward_footprint(problem, plan, device), device).total_us > 0
    if device.is_gpu:
        assert forward_shared_memory(problem, plan, device) <= device.smem_per_block
        assert forward_registers(problem, plan, device) <= forward_registers_limit(plan, device)
        assert plan.kernel == TRITON_FORWARD or device.arch == "sm_90"
        assert plan.num_programs <= device.num_sms


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.name)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_the_first_tile_is_taken_unless_a_later_one_is_predicted_to_gain(device: Device, head_dim: int) -> None:
    problem = prefill(8192, head_dim=head_dim, band=FULL)
    tile = choose_forward_tile(problem, device, TRITON_FORWARD)
    assert isinstance(tile, ForwardTile)
    able = forward_fits(problem, device, TRITON_FORWARD).able
    times = {other: forward_cost(problem, other, footprint, device).total_us for other, footprint in able}
    assert tile in times
    assert 100 * min(times.values()) >= (100 - ROWS_GAIN_PERCENT) * times[tile]
    before = [other for other, _ in able][: [other for other, _ in able].index(tile)]
    assert all(100 * times[tile] < (100 - ROWS_GAIN_PERCENT) * times[other] for other in before)


def test_two_programs_an_sm_come_first_where_wgmma_takes_them_whole() -> None:
    chosen = {head_dim: choose_forward_tile(prefill(8192, head_dim=head_dim, band=FULL), H200, TRITON_FORWARD) for head_dim in (128, 256)}
    assert [tile.block_m for tile in chosen.values() if isinstance(tile, ForwardTile)] == [64, 128]


@pytest.mark.parametrize(
    ("head_dim", "seqlen", "band", "expected"),
    [
        (128, 1024, FULL, (128, 128, 8, 2, 8, True)),
        (128, 16384, CAUSAL, (128, 128, 8, 2, 8, True)),
        (64, 1024, FULL, (128, 128, 8, 4, 8, True)),
        (64, 4096, FULL, (192, 128, 12, 4, 0, False)),
        (64, 2048, CAUSAL, (128, 128, 8, 4, 8, True)),
        (64, 4096, CAUSAL, (192, 128, 12, 4, 0, False)),
        (64, 8192, CAUSAL, (192, 128, 12, 4, 0, False)),
        (192, 4096, FULL, (128, 64, 8, 2, 8, True)),
        (256, 4096, FULL, (128, 64, 8, 2, 8, False)),
    ],
)
def test_hoppers_kernel_takes_what_measured_best(head_dim: int, seqlen: int, band: Band, expected: tuple[object, ...]) -> None:
    plan = plan_forward(prefill(seqlen, head_dim=head_dim, band=band), H200)
    assert plan.kernel == GLUON_FORWARD_SM90
    assert (plan.block_m, plan.block_n, plan.num_warps, plan.num_stages, plan.rescale_log2, plan.q_in_registers) == expected


def test_hoppers_programs_stay_and_are_no_more_than_sms_or_tiles() -> None:
    assert plan_forward(prefill(), H200).num_programs == H200.num_sms
    few = prefill(1000, batch=1, num_heads_q=2, num_heads_kv=2)
    assert plan_forward(few, H200).num_programs == row_tiles(few, 128) == 16


@pytest.mark.parametrize(("seqlen_q", "block_m"), [(1, 16), (16, 16), (17, 32), (32, 32)])
def test_few_queries_get_a_small_tile_of_the_portable_kernel(seqlen_q: int, block_m: int) -> None:
    problem = prefill(seqlen_q, batch=8, seqlen_k=16384, num_heads_q=32, num_heads_kv=8)
    plan = plan_forward(problem, H200)
    assert (plan.kernel, plan.block_m, plan.num_programs) == (TRITON_FORWARD, block_m, 0)
    assert plan_forward(problem, A100).block_m == block_m


def test_a_chunk_of_queries_is_hoppers() -> None:
    assert plan_forward(prefill(512, batch=8, seqlen_k=16384, page_size=16), H200).kernel == GLUON_FORWARD_SM90


@pytest.mark.parametrize(("page_size", "kernel"), [(8, GLUON_FORWARD_SM90), (16, GLUON_FORWARD_SM90), (64, GLUON_FORWARD_SM90),
                                                   (256, GLUON_FORWARD_SM90), (1, TRITON_FORWARD), (24, TRITON_FORWARD)])  # fmt: skip
def test_pages_that_one_copy_cannot_bring_go_to_the_portable_kernel(page_size: int, kernel: str) -> None:
    assert plan_forward(prefill(page_size=page_size), H200).kernel == kernel
    against = forward_infeasible(prefill(page_size=page_size), ForwardPlan(GLUON_FORWARD_SM90, 128, 128, num_warps=8), H200)
    assert any("neither divide tiles" in reason for reason in against) == (kernel == TRITON_FORWARD)


def test_features_take_registers_from_q_and_then_from_keys_a_step() -> None:
    plain, paged = prefill(), prefill(page_size=16, ragged_q=True)
    shaped = paged.with_(softcap=True, alibi=True)
    plans = [plan_forward(problem, H200) for problem in (plain, paged, shaped)]
    assert [(plan.block_n, plan.q_in_registers) for plan in plans] == [(128, True), (128, False), (64, False)]
    assert {plan.kernel for plan in plans} == {GLUON_FORWARD_SM90}


def test_hoppers_shared_memory_is_what_its_tiles_take() -> None:
    """Compiled: 197,256 bytes at head dim 128, 181,028 with 192 rows at 64, 197,208 at 256, 197,448 at 192; barriers are rounded up."""
    tiles = {128: ForwardTile(128, 128, 8, 2, GLUON_FORWARD_SM90, 8, True), 64: ForwardTile(192, 128, 12, 4, GLUON_FORWARD_SM90),
             256: ForwardTile(128, 64, 8, 2, GLUON_FORWARD_SM90), 192: ForwardTile(128, 64, 8, 2, GLUON_FORWARD_SM90)}  # fmt: skip
    compiled = {128: 197256, 64: 181028, 256: 197208, 192: 197448}
    for head_dim, tile in tiles.items():
        shared = forward_shared_memory(prefill(head_dim=head_dim), tile, H200)
        assert compiled[head_dim] <= shared <= compiled[head_dim] + 1024


def test_less_shared_memory_means_a_smaller_ring_or_tile() -> None:
    problem = prefill(band=FULL, dtype_q="float32", allow_tf32=True)
    large, small = (choose_forward_tile(problem, Device.named(name), TRITON_FORWARD) for name in ("A100", "L40S"))
    assert isinstance(large, ForwardTile)
    assert isinstance(small, ForwardTile)
    assert small.num_stages * small.block_n < large.num_stages * large.block_n


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (ForwardPlan(TRITON_FORWARD, 24), "block_m 24 of triton.forward is not one of"),
        (ForwardPlan(TRITON_FORWARD, 128, 48), "block_n 48 is not a power of two"),
        (ForwardPlan(TRITON_FORWARD, 128, 64, num_warps=3), "num_warps 3 is not a power of two"),
        (ForwardPlan(TRITON_FORWARD, 128, 64, num_stages=9), "num_stages 9 is not within"),
        (ForwardPlan(TRITON_FORWARD, 128, 64, num_programs=132), "num_programs 132"),
        (ForwardPlan(TRITON_FORWARD, 128, 128, num_warps=4), "it would spill"),
        (ForwardPlan(GLUON_FORWARD_SM90, 64), "block_m 64 of gluon.forward_sm90 is not one of (128, 192)"),
        (ForwardPlan(GLUON_FORWARD_SM90, 192, 128, num_warps=8), "num_warps 8 is not 12"),
        (ForwardPlan(GLUON_FORWARD_SM90, 128, 128, num_warps=8, num_stages=4), "bytes of shared memory, and a program of H200 has 232448"),
        (ForwardPlan(GLUON_FORWARD_SM90, 128, 128, num_warps=8, num_programs=-1), "num_programs -1 is negative"),
    ],
)
def test_an_impossible_plan_says_the_number_that_decides(plan: ForwardPlan, reason: str) -> None:
    assert reason in "; ".join(forward_infeasible(prefill(), plan, H200))


def test_a_grid_has_a_limit() -> None:
    crowd = prefill(1 << 20, batch=1 << 16, num_heads_q=64, num_heads_kv=64)
    assert "a grid holds 2147483647" in "; ".join(forward_infeasible(crowd, ForwardPlan(TRITON_FORWARD), A100))


@pytest.mark.parametrize(("dim", "held"), [(8, 16), (40, 64), (64, 64), (72, 96), (80, 96), (96, 96), (160, 160), (192, 192), (224, 256)])
def test_head_dims_are_held_in_two_powers_at_most(dim: int, held: int) -> None:
    assert held_dim(dim) == held


def test_matrix_instructions() -> None:
    tile = ForwardTile(128, 64, 8, 3)
    assert forward_mma_name(prefill(), tile, H200) == "wgmma m64n64k16"
    assert forward_mma_name(prefill(), tile._replace(block_m=32), H200) == "mma.sync m16n8k16"
    assert forward_mma_name(prefill(), tile, A100) == "mma.sync m16n8k16"
    assert forward_mma_name(prefill(dtype_q="float32"), tile, A100) == "FMA on the vector units"


def test_features_and_wider_values_take_more() -> None:
    tile = ForwardTile(128, 64, 8, 2)
    plain, shaped = prefill(), prefill(softcap=True, alibi=True, page_size=16, ragged_q=True)
    assert forward_registers(shaped, tile, A100) > forward_registers(plain, tile, A100)
    wide = prefill(dtype_q="float32", allow_tf32=True)
    assert forward_shared_memory(wide, tile, A100) > forward_shared_memory(plain, tile, A100)


def test_candidates_are_within_the_limits_of_their_kernels() -> None:
    for kernel, limits in FORWARD_LIMITS.items():
        for head_dim in (64, 96, 128, 192, 256):
            offered = [forward_candidates(kernel, head_dim, head_dim, mma, True) for mma in (None, *H200.mma_shapes, *A100.mma_shapes)]
            for tile in (tile for shapes in offered for tiles in shapes for tile in tiles):
                assert tile.kernel == kernel
                assert tile.block_m in limits.block_ms
                assert limits.block_n[0] <= tile.block_n <= limits.block_n[1]
                assert limits.stages[0] <= tile.num_stages <= limits.stages[1]


@settings(max_examples=100, deadline=None)
@given(seqlen=st.sampled_from([100, 512, 1024, 8192]), device=st.sampled_from(GPUS), head_dim=st.sampled_from([64, 128, 256]))
def test_the_model_never_promises_more_than_the_device_has(seqlen: int, device: Device, head_dim: int) -> None:
    problem = prefill(seqlen, head_dim=head_dim, band=FULL)
    cost: WalkCost = forward_cost(problem, plan := plan_forward(problem, device), forward_footprint(problem, plan, device), device)
    assert cost.total_us >= 1e6 * forward_flops(problem) / device.matrix_rate
    assert min(cost) >= 0


def test_more_sms_are_never_slower() -> None:
    problem = prefill(2048)
    plan = plan_forward(problem, A100)
    larger = replace(A100, num_sms=2 * A100.num_sms, matrix_rate=2 * A100.matrix_rate, vector_rate=2 * A100.vector_rate,
                     exp_rate=2 * A100.exp_rate, bandwidth=2 * A100.bandwidth)  # fmt: skip
    times = [forward_cost(problem, plan, forward_footprint(problem, plan, device), device).total_us for device in (A100, larger)]
    assert times[1] < times[0]


@pytest.mark.parametrize(("head_dim", "band", "measured"), [(128, FULL, 709), (128, CAUSAL, 722), (64, FULL, 510), (64, CAUSAL, 520)])
def test_the_model_is_near_what_was_measured(head_dim: int, band: Band, measured: float) -> None:
    """TFLOP/s of Hopper's kernel at 1 x 16384 on an H200: within a tenth."""
    heads = 2048 // head_dim
    problem = prefill(16384, batch=1, head_dim=head_dim, num_heads_q=heads, num_heads_kv=heads, band=band)
    plan = plan_forward(problem, H200)
    us = forward_cost(problem, plan, forward_footprint(problem, plan, H200), H200).total_us
    assert forward_flops(problem) / us * 1e-6 == pytest.approx(measured, rel=0.1)
