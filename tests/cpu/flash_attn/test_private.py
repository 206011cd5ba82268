"""The functions below the public ones, as ring attention uses them: forward over parts, merged, and backward over parts."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from flashtile.errors import ArgumentError, DtypeError, ShapeError, UnsupportedError
from flashtile.flash_attn import flash_attn_func, flash_attn_varlen_func
from flashtile.flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _get_block_size_n,
)
from flashtile.testing.parity import Parity, Tensors, assert_parity

SCALE = 64**-0.5


def qkv_of(tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tensors["q"], tensors["k"], tensors["v"]


@pytest.mark.parametrize("given", ["all", "strided", "dq", "none"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_dense_functions_are_the_public_one_in_two_halves(given: str, dropout_p: float) -> None:
    tensors = Parity(13, 20, heads=(4, 2)).tensors()
    leaves = [tensor.clone().requires_grad_() for tensor in qkv_of(tensors)]
    torch.manual_seed(2)
    expected, expected_lse, _ = flash_attn_func(*leaves, dropout_p, causal=True, softcap=20.0, return_attn_probs=True)
    expected_grads = torch.autograd.grad(expected, leaves, tensors["dout"])
    torch.manual_seed(2)
    out, lse, probs, rng_state = _flash_attn_forward(*leaves, dropout_p, SCALE, True, -1, -1, 20.0, None, False)
    assert probs is None and (rng_state is None) == (dropout_p == 0.0)
    assert not out.requires_grad
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    room = [torch.full((*leaf.shape, 2), math.nan, dtype=leaf.dtype) for leaf in leaves]
    grads: list[torch.Tensor | None] = [
        r[..., 0] if given == "strided" else torch.full_like(leaf, math.nan) for r, leaf in zip(room, leaves)
    ]
    grads = [grad if given in ("all", "strided") or (given == "dq" and i == 0) else None for i, grad in enumerate(grads)]
    _flash_attn_backward(tensors["dout"], *leaves, out, lse, *grads, dropout_p, SCALE, True, -1, -1, 20.0, None, True, rng_state)
    for grad, expected_grad in zip(grads, expected_grads):
        assert grad is None or torch.equal(grad, expected_grad)


def test_gradients_go_into_parts_of_a_larger_tensor() -> None:
    tensors = Parity(8, 8, heads=(2, 2)).tensors()
    q, k, v = qkv_of(tensors)
    out, lse, _, _ = _flash_attn_forward(q, k, v, 0.0, SCALE, False, -1, -1, 0.0, None, False)
    dqkv = torch.full((2, 8, 3, 2, 64), math.nan, dtype=q.dtype)
    _flash_attn_backward(tensors["dout"], q, k, v, out, lse, *dqkv.unbind(2), 0.0, SCALE, False, -1, -1, 0.0, None, False)
    assert_parity(Parity(8, 8, heads=(2, 2)), tensors, out, lse, dqkv.unbind(2))


def test_rings() -> None:
    """Queries of a causal sequence over two shards of its keys; the merged lse makes each shard's gradients those of the whole."""
    case = Parity(24, 48, heads=(4, 4), causal=True, dtype="float16")
    tensors = case.tensors()
    q, k, v = qkv_of(tensors)
    shards = [(k[:, :24], v[:, :24], False), (k[:, 24:], v[:, 24:], True)]
    parts = [_flash_attn_forward(q, *shard[:2], 0.0, SCALE, shard[2], -1, -1, 0.0, None, False)[:2] for shard in shards]
    lse = torch.logaddexp(parts[0][1], parts[1][1]).transpose(1, 2).contiguous().transpose(1, 2)
    weights = [torch.exp(part_lse - lse).transpose(1, 2)[..., None] for _, part_lse in parts]
    out = sum(weight * part for weight, (part, _) in zip(weights, parts)).to(q.dtype)
    dq, dk, dv = torch.zeros_like(q, dtype=torch.float32), torch.empty_like(k), torch.empty_like(v)
    for i, (k_part, v_part, causal) in enumerate(shards):
        dq_part, here = torch.empty_like(q), slice(24 * i, 24 * i + 24)
        grads = dq_part, dk[:, here], dv[:, here]
        _flash_attn_backward(tensors["dout"], q, k_part, v_part, out, lse, *grads, 0.0, SCALE, causal, -1, -1, 0.0, None, False)
        dq += dq_part
    assert_parity(case, tensors, out, lse, (dq.to(q.dtype), dk, dv))


