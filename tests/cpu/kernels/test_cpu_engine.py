"""The CPU engine against the reference, called as the library calls it: bound once, outputs full of NaN."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flashtile
from flashtile import reference
from flashtile.kernels.call import DecodeCall
from flashtile.kernels.cpu import bind
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem
from flashtile.testing import poison
from flashtile.testing.cases import QUANTISED_CASES, SMALL_CASES, Case
from flashtile.testing.inputs import Inputs, make_inputs
from flashtile.testing.tolerance import assert_close


def run_engine(
    inputs: Inputs, *, block_m: int = 128, keys_per_split: int = 0, out_dtype: torch.dtype | None = None, lse: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of the engine; memory that it leaves to chance is NaN."""
    args, case = inputs.args, inputs.case
    problem = Problem.decode(**args, lse=lse, out_dtype=out_dtype)
    plan = DecodePlan(kernel="cpu.decode", block_m=block_m, keys_per_split=keys_per_split)
    out, lse_out = poison.outputs(args["q"], case.head_dim_v, out_dtype)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    names = ("q", "k_cache", "v_cache", "seqlens_k", "page_table", "cu_seqlens_q", "sinks", "alibi_slopes")
    scales = {name: args.get(name) for name in ("k_scale", "v_scale")}
    call = DecodeCall(
        *(args[name] for name in names), out=out, lse=lse_out if lse else None, scale=scale, softcap=case.softcap,
        leftpad_k=args.get("leftpad_k"), **scales,
    )  # fmt: skip
    with poison.allocations():
        bind(problem, plan, torch.device("cpu"))(call)
    return out, lse_out


def check(case: Case, **options: Any) -> None:
    inputs = make_inputs(case)
    out, lse = run_engine(inputs, **options)
    assert_close(out, lse, *reference.decode(**inputs.args), dtype=inputs.dtype, cpu_engine=True, what=f"{case.name} {options}")


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda c: c.name)
def test_every_case(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", QUANTISED_CASES, ids=lambda c: c.name)
def test_every_case_over_a_quantised_cache(case: Case) -> None:
    check(case)
    check(case, block_m=8, keys_per_split=24)


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda c: c.name)
def test_every_case_in_small_tiles_and_parts(case: Case) -> None:
    check(case, block_m=8, keys_per_split=24)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "name", ["speculative_4", "everything", "pages_of_16", "window_both_sides", "value_dim_larger", "large_logits", "dim_8_mha"]
)
def test_every_dtype_and_float32_results(name: str, dtype: str) -> None:
    case = dataclasses.replace(next(c for c in SMALL_CASES if c.name == name), dtype=dtype)
    check(case)
    check(case, out_dtype=torch.float32)


def test_float32_results_of_16_bit_inputs_are_not_rounded_on_the_way() -> None:
    inputs = make_inputs(Case("partials", (200,), num_heads_q=8, dtype="bfloat16"))
    out, lse = run_engine(inputs, out_dtype=torch.float32)
    assert_close(out, lse, *reference.decode(**inputs.args), dtype=torch.float32)


def test_lse_is_not_written_where_it_is_not_wanted() -> None:
    inputs = make_inputs(Case("no lse", (70,), seqlens_q=3))
    out, lse = run_engine(inputs, lse=False)
    assert_close(out, None, reference.decode(**inputs.args)[0], None)
    assert lse.isnan().all()


LONG = [
    Case("mqa_long_odd", (3001,), num_heads_q=8, num_heads_kv=1, dtype="bfloat16"),
    Case("equal_lengths_in_chunks", (900,) * 5, num_heads_q=8, num_heads_kv=8, dtype="float16"),
    Case("equal_lengths_paged", (700,) * 3 + (900,), num_heads_q=8, num_heads_kv=2, page_size=16, dtype="bfloat16"),
    Case("prefill_chunk", (1500,), seqlens_q=700, num_heads_q=4, num_heads_kv=1, dtype="bfloat16"),
    Case("prefill_chunk_window_softcap", (1500,), seqlens_q=300, num_heads_q=4, num_heads_kv=1, window=(400, 0), softcap=20.0),
    Case("long_window", (6000,), num_heads_q=8, num_heads_kv=2, window=(2999, 0), seqlens_q=5, head_dim=128, dtype="bfloat16"),
    Case("long_alibi_paged", (3000,), num_heads_q=8, num_heads_kv=2, alibi=True, seqlens_q=4, page_size=16),
    Case("long_extreme_logits", (3000,), num_heads_q=8, num_heads_kv=2, logit_scale=60.0, dtype="float16", seqlens_q=2),
    Case("equal_lengths_in_one_piece", (900,) * 2, seqlens_q=4, num_heads_q=8, num_heads_kv=8, dtype="bfloat16", capacity=1000),
    Case("equal_lengths_packed_rows", (900,) * 2, seqlens_q=4, num_heads_q=8, num_heads_kv=2, window=(300, 0), layout="HND"),
    Case("more_queries_than_keys", (3,) * 2, seqlens_q=5, num_heads_q=2, num_heads_kv=2),
    Case("long_tail_of_float32", (5000,), num_heads_q=4, num_heads_kv=4, dtype="float32", seqlens_q=3, layout="HND"),
]


