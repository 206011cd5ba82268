"""The CPU engine's forward against the reference, called as the library calls it: bound once, outputs full of NaN."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flashtile
from flashtile.kernels import cpu_forward
from flashtile.kernels.cpu_forward import bind
from flashtile.planner.plans import ForwardPlan
from flashtile.problem import Problem
from flashtile.testing import poison
from flashtile.testing.forward_cases import FORWARD_CASES, ForwardCase
from flashtile.testing.forward_inputs import ForwardInputs, expected_forward, forward_call, make_forward_inputs
from flashtile.testing.memory import LargestResult
from flashtile.testing.tolerance import assert_close

NAMED = {case.name: case for case in FORWARD_CASES}


def run_engine(inputs: ForwardInputs, *, block_m: int = 1 << 20, lse: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of the engine; memory that it leaves to chance is NaN."""
    out, lse_out = poison.outputs(inputs.args["q"], inputs.case.head_dim_v)
    plan = ForwardPlan(kernel="cpu.forward", block_m=block_m)
    with poison.allocations():
        bind(Problem.forward(**inputs.args, lse=lse), plan, torch.device("cpu"))(forward_call(inputs, out, lse_out if lse else None))
    return out, lse_out


def check(case: ForwardCase, **options: Any) -> None:
    inputs = make_forward_inputs(case)
    out, lse = run_engine(inputs, **options)
    assert_close(out, lse, *expected_forward(inputs), dtype=inputs.dtype, cpu_engine=True, what=f"{case.name} {options}")


@pytest.mark.parametrize("case", FORWARD_CASES, ids=lambda c: c.name)
def test_every_case(case: ForwardCase) -> None:
    check(case)


@pytest.mark.parametrize("case", FORWARD_CASES, ids=lambda c: c.name)
def test_every_case_some_rows_at_a_time(case: ForwardCase) -> None:
    check(case, block_m=24)


@pytest.mark.parametrize("case", FORWARD_CASES, ids=lambda c: c.name)
def test_every_case_through_the_api(case: ForwardCase) -> None:
    inputs = make_forward_inputs(case)
    function = flashtile.attention_varlen_with_lse if inputs.varlen else flashtile.attention_with_lse
    with poison.allocations():
        out, lse = function(**inputs.args)
    assert_close(out, lse, *expected_forward(inputs), dtype=inputs.dtype, cpu_engine=True, what=case.name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "name", ["dim_192_value_128", "dim_64_value_128", "group_3", "varlen_everything", "pages_of_16", "large_logits", "softcap", "alibi"]
)
def test_every_dtype(name: str, dtype: str) -> None:
    check(dataclasses.replace(NAMED[name], dtype=dtype))


LONG = [
    ForwardCase("causal", 700, 700, num_heads_q=4, num_heads_kv=4, dtype="bfloat16", causal=True),
    ForwardCase("chunk_causal_group_4", 300, 1500, num_heads_q=4, dtype="bfloat16", causal=True),
    ForwardCase("chunk_causal_float16_batch", 257, 900, batch=3, num_heads_q=4, num_heads_kv=4, causal=True, sinks=True),
    ForwardCase("window_many_chunks", 1500, 1500, num_heads_q=4, window=(400, 0), head_dim=32, dtype="bfloat16"),
    ForwardCase("softcap_many_chunks", 700, 1300, softcap=20.0, head_dim=32, dtype="float32", causal=True),
    ForwardCase("alibi_many_chunks", 600, 1100, num_heads_q=4, alibi=True, head_dim=32, causal=True),
    ForwardCase("few_queries_many_keys", 5, 3000, batch=2, num_heads_q=8, num_heads_kv=2, dtype="bfloat16", causal=True),
    ForwardCase("equal_lengths", (300,) * 4, (500,) * 4, num_heads_q=2, num_heads_kv=2, dtype="bfloat16", causal=True),
    ForwardCase("equal_lengths_paged", (300,) * 3, (700,) * 3, num_heads_q=4, num_heads_kv=2, page_size=16, causal=True),
    ForwardCase("extreme_logits", 400, 1200, logit_scale=60.0, rising=True, causal=True),
]


