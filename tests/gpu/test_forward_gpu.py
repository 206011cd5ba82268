"""The forward kernels by explicit plans: every case, tails of every length, repeats, streams at once, CUDA graphs, layouts.

The first test is the one to run alone on a kernel that has never run: it shows within seconds whether its warps wait for
each other in vain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import flashtile
from flashtile import Problem, UnsupportedError, reference
from flashtile.planner.catalog import GLUON_FORWARD_SM90, TRITON_FORWARD, kernel_named
from flashtile.planner.choose import forward_plan_for_tile
from flashtile.planner.device import Device
from flashtile.planner.forward_rules import forward_fits, forward_infeasible
from flashtile.planner.plans import ForwardPlan
from flashtile.testing import poison
from flashtile.testing.forward_cases import FORWARD_CASES, ForwardCase
from flashtile.testing.forward_inputs import ForwardInputs, make_forward_inputs
from flashtile.testing.tolerance import assert_close

NAN = float("nan")
DIMS = [(8, 8), (40, 40), (72, 72), (80, 96), (96, 96), (160, 160), (184, 136), (192, 192), (192, 128), (64, 256), (256, 64)]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
SHORT = ForwardPlan(GLUON_FORWARD_SM90, 192, 128, 12, 4, num_programs=132)
SHORT_BY_TWO = ForwardPlan(GLUON_FORWARD_SM90, 128, 128, 8, 4, num_programs=132, rescale_log2=8, q_in_registers=True)
USUAL = ForwardPlan(GLUON_FORWARD_SM90, 128, 128, 8, 2, num_programs=132, rescale_log2=8)
NARROW = ForwardPlan(GLUON_FORWARD_SM90, 128, 64, 8, 3, num_programs=132)
LONG = ForwardPlan(GLUON_FORWARD_SM90, 128, 64, 8, 2, num_programs=132, rescale_log2=8)
PLAIN = ForwardCase("plain", 300, 417, batch=2, num_heads_q=8, num_heads_kv=2, head_dim=128, dtype="bfloat16", causal=True)
PACKED = replace(PLAIN, name="packed", seqlens_q=(200, 1, 0, 77, 129), seqlens_k=(300, 64, 5, 77, 129), spare_rows=5)
PAGED = replace(PLAIN, name="paged", seqlens_q=(200, 1, 77), seqlens_k=(300, 64, 77), page_size=16)

hopper_only = pytest.mark.skipif(not HOPPER, reason="needs a GPU of sm_90")


def hopper_plans(case: ForwardCase) -> tuple[ForwardPlan, ...]:
    """Tiles of Hopper's kernel for a case's head dims, and programs for each tile, for all of them, and few."""
    dim = max(case.head_dim, case.head_dim_v)
    tiles = (SHORT, SHORT_BY_TWO) if dim <= 64 else (USUAL, NARROW) if dim <= 128 else (LONG,)
    return (*tiles, tiles[0].with_(num_programs=0), tiles[-1].with_(num_programs=3))


def portable_plans(problem: Problem, device: Device) -> tuple[ForwardPlan, ...]:
    return tuple(forward_plan_for_tile(problem, device, tile) for tile, _ in forward_fits(problem, device, TRITON_FORWARD).able)


def problem_of(inputs: ForwardInputs) -> Problem:
    return Problem.forward(**inputs.args, lse=True)


def attend(inputs: ForwardInputs, plan: ForwardPlan | None, **others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    function = flashtile.attention_varlen_with_lse if inputs.varlen else flashtile.attention_with_lse
    return function(**inputs.args, **others, plan=plan)


def check(
    inputs: ForwardInputs, plans: Iterator[ForwardPlan] | tuple[ForwardPlan, ...], expected: tuple[torch.Tensor, torch.Tensor]
) -> int:
    """Results of all plans against the reference, into memory that was NaN; how many plans were not refused."""
    ran = 0
    for plan in plans:
        out, _ = poison.outputs(inputs.args["q"], inputs.case.head_dim_v)
        try:
            with poison.allocations():
                got, lse = attend(inputs, plan, out=out)
        except UnsupportedError:
            continue
        assert got is out
        assert_close(out.cpu(), lse.cpu(), *expected, dtype=inputs.dtype, what=f"{inputs.case.name}, {plan.to_json()}")
        ran += 1
    return ran


def check_case(case: ForwardCase, device: torch.device, plans: tuple[ForwardPlan, ...], seed: int = 0) -> int:
    expected = reference.forward(**make_forward_inputs(case, "cpu", seed).args)
    return check(make_forward_inputs(case, device, seed), plans, expected)


@hopper_only
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("plan", [USUAL, SHORT, LONG], ids=["128", "64", "256"])
def test_it_runs_at_all(plan: ForwardPlan, causal: bool, device: torch.device) -> None:
    head_dim = {USUAL: 128, SHORT: 64, LONG: 256}[plan]
    q, k, v = (torch.randn(2, 1000, 4, head_dim, dtype=torch.bfloat16, device=device) for _ in range(3))
    for num_programs in (0, 132, 7):
        out, lse = flashtile.attention_with_lse(q, k, v, causal=causal, plan=plan.with_(num_programs=num_programs))
        torch.cuda.synchronize()
        assert_close(out, lse, *reference.forward(q, k, v, causal=causal, dtype=torch.float32), what=f"{num_programs} programs")


@hopper_only
@pytest.mark.parametrize("case", [case for case in FORWARD_CASES if case.dtype != "float32"], ids=lambda case: case.name)
def test_every_case_on_hoppers_kernel(case: ForwardCase, device: torch.device) -> None:
    problem = problem_of(make_forward_inputs(case, device))
    if reasons := kernel_named(GLUON_FORWARD_SM90).reasons_against(problem, Device.of(device)):
        pytest.skip("; ".join(reasons))
    plans = tuple(plan for plan in hopper_plans(case) if not forward_infeasible(problem, plan, Device.of(device)))
    if not plans:
        pytest.skip("no plan for these pages")
    assert check_case(case, device, plans) == len(plans)


@pytest.mark.parametrize("case", FORWARD_CASES, ids=lambda case: case.name)
def test_every_case_on_the_portable_kernel(case: ForwardCase, device: torch.device) -> None:
    problem = problem_of(make_forward_inputs(case, device))
    plans = portable_plans(problem, Device.of(device))
    assert plans
    assert check_case(case, device, plans) == len(plans)


@hopper_only
@pytest.mark.parametrize(
    "plan",
    [USUAL, NARROW, NARROW.with_(block_n=32), USUAL.with_(q_in_registers=True)],
    ids=["128 keys", "64 keys", "32 keys", "q in registers"],
)
@pytest.mark.parametrize("causal", [False, True])
def test_tails_of_every_length(plan: ForwardPlan, causal: bool, device: torch.device) -> None:
    """Queries and keys a few more and fewer than tiles of 64 and 128: each query length meets each key length."""
    edges = [1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257]
    q, k, v = (torch.randn(1, 257, 2, 128, dtype=torch.bfloat16, device=device) for _ in range(3))
    try:
        flashtile.attention(q, k, v, causal=causal, plan=plan)
    except UnsupportedError as error:
        pytest.skip(str(error))
    for m in edges:
        for n in edges:
            args: dict[str, Any] = {"q": q[:, :m], "k": k[:, :n], "v": v[:, :n], "causal": causal}
            out, lse = flashtile.attention_with_lse(**args, plan=plan)
            assert_close(out, lse, *reference.forward(**args, dtype=torch.float32), what=f"{m} queries, {n} keys")


@hopper_only
@pytest.mark.parametrize("window", [(0, 0), (1, 0), (63, 0), (64, 64), (127, 1), (128, 0), (300, None), (None, 5)], ids=str)
def test_windows_of_every_kind(window: tuple[int | None, int | None], device: torch.device) -> None:
    for lengths in ((300, 300), (65, 400), (400, 65), (129, 500)):
        case = replace(PLAIN, name=str(window), seqlens_q=lengths[0], seqlens_k=lengths[1], causal=False, window=window)
        assert check_case(case, device, (USUAL, NARROW)) == 2


@hopper_only
@pytest.mark.parametrize("logit_scale", [30.0, 300.0])
@pytest.mark.parametrize("rising", [False, True])
@pytest.mark.parametrize("scale", [None, -0.3, 0.0])
def test_extreme_logits(logit_scale: float, rising: bool, scale: float | None, device: torch.device) -> None:
    case = replace(PLAIN, name="extreme", seqlens_k=700, logit_scale=logit_scale, rising=rising, scale=scale)
    plans = (USUAL, USUAL.with_(rescale_log2=0), USUAL.with_(q_in_registers=True), NARROW)
    assert check_case(case, device, plans) == len(plans)


@hopper_only
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_head_dims(dims: tuple[int, int], device: torch.device) -> None:
    case = replace(PLAIN, name="dims", head_dim=dims[0], head_dim_v=dims[1], sinks=True)
    assert check_case(case, device, (*hopper_plans(case), USUAL, LONG))
    packed = replace(PACKED, name="packed dims", head_dim=dims[0], head_dim_v=dims[1])
    assert check_case(packed, device, (*hopper_plans(packed), USUAL, LONG))


@hopper_only
@pytest.mark.parametrize("case", [PLAIN, PACKED, PAGED], ids=lambda case: case.name)
def test_a_hundred_repeats_are_bit_identical(case: ForwardCase, device: torch.device) -> None:
    inputs = make_forward_inputs(case, device)
    for plan in (USUAL, USUAL.with_(num_programs=5), NARROW):
        first, first_lse = attend(inputs, plan)
        assert_close(first, first_lse, *reference.forward(**inputs.args, dtype=torch.float32))
        for _ in range(100):
            out, lse = attend(inputs, plan)
            assert torch.equal(out, first)
            assert torch.equal(lse, first_lse)


@hopper_only
@pytest.mark.parametrize("case", [PLAIN, PACKED], ids=lambda case: case.name)
def test_streams_at_once_take_their_own_tiles(case: ForwardCase, device: torch.device) -> None:
    """Programs count tiles in memory that launches of one stream share, and those of several must not."""
    many = [make_forward_inputs(case, device, seed=seed) for seed in range(4)]
    plan = USUAL.with_(num_programs=20)
    alone = [attend(inputs, plan) for inputs in many]
    streams = [torch.cuda.Stream(device) for _ in many]
    torch.cuda.synchronize()
    for _ in range(10):
        results = []
        for stream, inputs in zip(streams, many):
            with torch.cuda.stream(stream):
                results += [attend(inputs, plan) for _ in range(5)]
        torch.cuda.synchronize()
        for i, (out, lse) in enumerate(results):
            assert torch.equal(out, alone[i // 5][0])
            assert torch.equal(lse, alone[i // 5][1])


@hopper_only
def test_graphs_replay_beside_each_other_and_eager_calls(device: torch.device) -> None:
    inputs = make_forward_inputs(PACKED, device)
    plan = USUAL.with_(num_programs=20)
    expected, expected_lse = attend(inputs, plan)
    graphs, results = [], []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results += [attend(inputs, plan), attend(inputs, plan)]
        graphs.append(graph)
    streams = [torch.cuda.Stream(device) for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(5):
        for out, lse in results:
            out.fill_(NAN)
            lse.fill_(NAN)
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams):
            with torch.cuda.stream(stream):
                graph.replay()
        eager, _ = attend(inputs, plan)
        torch.cuda.synchronize()
        assert torch.equal(eager, expected)
        for out, lse in results:
            assert torch.equal(out, expected)
            assert torch.equal(lse, expected_lse)


@hopper_only
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("case", [PLAIN, PACKED, PAGED], ids=lambda case: case.name)
def test_layouts(case: ForwardCase, layout: str, device: torch.device) -> None:
    assert check_case(replace(case, layout=layout), device, (USUAL, NARROW)) == 2


@hopper_only
def test_slices_of_one_tensor_of_q_k_and_v(device: torch.device) -> None:
    qkv = torch.randn(2, 333, 3, 4, 128, dtype=torch.float16, device=device)
    q, k, v = qkv.unbind(2)
    out = torch.full((2, 333, 8, 128), NAN, dtype=torch.float16, device=device)[:, :, ::2]
    got, lse = flashtile.attention_with_lse(q, k, v, causal=True, out=out, plan=USUAL)
    assert_close(got, lse, *reference.forward(q, k, v, causal=True, dtype=torch.float32))
    assert out._base is not None and out._base[:, :, 1::2].isnan().all()


@hopper_only
@pytest.mark.parametrize("shape", [(1, 333, 2, 128), (2, 333, 1, 128), (1, 333, 1, 128)], ids=["batch", "heads", "both"])
def test_keys_that_sequences_or_heads_share(shape: tuple[int, ...], device: torch.device) -> None:
    """Expanded k and v have strides of 0."""
    q = torch.randn(2, 333, 4, 128, dtype=torch.bfloat16, device=device)
    k, v = (torch.randn(shape, dtype=torch.bfloat16, device=device).expand(2, 333, 2, 128) for _ in range(2))
    out, lse = flashtile.attention_with_lse(q, k, v, causal=True, plan=USUAL)
    assert_close(out, lse, *reference.forward(q, k, v, causal=True, dtype=torch.float32))


@hopper_only
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256, 1024])
def test_page_sizes(page_size: int, device: torch.device) -> None:
    for window in (None, (100, 0)):
        case = replace(PAGED, name="pages", page_size=page_size, window=window, missing_pages=1 if page_size <= 32 else 0, spare_rows=2)
        assert check_case(case, device, (USUAL, NARROW)) == 2


@hopper_only
def test_many_short_sequences(device: torch.device) -> None:
    lengths = tuple((7 * i) % 90 for i in range(300))
    case = replace(PACKED, name="many", seqlens_q=lengths, seqlens_k=tuple(n + i % 3 for i, n in enumerate(lengths)))
    assert check_case(case, device, (USUAL, USUAL.with_(num_programs=0), USUAL.with_(num_programs=9))) == 3
