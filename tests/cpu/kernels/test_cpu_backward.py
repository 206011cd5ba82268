"""The CPU engine's backward against autograd through the reference, called as the library calls it: bound once, gradients full of NaN."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashtile.kernels.call import BackwardCall
from flashtile.kernels.cpu_backward import bind
from flashtile.planner.plans import BackwardPlan
from flashtile.testing import poison
from flashtile.testing.backward_inputs import BACKWARD_CASES, Gradients, assert_gradients, backward_call, backward_problem, gradients_of
from flashtile.testing.forward_cases import ForwardCase
from flashtile.testing.forward_inputs import ForwardInputs, make_forward_inputs
from flashtile.testing.memory import LargestResult

pytestmark = pytest.mark.usefixtures("one_thread")
NAMED = {case.name: case for case in BACKWARD_CASES}


def run_engine(inputs: ForwardInputs, call: BackwardCall, block_m: int = 1 << 20) -> Gradients:
    """What the engine writes; memory that it leaves to chance is NaN."""
    plan = BackwardPlan(kernel="cpu.backward", block_m=block_m)
    with poison.allocations():
        bind(backward_problem(inputs), plan, torch.device("cpu"))(call)
    return gradients_of(call)


def check(case: ForwardCase, *, through_lse: bool | None = None, block_m: int = 1 << 20) -> None:
    inputs = make_forward_inputs(case)
    call = backward_call(inputs, through_lse=through_lse)
    run_engine(inputs, call, block_m)
    assert_gradients(inputs, call)


@pytest.mark.parametrize("case", BACKWARD_CASES, ids=lambda c: c.name)
def test_every_case(case: ForwardCase) -> None:
    check(case, through_lse=False)


@pytest.mark.parametrize("case", BACKWARD_CASES, ids=lambda c: c.name)
def test_every_case_through_lse_some_rows_at_a_time(case: ForwardCase) -> None:
    check(case, through_lse=True, block_m=24)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "name", ["dim_192_value_128", "group_3", "varlen_everything", "large_logits", "softcap", "alibi", "few_queries_causal"]
)
def test_every_dtype(name: str, dtype: str) -> None:
    check(dataclasses.replace(NAMED[name], dtype=dtype))


LONG = [
    ForwardCase("causal", 400, 400, num_heads_kv=2, dtype="bfloat16", causal=True, head_dim=32),
    ForwardCase("chunk_causal_group_4", 200, 700, num_heads_q=4, dtype="bfloat16", causal=True, head_dim=16),
    ForwardCase("window_many_blocks", 800, 800, window=(300, 0), head_dim=16, dtype="bfloat16"),
    ForwardCase("softcap_many_blocks", 300, 1300, softcap=20.0, head_dim=16, dtype="float32", causal=True, num_heads_kv=2),
    ForwardCase("alibi_many_blocks", 300, 1100, alibi=True, head_dim=16, causal=True),
    ForwardCase("equal_lengths", (100,) * 4, (130,) * 4, num_heads_q=2, num_heads_kv=2, dtype="bfloat16", causal=True),
    ForwardCase("extreme_logits", 300, 900, logit_scale=60.0, rising=True, causal=True, dtype="float32"),
]


@pytest.mark.parametrize("case", LONG, ids=lambda c: c.name)
def test_problems_of_many_blocks(case: ForwardCase) -> None:
    check(case)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ["sinks", "everything_fp32", "varlen"])
def test_gradients_never_vary(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    inputs = make_forward_inputs(dataclasses.replace(NAMED[name], num_heads_q=12, num_heads_kv=6))
    calls = [backward_call(inputs) for _ in range(2)]
    first, second = (run_engine(inputs, call) for call in calls)
    assert_gradients(inputs, calls[0])
    for gradient, again in zip(first, second):
        assert gradient is None or again is None or torch.equal(gradient, again)


def test_packed_sequences_with_unused_keys_between_them_are_no_run() -> None:
    check(ForwardCase("gaps", (20, 20, 20), (40, 40, 40), seqused_k=(30, 30, 30), num_heads_kv=2, dtype="bfloat16"))


@pytest.mark.parametrize("scale", [0.0, -3.0, 1e-30])
@pytest.mark.parametrize("name", ["q65_k63_causal", "q129_k127", "softcap"])
def test_any_scale(name: str, scale: float) -> None:
    check(dataclasses.replace(NAMED[name], scale=scale, dtype="float32"))


def test_a_minus_infinite_sink_has_no_gradient() -> None:
    for through_lse in (False, True):
        inputs = make_forward_inputs(NAMED["more_queries_sinks_causal_fp32"])
        inputs.args["sinks"][:] = float("-inf")
        call = backward_call(inputs, through_lse=through_lse)
        run_engine(inputs, call)
        assert_gradients(inputs, call)
        assert call.dsinks is not None
        assert not call.dsinks.any()


def test_sinks_that_want_no_gradient_get_none() -> None:
    inputs = make_forward_inputs(NAMED["sinks"])
    call = backward_call(inputs)._replace(dsinks=None)
    run_engine(inputs, call)
    assert_gradients(inputs, call)


def test_a_runner_serves_other_calls_of_its_kind() -> None:
    bound = make_forward_inputs(ForwardCase("bound", (30, 40), (40, 90), num_heads_kv=2, causal=True))
    runner = bind(backward_problem(bound), BackwardPlan(kernel="cpu.backward", block_m=1 << 20), torch.device("cpu"))
    for lengths in (((1, 7), (8, 2)), ((40, 33), (5, 70))):
        inputs = make_forward_inputs(ForwardCase("other", *lengths, num_heads_kv=2, causal=True))
        for through_lse in (False, True):
            call = backward_call(inputs, through_lse=through_lse)
            runner(call)
            assert_gradients(inputs, call)


def test_gradients_and_results_with_heads_before_tokens() -> None:
    for name in ("group_3", "q65_k63_causal", "window_both_sides"):
        inputs = make_forward_inputs(NAMED[name])
        call = backward_call(inputs)
        moved = {f: getattr(call, f).transpose(1, 2).contiguous().transpose(1, 2) for f in ("out", "dout", "dq", "dk", "dv")}
        call = call._replace(**moved)
        run_engine(inputs, call)
        assert_gradients(inputs, call)


@pytest.mark.parametrize("features", [{"causal": True}, {"window": (99, 7)}, {"softcap": 9.0}, {"alibi": True, "causal": True}], ids=str)
def test_memory_is_linear_in_the_lengths(features: dict[str, Any]) -> None:
    elements = []
    for seqlen in (1024, 3072):
        case = ForwardCase("long", seqlen, seqlen, num_heads_q=1, head_dim=8, dtype="float32", padding=0, **features)
        inputs = make_forward_inputs(case)
        q, lse = inputs.args["q"], torch.full((1, 1, seqlen), 5.0)
        call = BackwardCall(
            q=q, k=inputs.args["k"], v=inputs.args["v"], out=q, lse=lse, dout=q, dlse=None, dq=torch.empty_like(q), dk=torch.empty_like(q),
            dv=torch.empty_like(q), dsinks=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_k=None, max_seqlen_q=seqlen,
            max_seqlen_k=seqlen, sinks=None, alibi_slopes=inputs.args["alibi_slopes"], scale=0.3, softcap=case.softcap,
        )  # fmt: skip
        with LargestResult() as largest:
            run_engine(inputs, call)
        elements.append(largest.numel)
    assert elements[1] <= 3 * elements[0]
    assert elements[1] < 3072 * 3072 // 8


@st.composite
def cases(draw: st.DrawFn) -> ForwardCase:
    heads_kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    lengths, batch = st.integers(0, 100), draw(st.integers(1, 3))
    varlen = draw(st.booleans())
    return ForwardCase(
        "drawn",
        tuple(draw(lengths) for _ in range(batch)) if varlen else draw(lengths),
        tuple(draw(lengths) for _ in range(batch)) if varlen else draw(lengths),
        batch=batch,
        num_heads_q=heads_kv * group,
        num_heads_kv=heads_kv,
        head_dim=draw(st.sampled_from([8, 24])),
        head_dim_v=draw(st.sampled_from([0, 16])),
        dtype="float32",
        causal=draw(st.booleans()),
        window=draw(st.sampled_from([None, None, (5, 3), (None, 20), (40, None)])),
        softcap=draw(st.sampled_from([0.0, 0.0, 10.0])),
        alibi=draw(st.booleans()),
        sinks=draw(st.booleans()),
        layout=draw(st.sampled_from(["NHD", "HND"])),
        offset_elements=draw(st.sampled_from([0, 1])),
        spare_rows=draw(st.integers(0, 4)) if varlen else 0,
        spare_keys=draw(st.integers(0, 4)) if varlen else 0,
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases(), st.booleans(), st.sampled_from([7, 64, 1 << 20]))
def test_any_case(case: ForwardCase, through_lse: bool, block_m: int) -> None:
    check(case, through_lse=through_lse, block_m=block_m)
