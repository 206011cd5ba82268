"""Dropout on the GPU: the entries that the oracle says, by every tile of both passes, from a seed that graphs and checkpoints draw anew."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import flashtile
from flashtile.dropout import keep_mask
from flashtile.kernels.call import BackwardCall
from flashtile.planner.backward_rules import backward_infeasible
from flashtile.planner.catalog import TRITON_BACKWARD, TRITON_FORWARD, module_of
from flashtile.planner.choose import plan_backward, plan_forward
from flashtile.planner.device import Device
from flashtile.planner.forward_rules import forward_infeasible
from flashtile.planner.plans import BackwardPlan, ForwardPlan
from flashtile.problem import Problem
from flashtile.testing import poison
from flashtile.testing.backward_inputs import Gradients, assert_gradients, backward_call, backward_problem
from flashtile.testing.forward_cases import DROPOUT_CASES, ForwardCase
from flashtile.testing.forward_inputs import GENERATOR_SEED, ForwardInputs, expected_forward, forward_call, make_forward_inputs
from flashtile.testing.tolerance import assert_close

FORWARD_TILES = ((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 2, 2), (16, 16, 4, 1))
BACKWARD_TILES = ((64, 128, 8), (64, 64, 4), (32, 64, 4), (32, 32, 4), (16, 16, 8))
LONG = ForwardCase("long", 1100, 1300, batch=2, num_heads_q=4, num_heads_kv=2, head_dim=128, dtype="bfloat16", causal=True, dropout_p=0.1)


def run_forward(inputs: ForwardInputs, plan: ForwardPlan) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = poison.outputs(inputs.args["q"], inputs.case.head_dim_v)
    problem = Problem.forward(**inputs.args, out=out, lse=True)
    importlib.import_module(module_of(plan.kernel)).bind(problem, plan, out.device)(forward_call(inputs, out, lse))
    return out, lse


def run_backward(inputs: ForwardInputs, plan: BackwardPlan) -> BackwardCall:
    call = backward_call(inputs)
    with poison.allocations():
        importlib.import_module(module_of(plan.kernel)).bind(backward_problem(inputs), plan, call.q.device)(call)
    return call


def forward_plans(inputs: ForwardInputs, device: Device) -> list[ForwardPlan]:
    problem = Problem.forward(**inputs.args, lse=True)
    plans = [ForwardPlan(TRITON_FORWARD, *tile) for tile in FORWARD_TILES]
    return [plan_forward(problem, device), *(plan for plan in plans if not forward_infeasible(problem, plan, device))]


def backward_plans(inputs: ForwardInputs, device: Device) -> list[BackwardPlan]:
    problem = backward_problem(inputs)
    plans = [BackwardPlan(TRITON_BACKWARD, m, n, warps, 2, n, m, warps, 2) for m, n, warps in BACKWARD_TILES]
    return [plan_backward(problem, device), *(plan for plan in plans if not backward_infeasible(problem, plan, device))]


@pytest.mark.parametrize("case", [*DROPOUT_CASES, LONG], ids=lambda case: case.name)
def test_every_case_by_every_tile(case: ForwardCase, device: torch.device) -> None:
    inputs = make_forward_inputs(case, device)
    for plan in forward_plans(inputs, Device.of(device)):
        assert plan.kernel == TRITON_FORWARD
        out, lse = run_forward(inputs, plan)
        assert_close(out, lse, *expected_forward(inputs), dtype=inputs.dtype, what=f"{case.name}, {plan.to_json()}")
    for backward in backward_plans(inputs, Device.of(device)):
        assert_gradients(inputs, run_backward(inputs, backward), what=f"{case.name}, {backward.to_json()}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_values_show_which_entries_are_dropped(dtype: str, device: torch.device) -> None:
    """With keys that all score alike and values that are unit vectors, out is the mask."""
    case = ForwardCase("shown", 300, 128, batch=2, num_heads_q=4, num_heads_kv=2, head_dim=128, dropout_p=0.3, dtype=dtype)
    inputs = make_forward_inputs(case, device)
    inputs.args["q"].zero_()
    inputs.args["v"].copy_(torch.eye(128, device=device)[None, :, None, :].expand(inputs.args["v"].shape))
    streams = torch.arange(8, device=device).view(2, 4)
    expected = keep_mask(0.3, inputs.seed, streams, range(300), range(128))
    # as a CPU says it, too
    assert torch.equal(keep_mask(0.3, inputs.seed.cpu(), streams.cpu(), range(300), range(128)), expected.cpu())
    for plan in forward_plans(inputs, Device.of(device)):
        assert torch.equal((run_forward(inputs, plan)[0] != 0.0).transpose(1, 2), expected), plan.to_json()


def test_far_positions_are_the_oracles(device: torch.device) -> None:
    """The last rows of a long sequence, by the API."""
    case = ForwardCase("far", 40000, 40000, window=(60, 0), head_dim=64, dropout_p=0.5, dtype="bfloat16")
    inputs = make_forward_inputs(case, device)
    inputs.args["q"].zero_()
    inputs.args["v"].copy_(torch.eye(64, device=device).repeat(625, 1)[None, :, None, :])
    torch.manual_seed(GENERATOR_SEED)
    out = flashtile.attention(**inputs.args)
    kept = keep_mask(0.5, inputs.seed, torch.arange(2, device=device), range(39936, 40000), range(39936, 40000))
    shown = (out[0, 39936:] != 0.0).transpose(0, 1)
    triangle = torch.ones(64, 64, dtype=torch.bool, device=device).tril()
    seen = triangle & ~torch.ones_like(triangle).tril(-61)
    assert torch.equal(shown & seen, kept & seen)


def test_the_api_draws_its_seed_and_gradients_know_it(device: torch.device) -> None:
    inputs = make_forward_inputs(LONG, device)
    call = backward_call(inputs, through_lse=True)
    leaves = [inputs.args[name].detach().requires_grad_() for name in ("q", "k", "v")]
    args = inputs.args | dict(zip(("q", "k", "v"), leaves))
    torch.manual_seed(GENERATOR_SEED)
    dq, dk, dv = torch.autograd.grad(flashtile.attention_with_lse(**args), leaves, [call.dout, call.dlse])
    assert_gradients(inputs, call, Gradients(dq, dk, dv, None))


def test_each_replay_of_a_graph_draws_another_seed(device: torch.device) -> None:
    inputs = make_forward_inputs(LONG, device)
    leaves = [inputs.args[name].detach().requires_grad_() for name in ("q", "k", "v")]
    args: dict[str, Any] = inputs.args | dict(zip(("q", "k", "v"), leaves))
    dout = backward_call(inputs).dout

    def step() -> tuple[torch.Tensor, ...]:
        out = flashtile.attention(**args)
        return (out, *torch.autograd.grad(out, leaves, dout))

    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(4):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    def replayed() -> list[torch.Tensor]:
        graph.replay()
        return [tensor.clone() for tensor in captured]

    torch.manual_seed(3)
    first, second = replayed(), replayed()
    torch.manual_seed(3)
    again = replayed()
    assert not torch.equal(first[0], second[0])
    assert all(torch.equal(*pair) for pair in zip(first, again))
    # The graph draws what an eager call after the same seed draws.
    torch.manual_seed(3)
    assert all(torch.equal(*pair) for pair in zip(step(), first))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_steps_repeat_with_torchs_seed(backend: str, device: torch.device) -> None:
    inputs = make_forward_inputs(LONG, device)
    leaves = [inputs.args[name].detach().requires_grad_() for name in ("q", "k", "v")]
    torch._dynamo.reset()
    step = torch.compile(lambda q, k, v: flashtile.attention(q * 1.5, k, v, dropout_p=0.2).sin(), backend=backend, fullgraph=True)

    def run(seed: int) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(seed)
        out = step(*leaves)
        return (out, *torch.autograd.grad(out.float().sum(), leaves))

    first, other, again = run(1), run(2), run(1)
    assert all(torch.equal(*pair) for pair in zip(first, again))
    assert not torch.equal(first[0], other[0])
