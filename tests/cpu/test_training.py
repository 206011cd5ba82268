"""Ways that people train: derivatives by torch's own check of them, within autocast, with offloading, accumulated, on threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashtile
from flashtile.errors import UnsupportedError
from flashtile.flash_attn.layers.rotary import apply_rotary_emb
from flashtile.testing.forward_cases import ForwardCase
from flashtile.testing.forward_inputs import make_forward_inputs

pytestmark = pytest.mark.usefixtures("one_thread")
FEATURES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": (4, 2)},
    "softcap": {"softcap": 3.0, "scale": -0.4},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1])},
    "dropout": {"dropout_p": 0.3, "causal": True},
}
every_feature = pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)


def leaves_of(seqlen_q: int, seqlen_k: int, *, batch: int = 2, dim: int = 16, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q of two heads, and k and v of one."""
    rng = torch.Generator().manual_seed(0)
    shapes = ((seqlen_q, 2), (seqlen_k, 1), (seqlen_k, 1))
    return [torch.randn(batch, n, h, dim, generator=rng).to(dtype).requires_grad_() for n, h in shapes]


# torch's check of derivatives


def in_float32(features: dict[str, Any], packed: bool = False) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Attention of float64 tensors, computed in float32 and from one seed: what gradcheck can take differences of."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        q, k, v, sinks = (tensor.float() for tensor in (q, k, v, sinks))
        if packed:
            starts = (torch.tensor(values, dtype=torch.int32) for values in ([0, 1, 1, 3], [0, 2, 3, 5]))
            results = flashtile.attention_varlen_with_lse(q[0], k[0], v[0], *starts, q.shape[1], k.shape[1], sinks=sinks, **features)
        else:
            results = flashtile.attention_with_lse(q, k, v, sinks=sinks, **features)
        return tuple(result.double() for result in results)

    return run


