"""The backward kernels by explicit plans: every case, tails of every length, repeats, streams at once, CUDA graphs, layouts.

The first test is the one to run alone on a kernel that has never run: it shows within seconds whether its warps wait for
each other in vain.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch

import flashtile
from flashtile.band import Band
from flashtile.kernels.call import BackwardCall, BackwardRunner
from flashtile.planner.backward_rules import backward_infeasible, choose_backward_plan
from flashtile.planner.catalog import GLUON_BACKWARD_SM90, TRITON_BACKWARD, kernel_named, module_of
from flashtile.planner.choose import plan_backward
from flashtile.planner.device import Device
from flashtile.planner.plans import BackwardPlan
from flashtile.problem import Problem
from flashtile.testing import poison
from flashtile.testing.backward_inputs import BACKWARD_CASES, Gradients, assert_gradients, backward_call, backward_problem, gradients_of
from flashtile.testing.forward_cases import ForwardCase
from flashtile.testing.forward_inputs import ForwardInputs, make_forward_inputs
from flashtile.testing.head_gradients import GRADIENT_LIMITS, head_gradients
from flashtile.testing.tolerance import relative_l2

NAN = float("nan")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
USUAL = BackwardPlan(GLUON_BACKWARD_SM90, 64, 128, 8, 3, 128, 64, 8, 4, num_programs=132)
SHORT = BackwardPlan(GLUON_BACKWARD_SM90, 128, 128, 8, 3, 128, 128, 8, 3, num_programs=132)
SHALLOW = USUAL.with_(num_stages=2, dq_num_stages=2)
# in one pass: a head of 128 dims; one of 64 where both warpgroups compute dQ; one of 64 where a third one does
WHOLE = BackwardPlan(GLUON_BACKWARD_SM90, 64, 128, 8, 2, one_pass=True)
WHOLE_SHORT = WHOLE.with_(block_m=128)
WHOLE_ADDERS = WHOLE.with_(num_stages=3)
# heads of more than 128 dims; where there is room, a ring of queries or of keys has one stage more
WIDE = BackwardPlan(GLUON_BACKWARD_SM90, 64, 64, 8, 2, 128, 64, 8, 2, num_programs=132)
PLAIN = ForwardCase("plain", 300, 417, batch=2, num_heads_q=8, num_heads_kv=2, head_dim=128, dtype="bfloat16", causal=True)
PACKED = replace(PLAIN, name="packed", seqlens_q=(200, 1, 0, 77, 129), seqlens_k=(300, 64, 5, 77, 129), spare_rows=5, spare_keys=3)
WIDE_DIMS = [(136, 136), (160, 160), (192, 128), (192, 192), (200, 248), (256, 64), (256, 96), (256, 192), (64, 256), (256, 256)]
EDGES = [1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257]

hopper_only = pytest.mark.skipif(not HOPPER, reason="needs a GPU of sm_90")


def hopper_plans(case: ForwardCase) -> tuple[BackwardPlan, ...]:
    """Tiles of Hopper's kernel for a case's head dims, and programs for each tile, for all of them, and few."""
    if max(case.head_dim, case.head_dim_v) > 128:
        return WIDE, WIDE.with_(num_programs=0), WIDE.with_(num_programs=3), WIDE.with_(num_stages=3), WIDE.with_(dq_num_stages=3)
    short = max(case.head_dim, case.head_dim_v) <= 64
    tiles = (SHORT, USUAL) if short else (USUAL, SHALLOW)
    whole = (WHOLE_SHORT, WHOLE_ADDERS) if short else (WHOLE, WHOLE.with_(num_stages=3))
    few = tuple(plan.with_(num_programs=3) for plan in (whole if short else whole[:1]))
    return (*tiles, tiles[0].with_(num_programs=0), tiles[0].with_(num_programs=3), *whole, *few)


def portable_plans(inputs: ForwardInputs, device: Device) -> tuple[BackwardPlan, ...]:
    """The rule's plan, and smaller tiles that fit."""
    problem = backward_problem(inputs)
    small = [BackwardPlan(TRITON_BACKWARD, m, n, 4, 2, n, m, 4, 2) for m, n in ((32, 64), (32, 32), (16, 32))]
    usual = BackwardPlan(TRITON_BACKWARD, 64, 128, 8, 2, 128, 64, 8, 2)
    fit = tuple(plan for plan in (usual, *small) if not backward_infeasible(problem, plan, device))
    by_rule = choose_backward_plan(problem, device, TRITON_BACKWARD)
    return (*fit, by_rule) if isinstance(by_rule, BackwardPlan) else fit