@pytest.mark.parametrize("case", LONG, ids=lambda c: c.name)
def test_problems_of_many_blocks(case: ForwardCase) -> None:
    check(case)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_some_heads_after_others(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_forward, "_RESULT_BYTES", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in ("sinks", "hnd_fp32", "varlen_cross_bf16", "dim_192"):
            check(dataclasses.replace(NAMED[name], num_heads_q=12, num_heads_kv=6))
    finally:
        torch.set_num_threads(before)


def test_packed_sequences_with_unused_keys_between_them_are_no_run() -> None:
    check(ForwardCase("gaps", (20, 20, 20), (40, 40, 40), seqused_k=(30, 30, 30), num_heads_kv=2, dtype="bfloat16"))


def test_lse_is_not_written_where_it_is_not_wanted() -> None:
    for name in ("q65_k63_causal", "varlen", "alibi", "more_queries_than_keys_causal"):
        inputs = make_forward_inputs(NAMED[name])
        out, lse = run_engine(inputs, lse=False)
        assert_close(out, None, expected_forward(inputs)[0], None)
        assert lse.isnan().all()


@pytest.mark.parametrize("features", [{"causal": True}, {"window": (99, 7)}, {"softcap": 9.0}, {"alibi": True, "causal": True}], ids=str)
def test_memory_is_linear_in_the_lengths(features: dict[str, Any]) -> None:
    elements = []
    for seqlen in (1024, 4096):
        case = ForwardCase("long", seqlen, seqlen, num_heads_q=1, head_dim=8, dtype="float32", padding=0, **features)
        with LargestResult() as largest:
            run_engine(make_forward_inputs(case))
        elements.append(largest.numel)
    assert elements[1] <= 4 * elements[0]
    assert elements[1] < 4096 * 4096 // 8


def test_a_runner_serves_other_calls_of_its_kind() -> None:
    bound = make_forward_inputs(ForwardCase("bound", (30, 40), (40, 90), num_heads_kv=2, causal=True))
    runner = bind(Problem.forward(**bound.args, lse=True), ForwardPlan(kernel="cpu.forward", block_m=40), torch.device("cpu"))
    for lengths in (((1, 7), (8, 2)), ((40, 33), (5, 70))):
        inputs = make_forward_inputs(ForwardCase("other", *lengths, num_heads_kv=2, causal=True))
        out, lse = poison.outputs(inputs.args["q"], inputs.case.head_dim_v)
        runner(forward_call(inputs, out, lse))
        assert_close(out, lse, *expected_forward(inputs))


@pytest.mark.parametrize("scale", [0.0, -3.0, 1e-30])
@pytest.mark.parametrize("name", ["q65_k63_causal", "few_queries_causal", "q129_k127", "alibi", "softcap"])
def test_any_scale(name: str, scale: float) -> None:
    check(dataclasses.replace(NAMED[name], scale=scale))


def test_a_minus_infinite_sink_is_no_sink() -> None:
    for name in ("more_queries_sinks_causal_fp32", "varlen_empty_on_either_side"):
        inputs = make_forward_inputs(NAMED[name])
        inputs.args["sinks"][:] = float("-inf")
        out, lse = run_engine(inputs)
        assert_close(out, lse, *expected_forward(inputs))
        assert (lse == float("-inf")).any()


@pytest.mark.parametrize("starts_q", [[0, 50, 20, 500], [-7, 10, 10, 60], [30, 20, 10, 0]])
@pytest.mark.parametrize("starts_k", [[0, 30, 80, 90], [5, 90, 40, 1000], [-1000, -3, 20, 90]])
def test_starts_that_make_no_sense_are_clamped(starts_q: list[int], starts_k: list[int]) -> None:
    case = ForwardCase("absurd", (20, 20, 20), (30, 30, 30), num_heads_kv=2, dtype="float32", causal=True)
    inputs = make_forward_inputs(case)
    for name, starts in (("cu_seqlens_q", starts_q), ("cu_seqlens_k", starts_k)):
        inputs.args[name][:] = torch.tensor(starts, dtype=torch.int32)
    inputs.args["max_seqlen_q"] = 60
    assert_close(*run_engine(inputs), *expected_forward(inputs))


def test_out_with_heads_before_tokens() -> None:
    for name in ("group_3", "q65_k63_causal", "window_both_sides"):
        inputs = make_forward_inputs(NAMED[name])
        q = inputs.args["q"]
        out = poison.empty((*q.transpose(1, 2).shape[:-1], inputs.case.head_dim_v), q.dtype).transpose(1, 2)
        plan = ForwardPlan(kernel="cpu.forward", block_m=1 << 20)
        bind(Problem.forward(**inputs.args, out=out), plan, torch.device("cpu"))(forward_call(inputs, out, None))
        assert_close(out, None, expected_forward(inputs)[0], None)


@st.composite
def cases(draw: st.DrawFn) -> ForwardCase:
    heads_kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    lengths, batch = st.integers(0, 150), draw(st.integers(1, 3))
    varlen = draw(st.booleans())
    page_size = draw(st.sampled_from([0, 1, 5, 16])) if varlen else 0
    seqused = varlen and not page_size and draw(st.booleans())
    return ForwardCase(
        "drawn",
        tuple(draw(lengths) for _ in range(batch)) if varlen else draw(lengths),
        tuple(draw(lengths) for _ in range(batch)) if varlen else draw(lengths),
        batch=batch,
        num_heads_q=heads_kv * group,
        num_heads_kv=heads_kv,
        head_dim=draw(st.sampled_from([8, 24, 64])),
        head_dim_v=draw(st.sampled_from([0, 16])),
        dtype=draw(st.sampled_from(["float16", "bfloat16", "float32"])),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.tuples(st.none() | st.integers(0, 60), st.none() | st.integers(0, 20))),
        softcap=draw(st.sampled_from([0.0, 0.0, 12.0])),
        alibi=draw(st.booleans()),
        alibi_per_sequence=draw(st.booleans()),
        sinks=draw(st.booleans()),
        layout=draw(st.sampled_from(["NHD", "HND"])),
        logit_scale=draw(st.sampled_from([1.0, 10.0])),
        spare_rows=draw(st.integers(0, 3)) if varlen else 0,
        seqused_k=tuple(draw(st.integers(-1, 160)) for _ in range(batch)) if seqused else None,
        page_size=page_size,
        missing_pages=draw(st.integers(0, 1)) if page_size else 0,
    )


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(cases(), st.sampled_from([1, 16, 1 << 20]))
def test_any_shape_some_rows_at_a_time(case: ForwardCase, block_m: int) -> None:
    check(case, block_m=block_m)
