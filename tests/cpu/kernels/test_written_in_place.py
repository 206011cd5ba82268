"""What GPUs' kernels write in place, autograd is told of: who saved it for gradients gets torch's error, as on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import flashtile
from flashtile.flash_attn.layers.rotary import apply_rotary_emb
from flashtile.kernels import cpu_rotary
from flashtile.ops import append as append_ops
from flashtile.ops import decode as decode_ops
from flashtile.ops import forward as forward_ops
from flashtile.planner.device import Device

pytest.importorskip("triton")

from flashtile.kernels import append, decode, forward, rotary

LENGTHS = torch.tensor([4, 4], dtype=torch.int32)


@pytest.fixture(autouse=True)
def gpus_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls on CPU tensors take the kernels of GPUs, in the interpreter."""
    monkeypatch.setattr(cpu_rotary, "rotate", rotary.rotate)
    monkeypatch.setattr(append_ops, "_module_for", lambda device: append)
    monkeypatch.setattr(decode_ops.Device, "of", lambda device: Device.named("a100"))
    for operation, kernel in ((decode_ops, decode), (forward_ops, forward)):
        monkeypatch.setattr(operation, "_PREPARED", {})
        monkeypatch.setattr(operation, "bound", lambda module, *args, kernel=kernel: kernel.bind(*args))
    append._runner.cache_clear()
    yield
    append._runner.cache_clear()


def new(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _append(x: torch.Tensor) -> None:
    flashtile.append_kv(x, new(*x.shape), new(2, 1, 2, 16), new(2, 1, 2, 16), LENGTHS)


WRITERS: dict[str, Callable[[torch.Tensor], object]] = {
    "rotary": lambda x: apply_rotary_emb(x, new(9, 8), new(9, 8), inplace=True),
    "append": _append,
    "decode": lambda x: flashtile.decode(new(*x.shape), new(2, 5, 2, 16), new(2, 5, 2, 16), LENGTHS, out=x),
    "attention": lambda x: flashtile.attention(new(*x.shape), new(2, 5, 2, 16), new(2, 5, 2, 16), out=x),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_who_saved_what_is_written_gets_an_error(writer: str) -> None:
    x, weight = new(2, 6, 2, 16), torch.ones(16, requires_grad=True)
    product = (x * weight).sum()
    before = x.clone()
    WRITERS[writer](x)
    assert not torch.equal(x, before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("writer", WRITERS)
def test_tensors_of_inference_mode_have_no_such_notes(writer: str) -> None:
    with torch.inference_mode():
        x = new(2, 6, 2, 16)
    with torch.no_grad():
        WRITERS[writer](x)
    WRITERS[writer](x)