def bound(inputs: ForwardInputs, plan: BackwardPlan) -> BackwardRunner:
    problem, device = backward_problem(inputs), inputs.args["q"].device
    run: BackwardRunner = importlib.import_module(module_of(plan.kernel)).bind(problem, plan, device)
    return run


def again(call: BackwardCall) -> BackwardCall:
    """The same call with gradients of its own, NaN so far."""
    wanted: dict[str, Any] = {
        name: poison.nan_like(gradient) for name, gradient in gradients_of(call)._asdict().items() if gradient is not None
    }
    return call._replace(**wanted)


def check_case(case: ForwardCase, device: torch.device, plans: tuple[BackwardPlan, ...], seed: int = 0) -> None:
    inputs = make_forward_inputs(case, device, seed)
    call = backward_call(inputs)
    for plan in plans:
        done = again(call)
        with poison.allocations():
            bound(inputs, plan)(done)
        assert_gradients(inputs, done, what=f"{case.name}, {plan.to_json()}")


def same(some: Gradients, others: Gradients) -> bool:
    return all(torch.equal(*pair) for pair in zip(some, others) if pair[0] is not None)


@hopper_only
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("plan", "head_dim"),
    [(USUAL, 128), (SHORT, 64), (WIDE, 256), (WIDE, 192), (WHOLE, 128), (WHOLE_SHORT, 64), (WHOLE_ADDERS, 64)],
    ids=["128", "64", "wide 256", "wide 192", "whole", "whole 64", "adders"],
)
def test_it_runs_at_all(plan: BackwardPlan, head_dim: int, causal: bool, device: torch.device) -> None:
    case = replace(PLAIN, name="plain", seqlens_q=512, seqlens_k=512, head_dim=head_dim, head_dim_v=0, causal=causal)
    for num_programs in (0, 132, 7):
        check_case(case, device, (plan.with_(num_programs=num_programs),))
        torch.cuda.synchronize()


@hopper_only
@pytest.mark.parametrize("case", [case for case in BACKWARD_CASES if case.dtype != "float32"], ids=lambda case: case.name)
def test_every_case_on_hoppers_kernel(case: ForwardCase, device: torch.device) -> None:
    problem = backward_problem(make_forward_inputs(case, device))
    if reasons := kernel_named(GLUON_BACKWARD_SM90).reasons_against(problem, Device.of(device)):
        pytest.skip("; ".join(reasons))
    plans = tuple(plan for plan in hopper_plans(case) if not backward_infeasible(problem, plan, Device.of(device)))
    assert plans
    check_case(case, device, plans)


@pytest.mark.parametrize("case", BACKWARD_CASES, ids=lambda case: case.name)
def test_every_case_on_the_portable_kernel(case: ForwardCase, device: torch.device) -> None:
    plans = portable_plans(make_forward_inputs(case, device), Device.of(device))
    assert plans
    check_case(case, device, plans)


@pytest.mark.parametrize("case", BACKWARD_CASES, ids=lambda case: case.name)
def test_every_case_by_the_rule(case: ForwardCase, device: torch.device) -> None:
    problem = backward_problem(make_forward_inputs(case, device))
    check_case(case, device, (plan_backward(problem, Device.of(device)),))


