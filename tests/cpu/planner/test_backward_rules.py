"""Backward rules: both passes' tiles are counted exactly, what is chosen fits, and what is refused says the number that decided."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtile.band import Band
from flashtile.errors import UnsupportedError
from flashtile.planner.backward_cost import backward_bytes, backward_cost, backward_flops, pass_cost
from flashtile.planner.backward_footprint import pass_footprint, pass_registers, pass_registers_limit, pass_shared_memory
from flashtile.planner.backward_rules import (
    OWNED_GAIN_PERCENT,
    backward_infeasible,
    choose_backward_plan,
    choose_pass,
    pass_fits,
)
from flashtile.planner.backward_shapes import SHAPES, SPILLS
from flashtile.planner.backward_tiles import (
    BACKWARD_LIMITS,
    OWNERS,
    Owner,
    PassTile,
    hopper_pass_tile,
    pass_tiles,
    plan_of_passes,
)
from flashtile.planner.backward_work import owned_tiles, seen_by
from flashtile.planner.catalog import GLUON_BACKWARD_SM90, TRITON_BACKWARD, kernel_named
from flashtile.planner.choose import plan_backward
from flashtile.planner.device import Device
from flashtile.planner.forward_cost import forward_flops
from flashtile.planner.forward_work import tile_kinds, visible_pairs
from flashtile.planner.plans import BackwardPlan
from flashtile.problem import Problem
from tests.cpu.planner.drawn import bands, problems, training

H200 = Device.named("H200")
A100 = Device.named("A100")
T4 = Device.named("T4")
B200 = Device.named("B200")
GPUS = [Device.named(name) for name in Device.names() if name != "cpu"]
FULL, CAUSAL = Band(), Band(None, 0)
WIDE = BackwardPlan(GLUON_BACKWARD_SM90, 64, 64, 8, 2, 128, 64, 8, 2)


@settings(max_examples=200, deadline=None)
@given(
    seqlen_q=st.integers(0, 90), seqlen_k=st.integers(0, 90), band=bands,
    owned=st.sampled_from([1, 16, 48]), step=st.sampled_from([1, 8, 32]),
)  # fmt: skip
def test_keys_walk_the_queries_that_see_them(seqlen_q: int, seqlen_k: int, band: Band, owned: int, step: int) -> None:
    problem = training(seqlen_q, seqlen_k=seqlen_k, band=band)
    mask = problem.band.dense(seqlen_q, seqlen_k)
    walked = masked = 0
    for key in range(0, seqlen_k, owned):
        keys = mask[:, key : key + owned]
        for row in range(0, seqlen_q, step):
            tile = keys[row : row + step]
            walked += bool(tile.any())
            masked += bool(tile.any() and (not tile.all() or tile.shape[0] < step))
    seen = seen_by(problem, "keys")
    assert visible_pairs(seen) == visible_pairs(problem) == int(mask.sum())
    assert tile_kinds(seen, owned, step) == (walked, masked)


def test_each_pass_has_a_tile_for_what_it_owns() -> None:
    problem = training(1000, seqlen_k=3000, num_heads_kv=4)
    assert owned_tiles(problem, PassTile(TRITON_BACKWARD, "keys", 128, 64, 8, 2)) == 4 * 4 * 24
    assert owned_tiles(problem, PassTile(TRITON_BACKWARD, "queries", 128, 64, 8, 2)) == 4 * 16 * 8


def test_packed_keys_fill_their_sequences_as_the_queries_do() -> None:
    packed = training(8192, batch=64, ragged_q=True, ragged_k=True, total_q=70_000)
    seen = seen_by(packed, "keys")
    assert (seen.total_q, seen.ragged_q) == (70_000, True)
    assert seen_by(packed.with_(ragged_k=False), "keys").total_q == 64 * 8192


def test_flops_are_two_and_a_half_times_the_forwards_and_bytes_those_of_all_tensors() -> None:
    problem = training(1024, band=FULL, num_heads_kv=4)
    assert backward_flops(problem) == 5 * forward_flops(problem) // 2 == 4 * 16 * 1024 * 1024 * 10 * 128
    assert backward_bytes(problem) == 4 * 1024 * (16 * (4 * 128 * 2 + 4) + 4 * 4 * 128 * 2)


@settings(max_examples=300, deadline=None)
@given(problem=problems("backward", dropout=st.booleans()), device=st.sampled_from([*GPUS, Device.named("cpu")]))
def test_every_planned_backward_is_feasible(problem: Problem, device: Device) -> None:
    if device is T4 and max(problem.head_dim, problem.head_dim_v) > 128:
        with pytest.raises(UnsupportedError, match="it has no tile"):  # no registers for dK and dV without matrix instructions
            plan_backward(problem, device)
        return
    plan = plan_backward(problem, device)
    assert backward_infeasible(problem, plan, device) == []
    tiles = pass_tiles(plan)
    footprints = [pass_footprint(problem, tile, device) for tile in tiles]
    assert backward_cost(problem, tiles, footprints, device).total_us > 0
    if device.is_gpu:
        for tile in tiles:
            assert pass_shared_memory(problem, tile, device) <= device.smem_per_block
            assert pass_registers(problem, tile, device) <= pass_registers_limit(tile, device)
        assert plan.kernel == TRITON_BACKWARD or device.arch == "sm_90"
        assert plan.num_programs <= device.num_sms


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("device", [device for device in GPUS if device.has_mma], ids=lambda device: device.name)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_the_first_tile_is_taken_unless_a_later_one_is_predicted_to_gain(owner: Owner, device: Device, head_dim: int) -> None:
    problem = training(8192, head_dim=head_dim, band=FULL)
    tile = choose_pass(problem, device, TRITON_BACKWARD, owner)
    assert isinstance(tile, PassTile)
    able = pass_fits(problem, device, TRITON_BACKWARD, owner).able
    times = {other: pass_cost(problem, other, footprint, device).total_us for other, footprint in able}
    assert 100 * min(times.values()) >= (100 - OWNED_GAIN_PERCENT) * times[tile]
    before = [other for other, _ in able][: [other for other, _ in able].index(tile)]
    assert all(100 * times[tile] < (100 - OWNED_GAIN_PERCENT) * times[other] for other in before)


@pytest.mark.parametrize(
    ("head_dim", "expected"),
    [
        (64, (128, 128, 8, 3, 128, 128, 8, 3)), (96, (64, 128, 8, 3, 128, 64, 8, 4)), (128, (64, 128, 8, 3, 128, 64, 8, 4)),
        (160, (64, 64, 8, 2, 128, 64, 8, 3)), (192, (64, 64, 8, 2, 128, 64, 8, 3)), (256, (64, 64, 8, 2, 128, 64, 8, 2)),
    ],
)  # fmt: skip
def test_hoppers_kernel_has_tiles_for_short_heads_wide_heads_and_others(head_dim: int, expected: tuple[int, ...]) -> None:
    plan = choose_backward_plan(training(head_dim=head_dim, deterministic=True), H200, GLUON_BACKWARD_SM90)
    assert isinstance(plan, BackwardPlan)
    assert (plan.block_m, plan.block_n, plan.num_warps, plan.num_stages) == expected[:4]
    assert (plan.dq_block_m, plan.dq_block_n, plan.dq_num_warps, plan.dq_num_stages) == expected[4:]


def test_hoppers_programs_end_with_their_tile_where_walks_are_long_and_unlike() -> None:
    for seqlen, band, stays in ((16384, CAUSAL, False), (8192, CAUSAL, False), (4096, CAUSAL, True), (16384, FULL, True)):
        for head_dim in (64, 128):
            problem = training(seqlen, band=band, head_dim=head_dim, deterministic=True)
            plan = choose_backward_plan(problem, H200, GLUON_BACKWARD_SM90)
            assert isinstance(plan, BackwardPlan)
            assert (plan.num_programs > 0) is stays


def test_programs_of_wide_heads_end_with_their_tile_under_a_mask() -> None:
    for band, stays in ((CAUSAL, False), (FULL, True)):
        plan = choose_backward_plan(training(4096, band=band, head_dim=256), H200, GLUON_BACKWARD_SM90)
        assert isinstance(plan, BackwardPlan)
        assert (plan.num_programs > 0) is stays


def test_hoppers_programs_stay_and_are_no_more_than_sms_or_tiles() -> None:
    few = training(500, batch=1, num_heads_q=8, num_heads_kv=2)
    for problem, programs in ((training(deterministic=True), H200.num_sms), (few, 8 * 4)):
        plan = choose_backward_plan(problem, H200, GLUON_BACKWARD_SM90)
        assert isinstance(plan, BackwardPlan)
        assert plan.num_programs == programs


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"softcap": True}, "scores with softcap are not its"),
        ({"alibi": True}, "scores with alibi are not its"),
        ({"alignment": 8}, "multiples of 8 bytes"),
        ({"dtype_q": "float32"}, "float32 is none of"),
    ],
)
def test_what_hoppers_kernel_cannot_take(changes: dict[str, Any], reason: str) -> None:
    problem = training(**changes)
    assert plan_backward(problem, H200).kernel == TRITON_BACKWARD
    assert reason in "; ".join(kernel_named(GLUON_BACKWARD_SM90).reasons_against(problem, H200))


@pytest.mark.parametrize(
    ("owner", "head_dim", "head_dim_v", "compiled"),
    [("keys", 128, 128, 231_816), ("keys", 64, 64, 167_800), ("queries", 128, 128, 197_400), ("queries", 64, 64, 131_848)],
)
def test_hoppers_shared_memory_is_what_its_tiles_take(owner: Owner, head_dim: int, head_dim_v: int, compiled: int) -> None:
    problem = training(head_dim=head_dim, head_dim_v=head_dim_v)
    shared = pass_shared_memory(problem, hopper_pass_tile(owner, max(head_dim, head_dim_v)), H200)
    assert compiled <= shared <= compiled + 1024


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "stages", "compiled"),
    [(256, 256, (2, 2), (231_184, 230_072)), (192, 128, (2, 3), (182_048, 189_240))],
)
def test_hoppers_shared_memory_is_what_wide_heads_take(
    head_dim: int, head_dim_v: int, stages: tuple[int, int], compiled: tuple[int, int]
) -> None:
    problem = training(head_dim=head_dim, head_dim_v=head_dim_v)
    for tile, bytes_taken in zip(pass_tiles(WIDE.with_(num_stages=stages[0], dq_num_stages=stages[1])), compiled, strict=True):
        assert bytes_taken <= pass_shared_memory(problem, tile, H200) <= bytes_taken + 1024


def test_hoppers_tiles_of_wide_heads_are_not_those_of_others() -> None:
    reasons = "; ".join(backward_infeasible(training(head_dim=128), WIDE, H200))
    assert "block_n 64 is not a power of two from 128 to 128" in reasons
    reasons = "; ".join(backward_infeasible(training(head_dim=192), WIDE.with_(block_n=128), H200))
    assert "block_n 128 is not a power of two from 64 to 64" in reasons
    reasons = "; ".join(backward_infeasible(training(head_dim=256), WIDE.with_(dq_num_stages=3), H200))
    assert "3 stages of 64 keys beside 128 queries take" in reasons


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (BackwardPlan(TRITON_BACKWARD, 24), "the pass that owns keys: block_m 24 is not a power of two from 16 to 128"),
        (BackwardPlan(TRITON_BACKWARD, dq_block_n=48), "the pass that owns queries: dq_block_n 48 is not a power of two"),
        (BackwardPlan(TRITON_BACKWARD, num_warps=3), "num_warps 3 is not a power of two"),
        (BackwardPlan(TRITON_BACKWARD, dq_num_stages=9), "dq_num_stages 9 is not within 1 and 4"),
        (BackwardPlan(TRITON_BACKWARD, num_programs=132), "num_programs 132"),
        (BackwardPlan(TRITON_BACKWARD, num_programs=-1), "num_programs -1 is negative"),
        (BackwardPlan(TRITON_BACKWARD, 128, 128, 4), "it would spill"),
        (BackwardPlan(TRITON_BACKWARD, 128, 128, num_stages=4), "bytes of shared memory, and a program of H200 has 232448"),
        (BackwardPlan(GLUON_BACKWARD_SM90, block_n=64), "block_n 64 is not a power of two from 128 to 128"),
        (BackwardPlan(GLUON_BACKWARD_SM90, num_warps=4), "num_warps 4 is not 8, which gluon.backward_sm90 takes"),
        (BackwardPlan(GLUON_BACKWARD_SM90, dq_num_stages=2), "dq_num_stages 2 is not within 3 and 4"),
        (BackwardPlan(TRITON_BACKWARD, one_pass=True), "one_pass: triton.backward sums dQ in a pass of its own"),
        (BackwardPlan(GLUON_BACKWARD_SM90, num_stages=4, one_pass=True), "4 stages of 64 queries beside 128 keys take"),
        (BackwardPlan(GLUON_BACKWARD_SM90, num_stages=3, num_programs=132, one_pass=True), "3 stages of 64 queries beside 128 keys take"),
        (BackwardPlan(GLUON_BACKWARD_SM90, 128, one_pass=True), "it would spill"),
        (BackwardPlan(GLUON_BACKWARD_SM90, 128, dq_num_stages=3), "128 keys and 128 queries a step with head dims 128 and 128 want"),
    ],
)
def test_an_impossible_plan_says_the_number_that_decides(plan: BackwardPlan, reason: str) -> None:
    assert reason in "; ".join(backward_infeasible(training(), plan, H200))


def test_a_grid_has_a_limit() -> None:
    crowd = training(1 << 20, batch=1 << 16, num_heads_q=64, num_heads_kv=64)
    plan = BackwardPlan(TRITON_BACKWARD, 16, 16, 1, 1, 16, 16, 1, 1)
    assert "a grid holds 2147483647" in "; ".join(backward_infeasible(crowd, plan, A100))


@pytest.mark.parametrize("seqlen", [1024, 4096, 16384])
@pytest.mark.parametrize("band", [FULL, CAUSAL], ids=["full", "causal"])
def test_on_hopper_the_portable_kernel_has_several_programs_an_sm(seqlen: int, band: Band) -> None:
    """Measured on an H200: 64 keys and 64 queries by 4 warps beat 128 keys and 32 queries by 8, though they spill."""
    for head_dim, stages in ((64, 3), (128, 2)):
        problem = training(seqlen, band=band, head_dim=head_dim)
        plan = choose_backward_plan(problem, H200, TRITON_BACKWARD)
        assert isinstance(plan, BackwardPlan)
        assert (plan.block_n, plan.block_m, plan.num_warps, plan.num_stages) == (64, 64, 4, stages)
        assert (plan.dq_block_m, plan.dq_block_n, plan.dq_num_warps, plan.dq_num_stages) == (64, 64, 4, stages)
        assert all(pass_footprint(problem, tile, H200).resident >= 2 for tile in pass_tiles(plan))


@pytest.mark.parametrize("feature", [{"softcap": True}, {"alibi": True}, {"dropout": True}, {"ragged_q": True}, {"band": Band(99, 0)}])
def test_beside_features_only_what_spills_nothing_is_taken(feature: dict[str, Any]) -> None:
    for head_dim in (64, 128):
        tile = choose_pass(training(head_dim=head_dim, **feature), H200, TRITON_BACKWARD, "keys")
        assert isinstance(tile, PassTile)
        shapes = {shape[:4]: shape for shape in SHAPES["wgmma"]["keys"][head_dim]}
        assert shapes[tile.owned, tile.step, tile.num_warps, tile.num_stages].spilled == 0


def test_features_and_loads_one_by_one_take_smaller_tiles() -> None:
    plain, shaped, unaligned = (
        choose_pass(problem, B200, TRITON_BACKWARD, "keys")
        for problem in (training(head_dim=64), training(head_dim=64, softcap=True), training(head_dim=64, alignment=2))
    )
    assert isinstance(plain, PassTile)
    assert isinstance(shaped, PassTile)
    assert isinstance(unaligned, PassTile)
    assert shaped.owned * shaped.step < plain.owned * plain.step
    assert unaligned.owned * unaligned.step < shaped.owned * shaped.step


def test_a_window_counts_as_a_feature() -> None:
    causal, window = (choose_pass(training(head_dim=64, band=band), B200, TRITON_BACKWARD, "keys") for band in (CAUSAL, Band(1023, 0)))
    assert isinstance(causal, PassTile)
    assert isinstance(window, PassTile)
    assert window.step < causal.step


def test_less_shared_memory_means_a_smaller_tile() -> None:
    large, small = (choose_pass(training(head_dim=256), device, TRITON_BACKWARD, "queries") for device in (A100, Device.named("L40S")))
    assert isinstance(large, PassTile)
    assert isinstance(small, PassTile)
    assert small.owned * small.step < large.owned * large.step


def test_shapes_are_within_the_limits_of_the_kernel() -> None:
    limits = BACKWARD_LIMITS[TRITON_BACKWARD]
    for family, passes in SHAPES.items():
        for owner in OWNERS:
            for head_dim, shapes in passes[owner].items():
                assert head_dim in (64, 96, 128, 192, 256)
                for shape in shapes:
                    assert limits.owned[0] <= shape.owned <= limits.owned[1]
                    assert limits.step[0] <= shape.step <= min(shape.owned, limits.step[1])
                    assert limits.stages[owner][0] <= shape.num_stages <= limits.stages[owner][1]
                    assert shape.registers < SPILLS
                    # what spills was measured without features: beside them it would be a guess
                    assert shape.spilled == 0 or (shape.shaped == SPILLS and family == "wgmma")


def test_plans_are_their_passes() -> None:
    plan = BackwardPlan(GLUON_BACKWARD_SM90, 64, 128, 8, 3, 128, 64, 8, 4, 132)
    keys, queries = pass_tiles(plan)
    assert plan_of_passes(keys, queries, num_programs=132) == plan
    plan = BackwardPlan(GLUON_BACKWARD_SM90, 128, 128, 8, 2, one_pass=True)
    [keys] = pass_tiles(plan)
    assert keys.adds_dq
    assert plan_of_passes(keys, None) == plan
    assert pass_tiles(plan.with_(dq_block_m=3, dq_num_warps=5)) == (keys,)  # fields of a pass that there is not say nothing


@settings(max_examples=100, deadline=None)
@given(seqlen=st.sampled_from([100, 512, 1024, 8192]), device=st.sampled_from(GPUS), head_dim=st.sampled_from([64, 128]))
def test_the_model_never_promises_more_than_the_device_has(seqlen: int, device: Device, head_dim: int) -> None:
    problem = training(seqlen, head_dim=head_dim, band=FULL)
    tiles = pass_tiles(plan_backward(problem, device))
    cost = backward_cost(problem, tiles, [pass_footprint(problem, tile, device) for tile in tiles], device)
    assert cost.total_us >= 1e6 * backward_flops(problem) / device.matrix_rate
    assert min(*cost.keys, *(cost.queries or ()), cost.delta_us, cost.dq_us) >= 0


def test_more_sms_are_never_slower() -> None:
    problem = training(2048)
    larger = replace(A100, num_sms=2 * A100.num_sms, matrix_rate=2 * A100.matrix_rate, vector_rate=2 * A100.vector_rate,
                     exp_rate=2 * A100.exp_rate, bandwidth=2 * A100.bandwidth)  # fmt: skip
    for tile in pass_tiles(plan_backward(problem, A100)):
        times = [pass_cost(problem, tile, pass_footprint(problem, tile, device), device).total_us for device in (A100, larger)]
        assert times[1] < times[0]