@pytest.mark.parametrize("case", LONG, ids=lambda c: c.name)
def test_problems_of_many_blocks(case: Case) -> None:
    check(case)


def test_equal_lengths_with_other_queries_are_no_run() -> None:
    check(Case("equal_keys", (40, 40, 40, 40), seqlens_q=(1, 1, 3, 0), ragged_q=True))


def test_a_row_that_sees_no_key_in_any_part_is_empty() -> None:
    case = Case("all_pages_missing", (100,), page_size=16, missing_pages=7)
    check(case, keys_per_split=16)
    out, lse = run_engine(make_inputs(case), keys_per_split=16)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()


def test_more_threads_than_key_heads_part_the_keys() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        check(Case("mqa_five_threads", (4099,), num_heads_q=8, num_heads_kv=1, dtype="bfloat16", capacity=5000))
        check(Case("mqa_five_threads_fp32_hnd", (4099,), num_heads_q=4, num_heads_kv=1, dtype="float32", layout="HND"))
    finally:
        torch.set_num_threads(threads)


def test_a_window_never_reads_what_lies_left_of_it() -> None:
    case = Case("window", (400,), window=(63, 0), page_size=16)
    inputs = make_inputs(case)
    expected = reference.decode(**inputs.args)
    hidden = inputs.args["page_table"][0, : (400 - 64) // 16].long()
    for cache in ("k_cache", "v_cache"):
        inputs.args[cache][hidden] = float("nan")
    assert_close(*run_engine(inputs), *expected)


def test_a_minus_infinite_sink_is_no_sink() -> None:
    inputs = make_inputs(Case("sink", (9, 0), sinks=True))
    inputs.args["sinks"][:] = float("-inf")
    assert_close(*run_engine(inputs), *reference.decode(**inputs.args))
    out, lse = run_engine(inputs)
    assert (out[1] == 0).all()
    assert (lse[1] == float("-inf")).all()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch = draw(st.integers(1, 3))
    ragged = draw(st.booleans())
    heads_kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    lengths = st.integers(0, 150)
    return Case(
        "drawn",
        tuple(draw(lengths) for _ in range(batch)),
        seqlens_q=tuple(draw(st.integers(0, 9)) for _ in range(batch)) if ragged else draw(st.integers(0, 9)),
        ragged_q=ragged,
        num_heads_q=heads_kv * group,
        num_heads_kv=heads_kv,
        head_dim=draw(st.sampled_from([8, 24, 64])),
        head_dim_v=draw(st.sampled_from([0, 16])),
        dtype=draw(st.sampled_from(["float16", "bfloat16", "float32"])),
        page_size=draw(st.sampled_from([0, 1, 5, 16])),
        layout=draw(st.sampled_from(["NHD", "HND"])),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.tuples(st.none() | st.integers(0, 60), st.none() | st.integers(0, 20))),
        softcap=draw(st.sampled_from([0.0, 12.0])),
        alibi=draw(st.booleans()),
        sinks=draw(st.booleans()),
        missing_pages=draw(st.integers(0, 1)),
        logit_scale=draw(st.sampled_from([1.0, 10.0])),
    )


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(cases(), st.sampled_from([1, 16, 128]), st.sampled_from([0, 7, 64]))
def test_any_shape_in_any_parts(case: Case, block_m: int, keys_per_split: int) -> None:
    check(case, block_m=block_m, keys_per_split=keys_per_split)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_k", [6, 1100])
def test_a_query_of_nan_gives_nan(dtype: torch.dtype, causal: bool, seqlen_k: int) -> None:
    """Torch's kernel alone gives 0, which would hide it from whoever looks for NaN in a loss."""
    q, k = torch.randn(1, 3, 4, 64, dtype=dtype), torch.randn(1, seqlen_k, 2, 64, dtype=dtype)
    q[0, 1, 3, 5] = torch.nan
    wanted = torch.zeros(1, 4, 3, dtype=torch.bool)
    wanted[0, 3, 1] = True
    for out, lse in (
        flashtile.attention_with_lse(q, k, k, causal=causal),
        flashtile.decode_with_lse(q, k, k, torch.tensor([seqlen_k], dtype=torch.int32), causal=causal),
    ):
        assert torch.equal(lse.isnan(), wanted)
        assert torch.equal(out.isnan().all(dim=-1), wanted.transpose(1, 2)) and torch.equal(out.isnan().any(dim=-1), wanted.transpose(1, 2))


def test_a_query_of_nan_without_keys_gives_zero() -> None:
    q, k = torch.full((1, 3, 4, 64), torch.nan), torch.randn(1, 6, 2, 64)
    out, lse = flashtile.decode_with_lse(q, k, k, torch.tensor([0], dtype=torch.int32))
    assert not out.any()
    assert (lse == -torch.inf).all()
