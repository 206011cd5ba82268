"""Gradients on the GPU: against autograd of the reference, on streams, in CUDA graphs with other lengths, cast, and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashtile
from flashtile.testing.backward_inputs import Gradients, assert_gradients, backward_call
from flashtile.testing.forward_cases import ForwardCase
from flashtile.testing.forward_inputs import ForwardInputs, make_forward_inputs

SHAPE: dict[str, Any] = {"num_heads_q": 8, "num_heads_kv": 2, "head_dim": 128, "dtype": "bfloat16", "causal": True}
PLAIN = ForwardCase("plain", 300, 417, batch=2, **SHAPE)
PACKED = ForwardCase("packed", (200, 1, 77), (300, 64, 77), sinks=True, **SHAPE)
LONG_SLEEP = 100_000_000  # clock cycles


def run(args: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return (flashtile.attention_varlen_with_lse if "cu_seqlens_q" in args else flashtile.attention_with_lse)(**args)


def leaves_of(inputs: ForwardInputs) -> tuple[dict[str, Any], list[torch.Tensor]]:
    names = [name for name in ("q", "k", "v", "sinks") if inputs.args[name] is not None]
    leaves = [inputs.args[name].detach().requires_grad_() for name in names]
    return inputs.args | dict(zip(names, leaves)), leaves


def as_gradients(found: Any) -> Gradients:
    return Gradients(*found[:3], found[3] if len(found) > 3 else None)


@pytest.mark.parametrize("case", [PLAIN, PACKED], ids=lambda case: case.name)
def test_agrees_with_autograd_of_the_reference(case: ForwardCase, device: torch.device) -> None:
    inputs = make_forward_inputs(case, device)
    call = backward_call(inputs, through_lse=True)
    args, leaves = leaves_of(inputs)
    found = torch.autograd.grad(run(args), leaves, [call.dout, call.dlse])
    assert_gradients(inputs, call, as_gradients(found))
    again = torch.autograd.grad(run(args), leaves, [call.dout, call.dlse])
    assert all(torch.equal(*pair) for pair in zip(found, again))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_deterministic_gradients_are_the_same_to_the_last_bit_however_long(head_dim: int, device: torch.device) -> None:
    """Queries see so many keys that one pass, which sums dQ in no fixed order, would be considered."""
    case = ForwardCase("long", 4224, 4224, **SHAPE | {"head_dim": head_dim, "causal": False})
    inputs = make_forward_inputs(case, device)
    call = backward_call(inputs)

    def found(deterministic: bool | None) -> tuple[torch.Tensor, ...]:
        args, leaves = leaves_of(inputs)
        return torch.autograd.grad(run(args | {"deterministic": deterministic})[0], leaves, call.dout)

    first = found(True)
    for _ in range(5):
        assert all(torch.equal(*pair) for pair in zip(found(True), first))
    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(*pair) for pair in zip(found(None), first))
    finally:
        torch.use_deterministic_algorithms(False)
    for grad, wanted in zip(found(False), first):
        assert (grad.float() - wanted.float()).norm() <= 5e-3 * wanted.float().norm()


@pytest.mark.parametrize("case", [PLAIN, PACKED], ids=lambda case: case.name)
def test_a_compiled_caller_has_the_same_gradients(case: ForwardCase, device: torch.device) -> None:
    inputs = make_forward_inputs(case, device)
    args, leaves = leaves_of(inputs)

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        q, *others = leaves
        out, lse = run(args | dict(zip(("k", "v", "sinks"), others)) | {"q": q * 0.5})
        return out.float().square().sum() + lse.clamp(min=-50.0).sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for grad, wanted in zip(found, expected):
        torch.testing.assert_close(grad, wanted, rtol=1e-2, atol=1e-2)


def test_work_goes_to_the_forward_calls_stream_and_waits_for_nothing(device: torch.device) -> None:
    inputs = make_forward_inputs(PLAIN, device)
    call = backward_call(inputs, through_lse=True)
    args, leaves = leaves_of(inputs)
    torch.autograd.grad(run(args), leaves, [call.dout, call.dlse])  # compiles, which waits
    late = call.dout.clone()
    call.dout.zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        results = run(args)
        torch.cuda._sleep(LONG_SLEEP)
        call.dout.copy_(late)
        found = torch.autograd.grad(results, leaves, [call.dout, call.dlse])
    assert not side.query(), "the call waited for the GPU"
    side.synchronize()
    assert_gradients(inputs, call, as_gradients(found))


def test_a_graph_replays_with_other_lengths(device: torch.device) -> None:
    inputs = make_forward_inputs(PACKED, device)
    call = backward_call(inputs, through_lse=True)
    args, leaves = leaves_of(inputs)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        torch.autograd.grad(run(args), leaves, [call.dout, call.dlse])
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(run(args), leaves, [call.dout, call.dlse])
    for starts in ([0, 200, 201, 278], [0, 0, 130, 140], [0, 5, 6, 7]):
        for name, values in {"cu_seqlens_q": starts, "cu_seqlens_k": [0, 9, 160, 441]}.items():
            args[name].copy_(torch.tensor(values, dtype=torch.int32))
        # What belonged to nobody before may belong to somebody now.
        for tensor in (*leaves, call.dout, call.dlse):
            tensor.detach().normal_()
        for grad in found:
            grad.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        changed = ForwardInputs(
            inputs.case, {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in args.items()}
        )
        assert_gradients(changed, call, as_gradients(found), what=f"starts {starts}")


def test_autocast(device: torch.device) -> None:
    q, k = (torch.randn(2, n, h, 64, device=device, requires_grad=True) for n, h in ((70, 4), (90, 2)))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = flashtile.attention(q, k, k, causal=True)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, flashtile.attention(q.detach().bfloat16(), *[k.detach().bfloat16()] * 2, causal=True))
    for grad, leaf in zip(torch.autograd.grad(out.float().square().sum(), (q, k)), (q, k)):
        assert grad.dtype == torch.float32
        assert grad.shape == leaf.shape
        assert grad.isfinite().all()
