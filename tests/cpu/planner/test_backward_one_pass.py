"""Backward in one pass: what cannot, when it is chosen, what it takes and costs."""

from __future__ import annotations

import pytest

from flashtile.band import Band
from flashtile.errors import UnsupportedError
from flashtile.planner.backward_cost import backward_cost, backward_workspace
from flashtile.planner.backward_footprint import pass_footprint, pass_shared_memory
from flashtile.planner.backward_rules import (
    backward_infeasible,
    choose_backward_plan,
    one_pass_keys,
    one_pass_plan,
    why_not_one_pass,
)
from flashtile.planner.backward_tiles import (
    hopper_pass_tile,
    hopper_whole_tile,
    pass_tiles,
    plan_of_passes,
)
from flashtile.planner.backward_work import typical_keys
from flashtile.planner.catalog import GLUON_BACKWARD_SM90, TRITON_BACKWARD
from flashtile.planner.choose import plan_backward
from flashtile.planner.device import Device
from flashtile.planner.plans import BackwardPlan
from tests.cpu.planner.drawn import training

H200 = Device.named("H200")
FULL, CAUSAL = Band(), Band(None, 0)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_hoppers_kernel_can_do_it_in_one_pass_where_asked_to(head_dim: int) -> None:
    problem = training(head_dim=head_dim)
    plan = one_pass_plan(problem, H200, GLUON_BACKWARD_SM90).with_(source="explicit")
    assert plan.one_pass
    assert plan_backward(problem, H200, plan=plan) == plan
    assert plan_backward(problem, H200, plan=plan.with_(dq_block_n=7, dq_num_stages=99)).one_pass


def test_one_pass_is_never_deterministic() -> None:
    problem = training(16384, deterministic=True)
    plan = one_pass_plan(problem, H200, GLUON_BACKWARD_SM90)
    assert "in no fixed order, and the same bits are wanted" in "; ".join(backward_infeasible(problem, plan, H200))
    with pytest.raises(UnsupportedError, match="one_pass"):
        plan_backward(problem, H200, plan=plan)


@pytest.mark.parametrize("dims", [(192, 128), (128, 256)])
def test_long_heads_leave_no_registers_for_one_pass(dims: tuple[int, int]) -> None:
    problem = training(head_dim=dims[0], head_dim_v=dims[1])
    reasons = why_not_one_pass(problem, GLUON_BACKWARD_SM90)
    assert reasons == [f"one_pass: head dims {dims[0]} and {dims[1]} leave no registers for dQ; each is at most 128"]
    assert backward_infeasible(problem, BackwardPlan(GLUON_BACKWARD_SM90, one_pass=True), H200) == reasons


@pytest.mark.parametrize(
    ("head_dim", "seqlen", "band", "deterministic", "one_pass"),
    [
        (128, 512, FULL, False, False), (128, 1024, FULL, False, True), (128, 1024, FULL, True, False), (128, 1024, CAUSAL, False, False),
        (128, 2048, CAUSAL, False, True), (128, 4096, CAUSAL, True, False), (128, 16384, Band(1023, 0), False, False),
        (64, 256, FULL, False, False), (64, 512, FULL, False, True), (64, 512, FULL, True, False), (64, 512, CAUSAL, False, False),
        (64, 1024, CAUSAL, False, True), (64, 16384, Band(1023, 0), False, False),
    ],
)  # fmt: skip
def test_one_pass_is_for_queries_that_see_many_keys(head_dim: int, seqlen: int, band: Band, deterministic: bool, one_pass: bool) -> None:
    problem = training(seqlen, head_dim=head_dim, band=band, deterministic=deterministic)
    plan = choose_backward_plan(problem, H200, GLUON_BACKWARD_SM90)
    assert isinstance(plan, BackwardPlan)
    assert plan.one_pass is one_pass
    assert plan.num_programs == H200.num_sms or not one_pass
    portable = choose_backward_plan(problem, H200, TRITON_BACKWARD)
    assert isinstance(portable, BackwardPlan)
    assert not portable.one_pass


def test_packed_sequences_and_windows_want_more_keys_for_one_pass() -> None:
    for changes in ({"ragged_q": True, "ragged_k": True, "total_q": 8192}, {"band": Band(1023, None)}):
        assert one_pass_keys(training(1024, **changes)) > one_pass_keys(training(1024))


def test_packed_sequences_count_as_long_as_they_are_on_average() -> None:
    packed = training(8192, batch=64, ragged_q=True, ragged_k=True, total_q=64 * 8192)
    assert typical_keys(packed) == typical_keys(training(8192)) == pytest.approx(4096, rel=0.001)
    assert typical_keys(packed.with_(total_q=64 * 2048)) == pytest.approx(1024, rel=0.001)
    assert typical_keys(packed.with_(total_q=0, batch=0)) == 0


def test_one_pass_takes_room_for_gradients_of_scores_and_for_dqs_sums() -> None:
    problem = training()
    tile = hopper_whole_tile(128)
    alone = pass_shared_memory(problem, tile._replace(adds_dq=False), H200)
    assert pass_shared_memory(problem, tile, H200) == alone + 2 * 128 * tile.step * 2
    [stays] = pass_tiles(plan_of_passes(tile, None, num_programs=132))
    assert pass_shared_memory(problem, stays, H200) == pass_shared_memory(problem, tile, H200) + 2 * 128 * 128 * 2
    more = backward_workspace(problem, one_pass=True) - backward_workspace(problem, one_pass=False)
    assert more == 4 * 4096 * 16 * 128 * 4
    assert backward_workspace(training(head_dim=72), one_pass=True) > backward_workspace(training(head_dim=64), one_pass=True)


@pytest.mark.parametrize(
    ("head_dim", "num_programs", "compiled"), [(128, 0, 165_656), (128, 132, 231_288), (64, 0, 166_344), (64, 132, 199_128)]
)
def test_hoppers_shared_memory_is_what_one_pass_takes(head_dim: int, num_programs: int, compiled: int) -> None:
    [tile] = pass_tiles(plan_of_passes(hopper_whole_tile(head_dim), None, num_programs))
    assert compiled <= pass_shared_memory(training(head_dim=head_dim), tile, H200) <= compiled + 1024


def test_one_pass_costs_what_measures_show() -> None:
    """On an H200, 16384 tokens: one pass took 9255 us and two took 9951 where queries see 16384 keys, 749 and 727 where they see 1024."""
    for seqlen, in_one, in_two in ((16384, 9255, 9951), (1024, 749, 727)):
        problem = training(seqlen, batch=16384 // seqlen, band=FULL)
        for tiles, measured in (
            ((hopper_whole_tile(128),), in_one),
            ((hopper_pass_tile("keys", 128), hopper_pass_tile("queries", 128)), in_two),
        ):
            us = backward_cost(problem, tiles, [pass_footprint(problem, tile, H200) for tile in tiles], H200).total_us
            assert us == pytest.approx(measured, rel=0.12)