@every_feature
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(features: dict[str, Any], packed: bool) -> None:
    """Differences over steps of 1e-2, which float32 resolves to 1e-5."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in (*leaves_of(3, 5, batch=1, dim=8), torch.tensor([0.3, -0.5]))]
    assert torch.autograd.gradcheck(in_float32(features, packed), leaves, eps=1e-2, atol=2e-3, rtol=2e-3)


def test_gradgradcheck_is_told_that_there_is_no_second_derivative() -> None:
    leaves = [leaf.detach().double().requires_grad_() for leaf in (*leaves_of(3, 5, batch=1, dim=8), torch.zeros(2))]
    with pytest.raises(UnsupportedError, match="no second derivative"):
        torch.autograd.gradgradcheck(in_float32({"causal": True}), leaves)


def test_transforms_of_torch_func_and_forward_mode_are_refused() -> None:
    q, k, v = leaves_of(3, 5)
    run = lambda q: flashtile.attention(q, k, v, causal=True)  # noqa: E731
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda q: run(q).sum())(q.detach())
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        run(torch.autograd.forward_ad.make_dual(q, torch.ones_like(q)))


@pytest.mark.parametrize("name", ["q", "v", "sinks", "x"])
def test_a_tangent_is_refused_though_nothing_requires_a_gradient(name: str) -> None:
    """As kernels would drop it in silence."""
    q, k, v = (leaf.detach() for leaf in leaves_of(3, 5))
    given = {"q": q, "k": k, "v": v, "sinks": torch.zeros(q.shape[2]), "x": q}
    with torch.autograd.forward_ad.dual_level():
        given[name] = torch.autograd.forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        x = given.pop("x")
        with pytest.raises(UnsupportedError, match="forward mode AD of these calls"):
            apply_rotary_emb(x, torch.ones(3, 2), torch.ones(3, 2)) if name == "x" else flashtile.attention(**given)
    assert flashtile.attention(q, k, v).shape == q.shape


@pytest.mark.parametrize("name", ["q", "k_cache", "sinks", "k"])
def test_a_tangent_is_refused_by_calls_over_a_cache_too(name: str) -> None:
    q, k, v = (leaf.detach() for leaf in leaves_of(1, 5))
    lengths = torch.ones(q.shape[0], dtype=torch.int32)
    given = {"q": q, "k_cache": k, "v_cache": v, "sinks": torch.zeros(q.shape[2]), "k": k[:, :1].clone()}

    def run() -> torch.Tensor:
        if name == "k":
            return flashtile.append_kv(given["k_cache"], given["v_cache"], given["k"], v[:, :1].clone(), lengths)[0]
        return flashtile.decode(**{name: given[name] for name in ("q", "k_cache", "v_cache", "sinks")}, seqlens_k=lengths)

    with torch.autograd.forward_ad.dual_level():
        run()
        given[name] = torch.autograd.forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        with pytest.raises(UnsupportedError, match="forward mode AD of these calls"):
            run()


# Autocast


@every_feature
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_within_autocast_16_bit_tensors_give_the_same_forward_and_backward(features: dict[str, Any], dtype: torch.dtype) -> None:
    leaves = leaves_of(40, 50, dtype=dtype)
    dout, dlse = torch.randn(2, 40, 2, 16).to(dtype), torch.randn(2, 2, 40)

    def train() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        results = flashtile.attention_with_lse(*leaves, **features)
        return *results, *torch.autograd.grad(results, leaves, [dout, dlse])

    expected = train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = train()
    assert all(torch.equal(*pair) for pair in zip(found, expected))


@pytest.mark.parametrize("features", [{}, {"window": (9, 0)}, {"softcap": 3.0}], ids=str)
def test_within_autocast_decode_is_the_same(features: dict[str, Any]) -> None:
    q, k, v = (leaf.detach() for leaf in leaves_of(3, 50, dtype=torch.bfloat16))
    lengths = torch.tensor([50, 7], dtype=torch.int32)
    expected = flashtile.decode(q, k, v, lengths, **features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(flashtile.decode(q, k, v, lengths, **features), expected)


# What models do around it


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_what_is_saved_may_be_kept_elsewhere_meanwhile(layout: str) -> None:
    """save_on_cpu brings tensors back contiguous, whatever their strides were."""
    args = make_forward_inputs(
        ForwardCase("plain", 9, 30, batch=2, head_dim=16, dtype="float32", layout=layout, causal=True, padding=0)
    ).args
    leaves = [args[name].detach().requires_grad_() for name in ("q", "k", "v")]
    expected = torch.autograd.grad(flashtile.attention(*leaves, causal=True).square().sum(), leaves)
    with torch.autograd.graph.save_on_cpu():
        out = flashtile.attention(*leaves, causal=True)
    for found, wanted in zip(torch.autograd.grad(out.square().sum(), leaves), expected):
        torch.testing.assert_close(found, wanted)


def test_parts_of_a_batch_accumulate_to_the_whole() -> None:
    leaves = leaves_of(20, 20)
    expected = torch.autograd.grad(flashtile.attention(*leaves, causal=True).square().sum(), leaves)
    for i in range(2):
        flashtile.attention(*(leaf[i : i + 1] for leaf in leaves), causal=True).square().sum().backward()
    for leaf, wanted in zip(leaves, expected):
        torch.testing.assert_close(leaf.grad, wanted)


def test_a_graph_may_be_walked_twice_where_it_is_retained() -> None:
    leaves = leaves_of(5, 9)
    loss = flashtile.attention(*leaves, causal=True).square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(*pair) for pair in zip(torch.autograd.grad(loss, leaves), first))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_threads_train_at_once() -> None:
    """Each on a model of its own, with lengths that nobody had before."""

    def train(seqlen: int) -> tuple[torch.Tensor, ...]:
        leaves = leaves_of(seqlen, seqlen + 3)
        return torch.autograd.grad(flashtile.attention(*leaves, window=(9, 0)).square().sum(), leaves)

    found: dict[int, tuple[torch.Tensor, ...]] = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: train(n)})) for n in (21, 35, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [21, 35, 50]
    for seqlen, grads in found.items():
        for grad, wanted in zip(grads, train(seqlen)):
            torch.testing.assert_close(grad, wanted)