@hopper_only
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_tails_of_every_length(head_dim: int, causal: bool, device: torch.device) -> None:
    """Queries and keys a few more and fewer than tiles of 64 and 128."""
    case = replace(PLAIN, batch=1, num_heads_q=2, num_heads_kv=1, head_dim=head_dim, head_dim_v=head_dim, causal=causal)
    few = {"num_programs": 3}
    plans = {64: (SHORT, WHOLE_SHORT, WHOLE_ADDERS.with_(**few)), 128: (USUAL, WHOLE, WHOLE.with_(**few))}.get(head_dim, (WIDE,))
    for i, seqlen_q in enumerate(EDGES):
        for seqlen_k in (EDGES[-1 - i], EDGES[i], EDGES[(3 * i + 1) % len(EDGES)]):
            check_case(replace(case, name=f"{seqlen_q}, {seqlen_k}", seqlens_q=seqlen_q, seqlens_k=seqlen_k), device, plans)


@hopper_only
@pytest.mark.parametrize("window", [(0, 0), (5, 0), (64, 0), (100, 30), (0, 70), (None, 3), (200, None)], ids=str)
def test_windows(window: tuple[int | None, int | None], device: torch.device) -> None:
    """Keys that nobody sees are NaN, and their gradients 0."""
    for lengths in ((300, 417), (417, 300), (129, 127)):
        case = replace(PLAIN, name=str(window), seqlens_q=lengths[0], seqlens_k=lengths[1], causal=False, window=window)
        check_case(case, device, (USUAL, SHALLOW, WHOLE))
        check_case(replace(PACKED, name=f"packed {window}", causal=False, window=window), device, (USUAL, WHOLE))
        short = replace(case, head_dim=64, head_dim_v=64)
        check_case(short, device, (WHOLE_SHORT, WHOLE_ADDERS))
        for wide in (case, replace(PACKED, name=f"packed {window}", causal=False, window=window)):
            check_case(replace(wide, name=f"wide {wide.name}", head_dim=256, head_dim_v=256), device, (WIDE,))


@hopper_only
@pytest.mark.parametrize("dims", [(8, 8), (40, 40), (72, 72), (80, 96), (96, 96), (64, 128), (128, 64), *WIDE_DIMS], ids=str)
def test_head_dims(dims: tuple[int, int], device: torch.device) -> None:
    for case in (PLAIN, PACKED):
        case = replace(case, name=f"{case.name} {dims}", head_dim=dims[0], head_dim_v=dims[1], sinks=True)
        problem = backward_problem(make_forward_inputs(case, device))
        plans = (hopper_plans(case)[0], *(plan for plan in hopper_plans(case) if plan.one_pass))
        check_case(case, device, tuple(plan for plan in plans if not backward_infeasible(problem, plan, Device.of(device))))


