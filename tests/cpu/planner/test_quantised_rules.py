"""Rows over quantised caches: how many Hopper's kernel takes, in which tiles, by how many programs, and what is said of the rest."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtile.planner.catalog import GLUON_SM90, TRITON
from flashtile.planner.choose import plan_decode
from flashtile.planner.cost import predict_us
from flashtile.planner.device import Device
from flashtile.planner.explain import explain
from flashtile.planner.feasible import infeasible
from flashtile.planner.footprint import footprint_of
from flashtile.planner.plans import DecodePlan
from flashtile.planner.quantised_rules import leaves_quantised
from flashtile.problem import Problem

H200 = Device.named("H200")


def over_codes(batch: int, seqlen_q: int, *, stored: str = "float8_e4m3fn", group: int = 4, **others: object) -> Problem:
    """``seqlen_q`` queries of ``group`` heads over each of 8 key heads: seqlen_q * group packed rows."""
    facts: dict[str, object] = {"seqlen_k": 4096, "dtype_q": "bfloat16", "dtype_k": stored, "dtype_v": stored}
    return Problem(**{"batch": batch, "seqlen_q": seqlen_q, "num_heads_q": 8 * group, "num_heads_kv": 8} | facts | others)  # type: ignore[arg-type]


@pytest.mark.parametrize("stored", ["float8_e4m3fn", "int8"])
@pytest.mark.parametrize(
    ("group", "seqlen_q", "kernel", "block_m"),
    [
        (8, 1, GLUON_SM90, 8),
        (4, 4, GLUON_SM90, 16),
        (8, 3, GLUON_SM90, 16),  # 24 rows: two blocks convert the keys less often than three
        (4, 8, GLUON_SM90, 16),
        (4, 16, GLUON_SM90, 16),
        (5, 13, TRITON, 64),
        (4, 32, TRITON, 64),
    ],
)
def test_up_to_four_blocks_of_rows_are_hoppers(stored: str, group: int, seqlen_q: int, kernel: str, block_m: int) -> None:
    for batch in (1, 16):
        plan = plan_decode(over_codes(batch, seqlen_q, stored=stored, group=group), H200)
        assert (plan.kernel, plan.source) == (kernel, "rule")
        assert plan.block_m == block_m or kernel == TRITON
        assert not plan.swapped


def test_rows_of_unlike_sequences_count_on_average() -> None:
    """One chunk among single tokens is not a batch of chunks."""
    among_many = over_codes(64, 512, ragged_q=True, total_q=63 + 512)
    assert leaves_quantised(among_many, GLUON_SM90) == []
    assert plan_decode(among_many, H200).kernel == GLUON_SM90
    among_few = over_codes(8, 512, ragged_q=True, total_q=7 + 512)
    assert plan_decode(among_few, H200).kernel == TRITON


def test_what_is_left_says_why_and_may_be_asked_for_all_the_same() -> None:
    problem = over_codes(16, 20)
    explanation = explain(problem, H200)
    (kernel,) = explanation.other_kernels
    assert (explanation.plan.kernel, kernel.kernel) == (TRITON, GLUON_SM90)
    assert "beyond 4 blocks of rows a sequence, here 5, triton.decode converts" in kernel.reasons[0]
    assert f"Not kernel {GLUON_SM90}: quantised keys become float16 for 16 rows at a time" in "\n".join(explanation.lines())
    hoppers = next(row for row in explanation.alternatives if (row.kernel, row.block_m) == (GLUON_SM90, 16))
    assert hoppers.feasible
    assert hoppers.why.startswith("80 rows need 5 blocks of 16") or "leaves so many rows to triton.decode" in hoppers.why
    asked = plan_decode(problem, H200, block_m=16)
    assert (asked.kernel, asked.block_m, asked.source) == (GLUON_SM90, 16, "explicit")
    assert plan_decode(problem, H200, plan=asked) is asked
    assert explain(problem, H200, asked).other_kernels == ()


def test_rows_of_sixteen_bits_and_other_gpus_have_no_such_rule() -> None:
    assert leaves_quantised(Problem(batch=16, seqlen_q=64, seqlen_k=4096, num_heads_q=32, num_heads_kv=8), GLUON_SM90) == []
    assert leaves_quantised(over_codes(16, 64), TRITON) == []
    assert plan_decode(over_codes(16, 8), Device.named("A100")).kernel == TRITON


@pytest.mark.parametrize(("batch", "seqlen_q", "programs"), [(16, 8, 256), (16, 16, 512), (64, 8, 1024), (19, 8, 264), (64, 4, 264)])
def test_blocks_of_one_sequence_run_side_by_side(batch: int, seqlen_q: int, programs: int) -> None:
    """A program each from one and a half waves on: one that had two blocks of a sequence would read its keys twice, far apart."""
    problem = over_codes(batch, seqlen_q)
    plan = plan_decode(problem, H200)
    assert H200.num_sms * footprint_of(problem, plan, H200).resident == 264
    assert (plan.num_programs, plan.num_splits) == (programs, 1)


def test_blocks_that_compute_longer_than_they_read_are_split_while_half_of_the_sms_are_free() -> None:
    for batch, seqlen_q, splits, programs in ((4, 8, 2, 128), (4, 16, 1, 128), (8, 4, 1, 64)):
        plan = plan_decode(over_codes(batch, seqlen_q), H200)
        assert (plan.num_splits, plan.num_programs) == (splits, programs), (batch, seqlen_q)


@pytest.mark.parametrize("page_size", [0, 16, 1, 128])
def test_two_programs_of_sixteen_rows_share_an_sm_where_there_is_more_than_a_wave(page_size: int) -> None:
    for batch, seqlen_q in ((64, 4), (16, 8), (16, 16), (128, 4)):
        problem = over_codes(batch, seqlen_q, page_size=page_size)
        plan = plan_decode(problem, H200)
        footprint = footprint_of(problem, plan, H200)
        assert (plan.kernel, plan.block_m, footprint.resident) == (GLUON_SM90, 16, 2), (batch, seqlen_q)


def test_the_portable_kernels_conversion_is_what_it_was_measured_to_take() -> None:
    """102.8 us of 256 programs with 16 rows and 64 keys (benchmarks/results/decode_fp8.json), by which Hopper's kernel is preferred."""
    problem = over_codes(16, 8)
    portable = DecodePlan(
        kernel=TRITON, block_m=16, block_n=64, num_warps=4, num_stages=5, keys_per_split=4096, min_keys_per_split=64, num_programs=256
    )
    assert infeasible(problem, portable, H200) == []
    cost = predict_us(problem, portable, H200)
    assert cost.total_us == pytest.approx(102.8, rel=0.1)
    assert cost.bound == "exp"
    assert predict_us(problem, plan_decode(problem, H200), H200).total_us < 60
    sixteen_bits = problem.with_(dtype_k="bfloat16", dtype_v="bfloat16")
    assert predict_us(sixteen_bits, portable.with_(num_stages=3), H200).bound == "memory"


problems = st.builds(
    over_codes,
    batch=st.integers(1, 200),
    seqlen_q=st.sampled_from([1, 2, 3, 5, 8, 16, 17, 100]),
    stored=st.sampled_from(["float8_e4m3fn", "int8"]),
    group=st.sampled_from([1, 3, 4, 8, 16]),
    seqlen_k=st.sampled_from([1, 63, 777, 4096, 131072]),
    head_dim=st.sampled_from([8, 64, 72, 128, 192, 256]),
    head_dim_v=st.sampled_from([64, 128, 256]),
    page_size=st.sampled_from([0, 1, 16, 128]),
    softcap=st.booleans(),
    alibi=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(problem=problems)
def test_whatever_the_rows_some_kernel_takes_them(problem: Problem) -> None:
    plan = plan_decode(problem, H200)
    assert infeasible(problem, plan, H200) == []
    if leaves_quantised(problem, GLUON_SM90):
        assert plan.kernel == TRITON