def test_signatures_are_read_as_ring_attention_reads_them() -> None:
    """It fills arguments in by ``inspect.getfullargspec``, which looks through no wrapper, and passes all by name."""
    for function in (_flash_attn_forward, _flash_attn_varlen_forward, _flash_attn_backward, _flash_attn_varlen_backward):
        assert inspect.isfunction(function)
        spec = inspect.getfullargspec(function)
        assert "softcap" in spec.args and spec.varargs is None and spec.varkw is None


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_packed_functions_are_the_public_one_in_two_halves(dropout_p: float) -> None:
    case = Parity((9, 4, 6), (5, 12, 0), heads=(4, 4), causal=True)
    tensors = case.tensors()
    leaves = [tensor.clone().requires_grad_() for tensor in qkv_of(tensors)]
    starts = tensors["cu_seqlens_q"], tensors["cu_seqlens_k"], 9, 12
    torch.manual_seed(4)
    expected, expected_lse, _ = flash_attn_varlen_func(*leaves, *starts, dropout_p, causal=True, window_size=(6, 0), return_attn_probs=True)
    expected_grads = torch.autograd.grad(expected, leaves, tensors["dout"])
    torch.manual_seed(4)
    out, lse, _, rng_state = _flash_attn_varlen_forward(*leaves, *starts, dropout_p, SCALE, True, 6, 0, zero_tensors=True)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert (lse[:, 13:] == math.inf).all()
    grads = [torch.full_like(leaf, math.nan) for leaf in leaves]
    _flash_attn_varlen_backward(
        tensors["dout"], *leaves, out, lse, *grads, *starts, dropout_p, SCALE, True, 6, 0, 0.0, None, False, rng_state
    )
    assert all(torch.equal(grad, expected_grad) for grad, expected_grad in zip(grads, expected_grads))


def test_pages_and_used_lengths() -> None:
    tensors = Parity((3, 2), (16, 16), heads=(4, 2), causal=True).tensors()
    starts = tensors["cu_seqlens_q"], tensors["cu_seqlens_k"], 3, 16
    q, k, v = qkv_of(tensors)
    used = torch.tensor([11, 7], dtype=torch.int32)
    plain = _flash_attn_varlen_forward(q, k, v, *starts, 0.0, SCALE, True, seqused_k=used)
    pages, table = (x.unflatten(0, (8, 4)) for x in (k, v)), torch.arange(8, dtype=torch.int32).view(2, 4)
    paged = _flash_attn_varlen_forward(q, *pages, *starts, 0.0, SCALE, True, seqused_k=used, block_table=table, num_splits=1)
    torch.testing.assert_close(paged[0], plain[0])
    torch.testing.assert_close(paged[1], plain[1], atol=2e-4, rtol=0)


def test_what_does_not_fit_is_refused() -> None:
    tensors = Parity(8, 8, heads=(2, 2)).tensors()
    q, k, v = qkv_of(tensors)
    out, lse, _, _ = _flash_attn_forward(q, k, v, 0.0, SCALE, False, -1, -1, 0.0, None, False)
    tail = 0.0, SCALE, False, -1, -1, 0.0, None, False
    with pytest.raises(ShapeError, match="dq"):
        _flash_attn_backward(out, q, k, v, out, lse, q[:1], None, None, *tail)
    with pytest.raises(DtypeError, match="dk"):
        _flash_attn_backward(out, q, k, v, out, lse, None, k.float(), None, *tail)
    with pytest.raises(ShapeError, match="softmax_lse"):
        _flash_attn_backward(out, q, k, v, out, lse.transpose(1, 2), None, None, None, *tail)
    with pytest.raises(ArgumentError, match="rng_state"):
        _flash_attn_backward(out, q, k, v, out, lse, None, None, None, 0.1, *tail[1:])
    for wrong, error in ((torch.zeros(2, dtype=torch.int32), DtypeError), (torch.zeros(3, dtype=torch.int64), ShapeError),
                         (torch.zeros(2, dtype=torch.int64, device="meta"), ShapeError)):  # fmt: skip
        with pytest.raises(error, match="rng_state"):
            _flash_attn_backward(out, q, k, v, out, lse, None, None, None, 0.1, *tail[1:], wrong)
    _flash_attn_backward(out, q, k, v, out, lse, None, None, None, *tail, torch.zeros(3))  # without dropout nothing reads it
    starts = torch.tensor([0, 8], dtype=torch.int32), torch.tensor([0, 8], dtype=torch.int32), 8, 8
    for argument in ({"leftpad_k": starts[0]}, {"num_splits": 4}):
        with pytest.raises(UnsupportedError, match=next(iter(argument))):
            _flash_attn_varlen_forward(q[0], k[0], v[0], *starts, 0.0, SCALE, False, **argument)


@pytest.mark.parametrize("head_dim", [59, 64, 256])
@pytest.mark.parametrize("is_dropout", [False, True])
def test_block_size(head_dim: int, is_dropout: bool) -> None:
    assert _get_block_size_n(torch.device("cpu"), head_dim, is_dropout, True) >= 1
