"""What never changes a result, over drawn problems: where keys are cut, where pages lie, what was planned for, who shares a call."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flashtile import reference
from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem
from flashtile.testing.bound import run_plan
from flashtile.testing.cases import Case
from flashtile.testing.inputs import make_inputs
from flashtile.testing.tolerance import assert_close

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton 3.6 with NumPy 2
]

TILES = ((1, False), (8, True), (16, False), (16, True), (32, False))
WINDOWS = st.none() | st.tuples(st.none() | st.integers(0, 50), st.none() | st.integers(0, 9))


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> Case:
    batch = draw(st.integers(1, 2))
    heads_kv, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (1, 5)]))
    ragged = fixed.pop("ragged_q", None)
    ragged = draw(st.booleans()) if ragged is None else ragged
    page_sizes = fixed.pop("page_sizes", [0, 1, 5, 16, 32])
    lengths = st.integers(0, 80)
    return Case(
        "drawn",
        tuple(draw(lengths) for _ in range(batch)),
        seqlens_q=tuple(draw(st.integers(0, 6)) for _ in range(batch)) if ragged else draw(st.integers(1, 4)),
        ragged_q=ragged,
        num_heads_q=heads_kv * group,
        num_heads_kv=heads_kv,
        head_dim=draw(st.sampled_from([8, 24])),
        head_dim_v=draw(st.sampled_from([0, 40])),
        dtype=draw(st.sampled_from(["float16", "float32"])),
        page_size=draw(st.sampled_from(page_sizes)),
        layout=draw(st.sampled_from(["NHD", "HND"])),
        causal=draw(st.booleans()),
        window=draw(WINDOWS),
        softcap=draw(st.sampled_from([0.0, 12.0])),
        alibi=draw(st.booleans()),
        sinks=draw(st.booleans()),
        missing_pages=draw(st.integers(0, 1)),
        spare_rows=draw(st.integers(0, 2)) if ragged else 0,
        logit_scale=draw(st.sampled_from([1.0, 10.0])),
        scale=draw(st.sampled_from([None, -0.3])),
    )


@st.composite
def plans(draw: st.DrawFn) -> DecodePlan:
    block_m, swapped = draw(st.sampled_from(TILES))
    block_n = draw(st.sampled_from([16, 32, 64]))
    least = draw(st.sampled_from([0, 20, 64]))
    num_splits = draw(st.sampled_from([1, 2, 5]))
    return DecodePlan("triton.decode", block_m, block_n, swapped, keys_per_split=2 * least, min_keys_per_split=least, num_splits=num_splits)


@settings(max_examples=12)
@given(cases(), plans(), st.integers(2, 9))
def test_cutting_the_keys_anywhere_changes_nothing(case: Case, plan: DecodePlan, num_splits: int) -> None:
    inputs = make_inputs(case)
    expected = reference.decode(**inputs.args)
    for splits in (1, num_splits):
        out, lse = run_plan(inputs.args, plan.with_(num_splits=splits))
        assert_close(out, lse, *expected, dtype=inputs.dtype, what=f"{splits} splits")


@settings(max_examples=8)
@given(cases(page_sizes=[1, 5, 16, 32]), plans(), st.randoms(use_true_random=False))
def test_where_pages_lie_changes_no_bit(case: Case, plan: DecodePlan, random: Any) -> None:
    inputs = make_inputs(case)
    out, lse = run_plan(inputs.args, plan)
    table = inputs.args["page_table"]
    num_pages = len(inputs.args["k_cache"])
    order = torch.tensor(random.sample(range(num_pages), num_pages))
    exists = (table >= 0) & (table < num_pages)
    moved = {name: torch.empty_like(inputs.args[name]) for name in ("k_cache", "v_cache")}
    for name, cache in moved.items():
        cache[order] = inputs.args[name]
    moved["page_table"] = torch.where(exists, order[table.clamp(0, num_pages - 1).long()].int(), table)
    again, lse_again = run_plan(inputs.args | moved, plan)
    assert torch.equal(again, out)
    assert torch.equal(lse_again, lse)


@settings(max_examples=8)
@given(cases(page_sizes=[5, 16]), plans())
def test_a_paged_cache_is_the_contiguous_one_bit_for_bit(case: Case, plan: DecodePlan) -> None:
    case = replace(case, missing_pages=0)
    inputs = make_inputs(case)
    out, lse = run_plan(inputs.args, plan)
    table = inputs.args["page_table"].clamp(0, len(inputs.args["k_cache"]) - 1).long()
    flat = {name: inputs.args[name][table].flatten(1, 2) for name in ("k_cache", "v_cache")}
    again, lse_again = run_plan(inputs.args | flat | {"page_table": None}, plan)
    assert torch.equal(again, out)
    assert torch.equal(lse_again, lse)


@settings(max_examples=8)
@given(cases(), st.integers(0, 600), st.sampled_from(["b200", "a100"]))
def test_what_was_planned_for_changes_nothing(case: Case, hint: int, device: str) -> None:
    inputs = make_inputs(replace(case, capacity=600))
    assume(inputs.args["q"].numel() > 0)
    expected = reference.decode(**inputs.args)
    for max_seqlen_k in (None, hint):
        problem = Problem.decode(**inputs.args | {"max_seqlen_k": max_seqlen_k}, lse=True)
        plan = plan_decode(problem, Device.named(device)).with_(dependent_launch=False)
        out, lse = run_plan(inputs.args, plan)
        assert_close(out, lse, *expected, dtype=inputs.dtype, what=f"{plan}")


@settings(max_examples=8)
@given(cases(ragged_q=True), plans())
def test_packed_sequences_are_one_call_each_bit_for_bit(case: Case, plan: DecodePlan) -> None:
    inputs = make_inputs(case)
    args = inputs.args
    out, lse = run_plan(args, plan)
    starts = args["cu_seqlens_q"].tolist()
    for i, (start, end) in enumerate(pairwise(starts)):
        alone = args | {"q": args["q"][None, start:end], "cu_seqlens_q": None, "max_seqlen_q": None}
        for name in ("seqlens_k", "page_table") if case.page_size else ("seqlens_k", "k_cache", "v_cache"):
            alone[name] = args[name][i : i + 1]
        if start < end:
            out_alone, lse_alone = run_plan(alone, plan)
            assert torch.equal(out_alone[0], out[start:end])
            assert torch.equal(lse_alone[0], lse[:, start:end])
