"""Tensors that have no memory to hand to a kernel: such calls are operators, which torch's dispatcher takes apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

import flashtile
from flashtile.flash_attn.layers.rotary import apply_rotary_emb
from flashtile.ops import append as append_ops
from flashtile.ops import decode as decode_ops
from flashtile.ops import forward as forward_ops
from flashtile.ops.tracing import is_traced


class Wrapped(torch.Tensor):
    """A tensor that has another one, and no memory of its own."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        made: Wrapped = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrapped(x: Any) -> Any:
            return x.inner if isinstance(x, Wrapped) else x

        return tree_map(lambda x: Wrapped(x) if isinstance(x, torch.Tensor) else x, func(*tree_map(unwrapped, args), **(kwargs or {})))


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, n, heads, 16, generator=generator) for n, heads in ((3, 4), (9, 2), (9, 2)))
    return {"q": q, "k": k, "v": v, "lengths": torch.tensor([4, 2], dtype=torch.int32), "cos": torch.rand(12, 8, generator=generator)}


def _append(t: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    cache = t["k"] * 1.0
    lengths, _ = flashtile.append_kv(cache, t["v"] * 1.0, t["k"][:, :2], t["v"][:, :2], t["lengths"])
    return lengths, cache


CALLS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "attention": lambda t: flashtile.attention_with_lse(t["q"], t["k"], t["v"], causal=True),
    "decode": lambda t: flashtile.decode(t["q"], t["k"], t["v"], t["lengths"]),
    "append": _append,
    "rotary": lambda t: apply_rotary_emb(t["q"], t["cos"], t["cos"], seqlen_offsets=t["lengths"]),
}


@pytest.fixture
def kernels_get_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that an engine is handed has memory."""

    def checked(run: Callable[[Any], None]) -> Callable[[Any], None]:
        def run_checked(call: Any) -> None:
            assert all(type(x) is torch.Tensor and x.data_ptr() for x in call if isinstance(x, torch.Tensor))
            run(call)

        return run_checked

    for operation in (decode_ops, forward_ops):
        real = operation.bound
        monkeypatch.setattr(operation, "_PREPARED", {})
        monkeypatch.setattr(operation, "bound", lambda *args, real=real: checked(real(*args)))
    real_module = append_ops._module_for
    monkeypatch.setattr(
        append_ops,
        "_module_for",
        lambda device: type("module", (), {"runner_for": staticmethod(lambda call: checked(real_module(device).runner_for(call)))}),
    )


@pytest.mark.usefixtures("kernels_get_memory")
@pytest.mark.parametrize("call", CALLS)
def test_wrapped_tensors_are_unwrapped_by_the_dispatcher(call: str) -> None:
    expected = CALLS[call](tensors())
    got = CALLS[call]({name: Wrapped(x) for name, x in tensors().items()})
    torch.testing.assert_close(tree_map(lambda x: x.inner, got), expected)


@pytest.mark.usefixtures("kernels_get_memory")
@pytest.mark.parametrize("call", CALLS)
def test_fake_tensors_give_fake_results_and_run_nothing(call: str) -> None:
    expected = CALLS[call](tensors())
    with FakeTensorMode() as mode:
        got = CALLS[call]({name: mode.from_tensor(x) for name, x in tensors().items()})
    for result, real in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, expected))):
        assert isinstance(result, FakeTensor) and result.shape == real.shape and result.dtype == real.dtype


def test_fake_tensors_have_fake_gradients() -> None:
    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(tensors()[name]).requires_grad_() for name in "qkv")
        flashtile.attention(q, k, v).sum().backward()
    assert isinstance(q.grad, FakeTensor) and q.grad.shape == (2, 3, 4, 16)


def test_tensors_with_memory_take_the_short_way() -> None:
    class Named(torch.Tensor):
        """A subclass with memory of its own."""

    q = tensors()["q"]
    assert not is_traced(q, torch.nn.Parameter(q), q.as_subclass(Named))
    assert not is_traced(q[:0].as_subclass(Named), q, q) and is_traced(q, q, Wrapped(q))
