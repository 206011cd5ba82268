"""Training on the GPU: captured steps, streams, checkpoints, autocast, saved tensors on the host, and memory linear in the lengths."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import flashtile
from flashtile.testing.memory import peak_bytes

HEADS, DIM = 4, 64
WIDTH = HEADS * DIM
LONG_SLEEP = 50_000_000  # clock cycles


class Layer(nn.Module):
    """(batch, seqlen, WIDTH) float32 to the same; attention in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).bfloat16().unflatten(-1, (3, HEADS, DIM)).unbind(2)
        attended = flashtile.attention(q, k, v, causal=True, deterministic=True)
        out: torch.Tensor = x + self.out(attended.flatten(2).float())
        return out


def make_layer(device: torch.device) -> Layer:
    torch.manual_seed(0)
    return Layer().to(device)


def train_step(layer: Layer, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """One step of gradient descent; the loss before it."""
    weights = list(layer.parameters())
    loss = (layer(x) - target).square().mean()
    with torch.no_grad():
        for weight, grad in zip(weights, torch.autograd.grad(loss, weights)):
            weight.sub_(grad, alpha=30.0)
    return loss.detach()


def restore(layer: Layer, weights: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for weight, first in zip(layer.parameters(), weights):
            weight.copy_(first)


def make_leaves(device: torch.device, seqlen: int = 300, seed: int = 0, heads: int = HEADS) -> list[torch.Tensor]:
    """q, k and v: views of one projection, and leaves all the same."""
    torch.manual_seed(seed)
    qkv = torch.randn(2, seqlen, 3, heads, DIM, dtype=torch.bfloat16, device=device)
    return [part.detach().requires_grad_() for part in qkv.unbind(2)]


def attend(*leaves: torch.Tensor, **features: Any) -> torch.Tensor:
    return flashtile.attention(*leaves, **{"causal": True, "deterministic": True} | features)


def equal(some: Any, others: Any) -> bool:
    return all(torch.equal(*pair) for pair in zip(some, others))


# CUDA graphs


def test_a_captured_step_trains_like_an_eager_one(device: torch.device) -> None:
    """Forward, backward and update in one graph, replayed with one batch after the other."""
    torch.manual_seed(1)
    batches = torch.randn(6, 2, 2, 200, WIDTH, device=device)
    layer = make_layer(device)
    first = [weight.detach().clone() for weight in layer.parameters()]
    expected_losses = [train_step(layer, *batch).item() for batch in batches]
    expected = [weight.detach().clone() for weight in layer.parameters()]
    assert all((weight - start).abs().max() > 0.01 for weight, start in zip(expected, first))

    x, target = batches[0].clone().unbind(0)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            train_step(layer, x, target)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = train_step(layer, x, target)
    restore(layer, first)
    losses = []
    for batch in batches:
        x.copy_(batch[0])
        target.copy_(batch[1])
        graph.replay()
        losses.append(loss.item())
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    for weight, wanted in zip(layer.parameters(), expected):
        torch.testing.assert_close(weight, wanted, rtol=2e-3, atol=2e-3)


def test_graphed_callables_train(device: torch.device) -> None:
    """torch's own way to capture a module's forward and backward, each in a graph of its own."""
    layer, x = make_layer(device), torch.randn(2, 200, WIDTH, device=device, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(layer), (x.detach().clone().requires_grad_(),))
    for _ in range(3):
        x = torch.randn_like(x).requires_grad_()
        expected = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
        found = torch.autograd.grad(graphed(x).square().sum(), [x, *graphed.parameters()])
        for grad, wanted in zip(found, expected):
            torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


# Streams


def test_streams_train_at_once(device: torch.device) -> None:
    """Calls of one kind on several streams, in flight together, share nothing that they write."""
    many = [make_leaves(device, seed=seed) for seed in range(4)]
    expected = [torch.autograd.grad(attend(*leaves).float().square().sum(), leaves) for leaves in many]
    streams = [torch.cuda.Stream(device) for _ in many]
    torch.cuda.synchronize()
    for _ in range(5):
        found = []
        for stream, leaves in zip(streams, many):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(LONG_SLEEP // 10)
                found.append(torch.autograd.grad(attend(*leaves).float().square().sum(), leaves))
        torch.cuda.synchronize()
        assert all(equal(*pair) for pair in zip(found, expected))


def test_a_backward_call_follows_its_forward_call_to_its_stream(device: torch.device) -> None:
    """Asked for from another stream, which autograd makes wait for it."""
    leaves = make_leaves(device)
    expected = torch.autograd.grad(attend(*leaves).float().square().sum(), leaves)
    side = torch.cuda.Stream(device)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG_SLEEP)
        loss = attend(*leaves).float().square().sum()
    torch.cuda.current_stream(device).wait_stream(side)
    found = [grad.clone() for grad in torch.autograd.grad(loss, leaves)]
    torch.cuda.synchronize()
    assert equal(found, expected)


# What models do around it


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_checkpoints_compute_the_same_again(dropout_p: float, use_reentrant: bool, device: torch.device) -> None:
    leaves = make_leaves(device)

    def gradients(run: Any) -> list[torch.Tensor]:
        torch.manual_seed(3)
        for leaf in leaves:
            leaf.grad = None
        run(*leaves).float().square().sum().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    def once(*leaves: torch.Tensor) -> torch.Tensor:
        return attend(*leaves, dropout_p=dropout_p)

    found = gradients(lambda *leaves: checkpoint(once, *leaves, use_reentrant=use_reentrant))
    expected = gradients(once)
    assert len(found) == 3
    assert equal(found, expected)


def test_backward_within_autocast_is_the_same(device: torch.device) -> None:
    leaves = make_leaves(device)
    dout = torch.randn_like(leaves[0])
    expected = torch.autograd.grad(attend(*leaves), leaves, dout)
    with torch.autocast("cuda", dtype=torch.float16):
        found = torch.autograd.grad(attend(*leaves), leaves, dout)
    assert equal(found, expected)


def test_what_is_saved_may_wait_on_the_host(device: torch.device) -> None:
    """It comes back contiguous, whatever its strides were, so that another plan may serve it."""
    leaves = make_leaves(device)
    dout = torch.randn_like(leaves[0])
    expected = torch.autograd.grad(attend(*leaves), leaves, dout)
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        out = attend(*leaves)
    for found, wanted in zip(torch.autograd.grad(out, leaves, dout), expected):
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


# Memory


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(
    ("features", "dtype"),
    [({"causal": True}, torch.bfloat16), ({"window": (500, 0)}, torch.bfloat16), ({"softcap": 9.0}, torch.float16), ({}, torch.float32)],
    ids=["causal", "window", "softcap", "float32"],
)
def test_memory_is_linear_in_the_length(features: dict[str, Any], dtype: torch.dtype, deterministic: bool, device: torch.device) -> None:
    """Forward and backward hold out, three gradients, at most a float32 copy of dQ, and some numbers a query."""
    heads, slack = 2, 4 << 20

    def peak(seqlen: int) -> int:
        leaves = [torch.randn(1, seqlen, heads, DIM, dtype=dtype, device=device).requires_grad_() for _ in range(3)]
        dout = torch.randn(1, seqlen, heads, DIM, dtype=dtype, device=device)

        def train() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(flashtile.attention(*leaves, **features, deterministic=deterministic), leaves, dout)

        train()  # what the first call of a kind leaves behind is no part of it
        return peak_bytes(train, device)

    short, long = 8192, 32768
    assert peak(long) <= long / short * peak(short) + slack
    elements, rows = long * heads * DIM, long * heads
    size = torch.finfo(dtype).bits // 8
    assert peak(long) <= 4 * elements * size + elements * 4 + 6 * rows * 4 + slack


def test_a_packed_batch_takes_no_more_than_its_tokens(device: torch.device) -> None:
    """Not the longest length for each sequence."""
    lengths = [8000] + [100] * 80
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
    total, heads = sum(lengths), 4
    leaves = [torch.randn(total, heads, DIM, dtype=torch.bfloat16, device=device).requires_grad_() for _ in range(3)]
    dout = torch.randn(total, heads, DIM, dtype=torch.bfloat16, device=device)

    def train() -> tuple[torch.Tensor, ...]:
        out = flashtile.attention_varlen(*leaves, starts, starts, 8000, 8000, causal=True)
        return torch.autograd.grad(out, leaves, dout)

    train()
    elements = total * heads * DIM
    assert peak_bytes(train, device) <= 4 * elements * 2 + elements * 4 + 6 * total * heads * 4 + (4 << 20)
