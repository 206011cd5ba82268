"""Gradients within a model's training: merged parts, checkpointing, hooks, changes in place, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import flashtile
from flashtile import reference
from flashtile.errors import UnsupportedError
from flashtile.testing.backward_inputs import Gradients, backward_call
from tests.cpu.gradient_calls import NAMES, gradients, plain, run, same, with_leaves


def test_merged_parts_train_like_the_whole() -> None:
    q, k, v = (torch.randn(2, n, h, 16, requires_grad=True) for n, h in ((7, 4), (40, 2), (40, 2)))
    sinks = torch.randn(4, requires_grad=True)
    dout, dlse = torch.randn(2, 7, 4, 16), torch.randn(2, 4, 7)

    def merged() -> tuple[torch.Tensor, torch.Tensor]:
        parts = [
            flashtile.attention_with_lse(q, k[:, keys], v[:, keys], sinks=sinks if i == 0 else None)
            for i, keys in enumerate((slice(0, 13), slice(13, 40)))
        ]
        return flashtile.merge([out for out, _ in parts], [lse for _, lse in parts])

    leaves = [q, k, v, sinks]
    whole = torch.autograd.grad(flashtile.attention_with_lse(q, k, v, sinks=sinks), leaves, [dout, dlse])
    for found, expected in zip(torch.autograd.grad(merged(), leaves, [dout, dlse]), whole):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    inputs = plain()
    call = backward_call(inputs)

    def again(args: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        rest = {name: value for name, value in args.items() if name not in NAMES}
        found: tuple[torch.Tensor, torch.Tensor] = checkpoint(
            lambda *leaves: run(rest | dict(zip(NAMES, leaves))), *(args[name] for name in NAMES), use_reentrant=use_reentrant
        )
        return found

    args, leaves = with_leaves(inputs.args)
    torch.autograd.backward(again(args), [call.dout, torch.ones(2, 4, 9)])
    found = Gradients(*(leaf.grad for leaf in leaves))  # type: ignore[arg-type]
    assert same(found, gradients(inputs, call.dout, torch.ones(2, 4, 9)))


def test_hooks_see_what_is_saved() -> None:
    inputs, packed = plain(), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor.shape)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        args, leaves = with_leaves(inputs.args)
        out = flashtile.attention(**args)
    assert len(packed) == 6  # q, k, v, sinks, out and lse
    torch.autograd.backward(out, torch.ones_like(out))
    assert same(Gradients(*(leaf.grad for leaf in leaves)), gradients(inputs, torch.ones_like(out), None))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["q", "out"])
def test_a_change_in_place_of_what_is_saved_is_noticed(name: str) -> None:
    args, _ = with_leaves(plain().args, ("k",))
    out = flashtile.attention(**args)
    (args["q"] if name == "q" else out.detach()).mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_second_derivative_is_refused() -> None:
    args, leaves = with_leaves(plain().args)
    found = torch.autograd.grad(flashtile.attention(**args).sum(), leaves, create_graph=True)
    assert same(Gradients(*found), gradients(plain(), torch.ones(2, 9, 4, 16), None))
    with pytest.raises(UnsupportedError, match="no second derivative"):
        torch.autograd.grad(found[0].square().sum(), leaves)


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_torchs_own_attention(dtype: torch.dtype) -> None:
    inputs = plain()
    args, leaves = with_leaves(inputs.args)
    mixed = args | {"k": args["k"].to(dtype)}
    with torch.autocast("cpu", dtype=dtype):
        out, lse = run(args)
        assert torch.equal(run(mixed)[0], out)
        assert torch.nn.functional.scaled_dot_product_attention(*(args[n].transpose(1, 2) for n in ("q", "q", "q"))).dtype == dtype
    cast = {name: args[name].detach().to(dtype) for name in ("q", "k", "v")}
    expected, expected_lse = run(inputs.args | cast)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    out.sum().backward()
    assert [leaf.grad.dtype for leaf in leaves if leaf.grad is not None] == [torch.float32] * 4


def test_autocast_leaves_16_bit_tensors_alone() -> None:
    args = plain(dtype="float16").args
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flashtile.attention(**args).dtype == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(flashtile.DtypeError, match=r"q: .*float64"):
        flashtile.attention(**args | {name: args[name].double() for name in ("q", "k", "v")})


def test_training_on_the_reference_and_on_flashtile_is_the_same() -> None:
    """Some steps of gradient descent on projections, by either."""
    rng = torch.Generator().manual_seed(0)
    x, target = (torch.randn(2, 20, 16, generator=rng) for _ in range(2))

    def train(attend: Callable[..., torch.Tensor]) -> list[float]:
        weights = [(torch.randn(16, 16, generator=torch.Generator().manual_seed(i)) / 4).requires_grad_() for i in range(3)]
        losses = []
        for _ in range(5):
            q, k, v = ((x @ weight).view(2, 20, 2, 8) for weight in weights)
            loss = (attend(q, k, v).flatten(2) - target).square().mean()
            losses.append(loss.item())
            for weight, grad in zip(weights, torch.autograd.grad(loss, weights)):
                weight.data -= 2.0 * grad
        return losses

    losses = train(lambda q, k, v: flashtile.attention(q, k, v, causal=True, softcap=5.0))
    assert losses == pytest.approx(train(lambda q, k, v: reference.forward(q, k, v, causal=True, softcap=5.0)[0].float()), rel=1e-4)
    assert losses[-1] < losses[0]