@hopper_only
@pytest.mark.parametrize("dims", [(192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("case", [PLAIN, PACKED], ids=lambda case: case.name)
def test_wide_heads_in_all_their_plans(case: ForwardCase, dims: tuple[int, int], device: torch.device) -> None:
    """Every depth of the rings that fits, many times over, and few programs: the same bits each time."""
    inputs = make_forward_inputs(replace(case, head_dim=dims[0], head_dim_v=dims[1], dtype="float16"), device)
    problem, first = backward_problem(inputs), None
    for plan in hopper_plans(inputs.case):
        if not backward_infeasible(problem, plan, Device.of(device)):
            run = bound(inputs, plan)
            for _ in range(30):
                done = backward_call(inputs) if first is None else again(first)
                run(done)
                first = done if first is None else first
                assert same(gradients_of(done), gradients_of(first))
    assert first is not None
    assert_gradients(inputs, first)


@hopper_only
@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_extreme_scales(scale: float, device: torch.device) -> None:
    check_case(replace(PLAIN, name="extreme", scale=scale, logit_scale=10.0), device, (USUAL, WHOLE))
    check_case(replace(PLAIN, name="wide", scale=scale, logit_scale=10.0, head_dim=256, head_dim_v=256), device, (WIDE,))


@hopper_only
@pytest.mark.parametrize("case", [PLAIN, PACKED], ids=lambda case: case.name)
def test_a_hundred_repeats_are_bit_identical(case: ForwardCase, device: torch.device) -> None:
    inputs = make_forward_inputs(case, device)
    for plan in (USUAL, USUAL.with_(num_programs=5), SHALLOW):
        run, first = bound(inputs, plan), backward_call(inputs)
        run(first)
        assert_gradients(inputs, first)
        for _ in range(100):
            repeated = again(first)
            run(repeated)
            assert same(gradients_of(repeated), gradients_of(first))


@hopper_only
@pytest.mark.parametrize("case", [PLAIN, PACKED], ids=lambda case: case.name)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_in_one_pass_only_dq_varies(case: ForwardCase, head_dim: int, causal: bool, device: torch.device) -> None:
    """Whoever owns keys sums them in one order; to dQ they add as they come."""
    inputs = make_forward_inputs(replace(case, head_dim=head_dim, head_dim_v=head_dim, causal=causal), device)
    for plan in (
        (WHOLE, WHOLE.with_(num_programs=5)) if head_dim == 128 else (WHOLE_SHORT, WHOLE_ADDERS, WHOLE_ADDERS.with_(num_programs=5))
    ):
        run, first = bound(inputs, plan), backward_call(inputs)
        run(first)
        assert_gradients(inputs, first)
        for i in range(50):
            repeated = again(first)
            run(repeated)
            assert torch.equal(repeated.dk, first.dk) and torch.equal(repeated.dv, first.dv)
            if i % 10 == 0:
                assert_gradients(inputs, repeated)


@hopper_only
@pytest.mark.parametrize("case", [PLAIN, PACKED], ids=lambda case: case.name)
def test_sums_of_several_streams_are_apart(case: ForwardCase, device: torch.device) -> None:
    many = [make_forward_inputs(case, device, seed=seed) for seed in range(4)]
    run = bound(many[0], WHOLE)
    streams, calls = [torch.cuda.Stream(device) for _ in many], [backward_call(inputs) for inputs in many]
    for _ in range(10):
        calls = [again(call) for call in calls]
        torch.cuda.synchronize()
        for stream, call in zip(streams, calls):
            with torch.cuda.stream(stream):
                run(call)
        torch.cuda.synchronize()
        for inputs, call in zip(many, calls):
            assert_gradients(inputs, call)


@hopper_only
def test_a_graph_in_one_pass_clears_its_sums_each_time(device: torch.device) -> None:
    inputs = make_forward_inputs(PACKED, device)
    run, call = bound(inputs, WHOLE), backward_call(inputs)
    run(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(call)
    for _ in range(3):
        for gradient in gradients_of(call)[:3]:
            gradient.fill_(NAN)
        graph.replay()
        torch.cuda.synchronize()
        assert_gradients(inputs, call)


@hopper_only
@pytest.mark.parametrize("case", [PLAIN, PACKED], ids=lambda case: case.name)
def test_streams_at_once_take_their_own_tiles(case: ForwardCase, device: torch.device) -> None:
    """Programs count tiles in memory that launches of one stream share, and those of several must not."""
    many = [make_forward_inputs(case, device, seed=seed) for seed in range(4)]
    run = bound(many[0], USUAL.with_(num_programs=20))
    alone = [backward_call(inputs) for inputs in many]
    for call in alone:
        run(call)
    streams = [torch.cuda.Stream(device) for _ in many]
    for _ in range(10):
        calls = [[again(call) for _ in range(5)] for call in alone]
        torch.cuda.synchronize()
        for stream, own in zip(streams, calls):
            with torch.cuda.stream(stream):
                for call in own:
                    run(call)
        torch.cuda.synchronize()
        assert all(same(gradients_of(call), gradients_of(alone[i])) for i, own in enumerate(calls) for call in own)


@hopper_only
def test_graphs_replay_beside_each_other_and_eager_calls(device: torch.device) -> None:
    inputs = make_forward_inputs(PACKED, device)
    run, expected = bound(inputs, USUAL.with_(num_programs=20)), backward_call(inputs)
    run(expected)
    calls = [again(expected) for _ in range(4)]
    graphs = []
    for pair in (calls[:2], calls[2:]):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in pair:
                run(call)
        graphs.append(graph)
    streams = [torch.cuda.Stream(device) for _ in graphs]
    for _ in range(5):
        eager = again(expected)
        for call in calls:
            for gradient in gradients_of(call)[:3]:
                gradient.fill_(NAN)
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams):
            with torch.cuda.stream(stream):
                graph.replay()
        run(eager)
        torch.cuda.synchronize()
        assert all(same(gradients_of(call), gradients_of(expected)) for call in (eager, *calls))


@hopper_only
@pytest.mark.parametrize("case", [PLAIN, PACKED], ids=lambda case: case.name)
def test_layouts(case: ForwardCase, device: torch.device) -> None:
    check_case(replace(case, name="HND", layout="HND"), device, (USUAL, WHOLE))


@hopper_only
def test_gradients_in_slices_of_one_tensor(device: torch.device) -> None:
    """dq, dk and dv are strided views, and nothing beside them is written."""
    inputs = make_forward_inputs(replace(PLAIN, seqlens_q=333, seqlens_k=333, num_heads_q=4, num_heads_kv=4), device)
    call = backward_call(inputs)
    whole = torch.full((2, 333, 4, 4, 128), NAN, dtype=torch.bfloat16, device=device)
    dq, dk, dv, beside = whole.unbind(2)
    call = call._replace(dq=dq, dk=dk, dv=dv)
    for plan in (USUAL, WHOLE):
        whole.fill_(NAN)
        bound(inputs, plan)(call)
        assert_gradients(inputs, call)
        assert beside.isnan().all()


@hopper_only
@pytest.mark.parametrize("dims", [(256, 256), (192, 128)], ids=str)
def test_wide_gradients_in_slices(dims: tuple[int, int], device: torch.device) -> None:
    """dk and dv are strided views, and nothing beside them is written."""
    case = replace(PLAIN, seqlens_q=333, seqlens_k=333, num_heads_q=4, num_heads_kv=4, head_dim=dims[0], head_dim_v=dims[1], layout="HND")
    inputs = make_forward_inputs(case, device)
    call = backward_call(inputs)
    whole = torch.full((2, 333, 4, sum(dims) + 8), NAN, dtype=torch.bfloat16, device=device)
    dk, dv, beside = whole[..., : dims[0]], whole[..., dims[0] : sum(dims)], whole[..., sum(dims) :]
    bound(inputs, WIDE)(call._replace(dk=dk, dv=dv))
    assert_gradients(inputs, call._replace(dk=dk, dv=dv))
    assert beside.isnan().all()


@hopper_only
def test_many_short_sequences(device: torch.device) -> None:
    lengths = tuple((7 * i) % 90 for i in range(300))
    case = replace(PACKED, name="many", seqlens_q=lengths, seqlens_k=tuple(n + i % 3 for i, n in enumerate(lengths)))
    check_case(case, device, (USUAL, USUAL.with_(num_programs=0), USUAL.with_(num_programs=9), WHOLE, WHOLE.with_(num_programs=9)))
    check_case(replace(case, name="many wide", head_dim=256, head_dim_v=256), device, (WIDE, WIDE.with_(num_programs=9)))


@hopper_only
@pytest.mark.parametrize("dims", [(64, 64), (96, 64), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_of_one_block_between_long_ones(causal: bool, dims: tuple[int, int], device: torch.device) -> None:
    """Without groups of heads a tile may have one block alone, so that its loop has no step; what lies behind the loop is right too."""
    lengths = (140, 629, 12, 300, 64, 65, 1, 520, 140)
    case = replace(PACKED, name="one block", num_heads_q=3, num_heads_kv=3, head_dim=dims[0], head_dim_v=dims[1], causal=causal)
    case = replace(case, seqlens_q=lengths, seqlens_k=lengths)
    problem = backward_problem(make_forward_inputs(case, device))
    plans = tuple(plan for plan in hopper_plans(case) if not backward_infeasible(problem, plan, Device.of(device)))
    check_case(case, device, (*plans, plans[0].with_(num_programs=1), plans[0].with_(num_programs=2)))


@hopper_only
@pytest.mark.parametrize("plan", [USUAL, USUAL.with_(num_programs=0), WHOLE], ids=["stay", "a tile each", "one pass"])
def test_many_sequences_of_unlike_lengths(plan: BackwardPlan, device: torch.device) -> None:
    """Every sequence and head of a batch that keeps all SMs busy for long: each program takes a hundred tiles and more."""
    heads, rng = 16, torch.Generator(device=device).manual_seed(0)
    lengths = [int(128 * 60 ** (i * 37 % 64 / 63)) + i % 5 for i in range(63)] + [140]
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    q, k, v, dout = (torch.randn(sum(lengths), heads, 128, device=device, dtype=torch.bfloat16, generator=rng) for _ in range(4))
    longest = max(lengths)
    out, lse = flashtile.attention_varlen_with_lse(q, k, v, starts, starts, max_seqlen_q=longest, max_seqlen_k=longest, causal=True)
    problem = Problem.forward(q, k, v, starts, starts, longest, longest, causal=True, lse=True).with_(operation="backward")
    run = importlib.import_module(module_of(plan.kernel)).bind(problem, plan, device)
    sequences = [slice(*pair) for pair in pairwise(starts.tolist())]
    for attempt in range(3):
        dq, dk, dv = (poison.nan_like(tensor) for tensor in (q, k, v))
        run(
            BackwardCall(
                q, k, v, out, lse, dout, None, dq, dk, dv, None, starts, starts, None, longest, longest, None, None, 128**-0.5, 0.0
            )
        )
        wrong: list[str] = []
        for rows in sequences:
            for head in range(heads):
                right = head_gradients(q[rows, head, None], k[rows, head], v[rows, head], dout[rows, head, None], Band(None, 0))
                for name, grad, expected in (("dq", dq, right.dq[:, 0]), ("dk", dk, right.dk), ("dv", dv, right.dv)):
                    error = relative_l2(grad[rows, head], expected)
                    if not error <= GRADIENT_LIMITS[torch.bfloat16]:
                        off = (grad[rows, head].double() - expected).norm(dim=1) > 0.1 * expected.norm(dim=1)
                        wrong.append(f"{name} of rows {rows}, head {head}, by {error:.3g}, in {off.nonzero().flatten().tolist()[:20]}")
        assert not wrong, f"attempt {attempt}: {len(wrong)} are wrong: {wrong[:6]}"


@hopper_only
def test_long_sequences_of_wide_heads(device: torch.device) -> None:
    case = replace(PLAIN, name="long", seqlens_q=3000, seqlens_k=4100, batch=1, num_heads_q=2, num_heads_kv=1, head_dim=256, head_dim_v=256)
    check_case(case, device, (WIDE, WIDE.with_(num_programs=0)))


def test_long_sequences_of_few_heads(device: torch.device) -> None:
    """Blocks of both passes come round their rings many times."""
    case = replace(PLAIN, name="long", seqlens_q=3000, seqlens_k=4100, batch=1, num_heads_q=2, num_heads_kv=1)
    inputs = make_forward_inputs(case, device)
    check_case(case, device, (plan_backward(backward_problem(inputs), Device.of(device)),))
