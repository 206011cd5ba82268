"""``flashtile bench backward``: the gradients of attention timed on a grid of problems, with torch's own beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer

from flashtile.cli import contest
from flashtile.cli.bench_forward import Batch, Causal, Seqlen, Size, columns, sizes_of
from flashtile.cli.device import RunDevice, pick_device
from flashtile.cli.output import AsJson
from flashtile.cli.shape import Dtype, DtypeOption
from flashtile.ops.prepared import bound, kernel_module
from flashtile.planner.choose import plan_backward
from flashtile.planner.device import Device
from flashtile.planner.plans import BackwardPlan
from flashtile.problem import Problem
from flashtile.testing.backward_peers import PEERS, BackwardInputs, Grads
from flashtile.testing.forward_peers import ForwardInputs
from flashtile.testing.head_gradients import GRADIENT_LIMITS, HeadGradients, head_gradients
from flashtile.testing.tolerance import relative_l2


def backward(
    heads: contest.Heads = None,
    batch: Batch = None,
    seqlen: Seqlen = None,
    head_dim: contest.HeadDim = 128,
    causal: Causal = None,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Gradients the same to the last bit.")] = False,
    dtype: DtypeOption = Dtype.bfloat16,
    device: RunDevice = "auto",
    peers: contest.Peers = True,
    seed: contest.Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Time the gradients of attention (as many queries as keys) on a grid of problems, peers beside it; each result is checked first."""
    where = pick_device(device)
    sizes = sizes_of(where, heads, batch, seqlen, causal)
    bench_one = lambda size: _bench_one(size, head_dim, dtype.torch, where, deterministic, peers, seed)  # noqa: E731
    contest.run("backward", sizes, bench_one, where, dtype.value, head_dim, columns("tiles", _tiles), as_json)


def _bench_one(
    size: Size, head_dim: int, dtype: torch.dtype, device: torch.device, deterministic: bool, with_peers: bool, seed: int
) -> dict[str, Any]:
    heads = (size.num_heads_q, size.num_heads_kv)
    make = lambda number: BackwardInputs.of(  # noqa: E731
        ForwardInputs.random(size.batch, size.seqlen, heads, head_dim, size.causal, dtype, device, number), number + 1
    )
    sets = contest.input_sets(make, lambda x: x.num_bytes, device, seed)
    first = sets[0]
    plan, run = _ours(first, deterministic, device)
    expected = _expected(first)
    error = _error(run(first), expected)
    limit = GRADIENT_LIMITS[dtype]
    able, refused = contest.able_peers(PEERS if with_peers else (), first, device, dtype, lambda grads: _error(grads, expected))
    for peer in able.values():
        for x in sets:  # its own forward call, which is not to be timed
            peer(x)
    times = contest.timed({"flashtile": run, **able}, sets, device)
    return {
        **asdict(size),
        "deterministic": deterministic,
        "check": "passed" if error <= limit else f"a gradient differs by {error:.3g} (relative L2); the limit is {limit:.3g}",
        "error": error,
        "plan": _plan_facts(plan),
        "seconds": times,
        "tflops": first.flops / times["flashtile"] * 1e-12,
        "not_timed": refused,
    }


def _ours(x: BackwardInputs, deterministic: bool, device: torch.device) -> tuple[BackwardPlan, Callable[[BackwardInputs], Grads]]:
    """The planner's choice, and what computes gradients by it."""
    forward = x.forward
    problem = Problem.forward(forward.q, forward.k, forward.v, causal=forward.causal, lse=True)
    problem = problem.with_(operation="backward", deterministic=deterministic)
    plan = plan_backward(problem, Device.of(device))
    runner = bound(kernel_module(plan), problem, plan, forward.q.device)

    def run(x: BackwardInputs) -> Grads:
        grads = torch.empty_like(x.forward.q), torch.empty_like(x.forward.k), torch.empty_like(x.forward.v)
        runner(x.call(grads))
        return grads

    return plan, run


def _expected(x: BackwardInputs) -> HeadGradients:
    """Those of the last sequence's last key head."""
    q, k, v = x.forward.q, x.forward.k, x.forward.v
    group = q.shape[2] // k.shape[2]
    problem = Problem.forward(q, k, v, causal=x.forward.causal)
    return head_gradients(q[-1, :, -group:], k[-1, :, -1], v[-1, :, -1], x.dout[-1, :, -group:], problem.band)


def _error(grads: Grads, expected: HeadGradients) -> float:
    """The worst relative L2 error of a gradient; infinite where any element of any head is not finite."""
    if not all(bool(grad.isfinite().all()) for grad in grads):
        return float("inf")
    dq, dk, dv = grads
    got = (dq[-1, :, -expected.dq.shape[1] :], dk[-1, :, -1], dv[-1, :, -1])
    return max(relative_l2(*pair) for pair in zip(got, expected))


def _plan_facts(plan: BackwardPlan) -> dict[str, Any]:
    names = ("kernel", "block_m", "block_n", "dq_block_m", "dq_block_n", "one_pass")
    return {name: getattr(plan, name) for name in names}


def _tiles(row: Mapping[str, Any]) -> str:
    """Rows owned x rows a step, of the keys' pass and of the queries'."""
    plan = row["plan"]
    keys = f"{plan['block_n']} x {plan['block_m']}"
    return keys if plan["one_pass"] else f"{keys}, {plan['dq_block_m']} x {plan['dq_block_n']}"
