"""apply_rotary_emb: the CPU's operations against their definition, the GPU's kernel in the interpreter against both."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from flashtile.errors import ArgumentError, AttentionError, DtypeError, ShapeError, UnsupportedError
from flashtile.flash_attn.layers.rotary import (
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
)
from flashtile.kernels import cpu_rotary
from flashtile.testing.pairwise import pairwise
from flashtile.testing.poison import nan_like

POSITIONS = 24


def defined(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, starts: list[int]) -> torch.Tensor:
    """x (batch, seqlen, heads, dim) in float64, pair by pair, token by token; tokens beyond the tables stay."""
    out = x.double().clone()
    pairs = cos.shape[1]
    for b, start in enumerate(starts):
        for m in range(x.shape[1]):
            at = start + m
            if not 0 <= at < len(cos):
                continue
            for i in range(pairs):
                first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
                c, s = cos[at, i].double(), sin[at, i].double()
                one, two = x[b, m, :, first].double(), x[b, m, :, second].double()
                out[b, m, :, first], out[b, m, :, second] = one * c - two * s, one * s + two * c
    return out


def tables(pairs: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(torch.arange(POSITIONS), 100.0 ** (-torch.arange(pairs) / max(1, pairs)))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rounding(dtype: torch.dtype) -> dict[str, float]:
    return {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 1e-6, "rtol": torch.finfo(dtype).eps}


AXES = {
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "dims": ((16, 32), (8, 64), (20, 59), (1, 8)),
    "interleaved": (False, True),
    "offsets": (0, 3, 20, torch.tensor([5, 0, 22], dtype=torch.int32), torch.tensor([1, 2, 3])),
    "inplace": (False, True),
    "seqlen": (1, 9),
}
ROWS = pairwise(AXES, seed=4)


def starts_of(offsets: int | torch.Tensor, batch: int) -> list[int]:
    return offsets.tolist() if isinstance(offsets, torch.Tensor) else [offsets] * batch


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_dense(row: dict[str, Any]) -> None:
    pairs, dim = row["dims"]
    x = torch.randn(3, row["seqlen"], 2, dim).to(row["dtype"])
    cos, sin = tables(pairs)
    expected = defined(x, cos, sin, row["interleaved"], starts_of(row["offsets"], 3))
    given = x.clone()
    out = apply_rotary_emb(given, cos, sin, row["interleaved"], row["inplace"], row["offsets"])
    assert (out is given) == row["inplace"] and (row["inplace"] or torch.equal(given, x))
    torch.testing.assert_close(out.double(), expected, **rounding(row["dtype"]))
    assert torch.equal(out[..., 2 * pairs :], x[..., 2 * pairs :])


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
@pytest.mark.parametrize("packed", [False, True])
def test_the_kernel_of_gpus(row: dict[str, Any], packed: bool) -> None:
    pytest.importorskip("triton")
    from flashtile.kernels import rotary

    pairs, dim = row["dims"]
    cos, sin = tables(pairs, torch.float32 if row["inplace"] else row["dtype"])
    offsets, offset = (row["offsets"], 0) if isinstance(row["offsets"], torch.Tensor) else (None, row["offsets"])
    cu_seqlens = torch.tensor([0, row["seqlen"], row["seqlen"], row["seqlen"] + 2], dtype=torch.int32) if packed else None
    shape = (row["seqlen"] + 5, 2, dim) if packed else (3, row["seqlen"], 2, dim)
    x = torch.randn(*shape[:-2], dim, 2).to(row["dtype"]).transpose(-1, -2).contiguous()
    for conjugate in (False, True):
        tail = cos, sin, offsets, offset, cu_seqlens, max(2, row["seqlen"]), row["interleaved"], conjugate
        expected = torch.empty_like(x)
        cpu_rotary.rotate(x, expected, *tail)
        given = x.clone()
        out = given if row["inplace"] else nan_like(x)
        rotary.rotate(given, out, *tail)
        torch.testing.assert_close(out, expected, **rounding(row["dtype"]))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [2, torch.tensor([4, 0, 1])])
def test_packed_is_each_sequence_by_itself(interleaved: bool, offsets: int | torch.Tensor) -> None:
    x, (cos, sin) = torch.randn(12, 2, 40), tables(16)
    starts = [0, 5, 5, 10]
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    out = apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets, cu_seqlens=cu_seqlens, max_seqlen=5)
    for i, (start, end) in enumerate(itertools.pairwise(starts)):
        alone = defined(x[None, start:end], cos, sin, interleaved, [starts_of(offsets, 3)[i]])
        torch.testing.assert_close(out[None, start:end].double(), alone, atol=1e-6, rtol=1e-6)
    assert torch.equal(out[10:], x[10:]), "tokens of no sequence"


@pytest.fixture
def gpus_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls on CPU tensors take the kernel of GPUs, in the interpreter."""
    pytest.importorskip("triton")
    from flashtile.kernels import rotary

    monkeypatch.setattr(cpu_rotary, "rotate", rotary.rotate)


@pytest.mark.usefixtures("gpus_kernel")
def test_offsets_and_starts_of_any_strides() -> None:
    x, (cos, sin) = torch.randn(3, 5, 2, 16), tables(8)
    offsets = torch.tensor([[4, 9], [0, 9], [1, 9]], dtype=torch.int32)[:, 0]
    out = apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets)
    torch.testing.assert_close(out.double(), defined(x, cos, sin, False, [4, 0, 1]), atol=1e-6, rtol=1e-6)
    same = apply_rotary_emb(x, cos, sin, seqlen_offsets=torch.tensor([2]).expand(3))
    torch.testing.assert_close(same, apply_rotary_emb(x, cos, sin, seqlen_offsets=2))
    starts = torch.tensor([[0, 9], [5, 9], [10, 9], [15, 9]], dtype=torch.int32)[:, 0]
    packed = apply_rotary_emb(x.flatten(0, 1), cos, sin, seqlen_offsets=offsets, cu_seqlens=starts, max_seqlen=5)
    assert torch.equal(packed, out.flatten(0, 1))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradients(interleaved: bool, inplace: bool) -> None:
    leaf, (cos, sin) = torch.randn(2, 7, 3, 24, requires_grad=True), tables(8)
    dout = torch.randn(2, 7, 3, 24)
    out = apply_rotary_emb(leaf * 1.0, cos, sin, interleaved, inplace)
    expected = apply_rotary_emb_torch(leaf, cos[:7], sin[:7], interleaved)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    (grad,), (expected_grad,) = (torch.autograd.grad(result, leaf, dout) for result in (out, expected))
    torch.testing.assert_close(grad, expected_grad, atol=1e-6, rtol=1e-6)


def test_gradients_of_gradients() -> None:
    leaf, (cos, sin) = torch.randn(1, 3, 2, 16, requires_grad=True), tables(8)
    (grad,) = torch.autograd.grad((apply_rotary_emb(leaf, cos, sin) ** 2).sum(), leaf, create_graph=True)
    torch.testing.assert_close(grad, 2.0 * leaf, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(grad.sum(), leaf)[0], torch.full_like(leaf, 2.0), atol=1e-5, rtol=1e-5)


def test_strided_tensors() -> None:
    qkv, (cos, sin) = torch.randn(2, 6, 3, 4, 32), tables(16)
    expected = apply_rotary_emb(qkv[:, :, 0].contiguous(), cos, sin)
    assert torch.equal(apply_rotary_emb(qkv[:, :, 0], cos, sin), expected)
    inside = qkv.clone()
    apply_rotary_emb_func(inside[:, :, 0], cos, sin, inplace=True)
    assert torch.equal(inside[:, :, 0], expected) and torch.equal(inside[:, :, 1:], qkv[:, :, 1:])
    no_last = qkv[:, :, 0].transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(apply_rotary_emb(no_last, cos, sin), expected)
    assert apply_rotary_emb(no_last, cos, sin, inplace=True) is no_last and torch.equal(no_last, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_compilers_see_one_graph(inplace: bool) -> None:
    leaf, (cos, sin) = torch.randn(2, 7, 3, 24, requires_grad=True), tables(8)
    compiled = torch.compile(lambda x: apply_rotary_emb(x * 1.0, cos, sin, inplace=inplace), fullgraph=True, backend="aot_eager")
    out = compiled(leaf)
    torch.testing.assert_close(out, apply_rotary_emb(leaf, cos, sin))
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    torch.testing.assert_close(grad, torch.autograd.grad(apply_rotary_emb(leaf, cos, sin).sum(), leaf)[0])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.zeros(4, 2, 16)}, ShapeError, "x"),
        ({"x": torch.zeros(1, 4, 2, 16, dtype=torch.int32)}, DtypeError, "x"),
        ({"x": [1.0]}, DtypeError, "x"),
        ({"sin": torch.zeros(4, 7)}, ShapeError, "cos and sin"),
        ({"cos": torch.zeros(4, 9), "sin": torch.zeros(4, 9)}, ShapeError, "rotary_dim"),
        ({"cos": torch.zeros(4, 8, requires_grad=True)}, UnsupportedError, "cos and sin"),
        ({"interleaved": 1}, ArgumentError, "interleaved"),
        ({"seqlen_offsets": 0.5}, ArgumentError, "seqlen_offsets"),
        ({"seqlen_offsets": torch.zeros(3, dtype=torch.int32)}, ShapeError, "seqlen_offsets"),
        ({"x": torch.zeros(4, 2, 16), "cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}, ArgumentError, "max_seqlen"),
        ({"x": torch.zeros(4, 2, 16), "cu_seqlens": torch.tensor([0, 4]), "max_seqlen": 4}, ShapeError, "cu_seqlens"),
        ({"x": torch.zeros(4, 2, 16), "cu_seqlens": torch.tensor(4, dtype=torch.int32), "max_seqlen": 4}, ShapeError, "cu_seqlens"),
        ({"x": torch.zeros(1, 4, 1, 16).expand(1, 4, 2, 16), "inplace": True}, ShapeError, "x: expected memory of its own"),
        ({"x": torch.zeros(1, 4, 2, 16, device="meta"), "cos": torch.zeros(4, 8, device="meta"),
          "sin": torch.zeros(4, 8, device="meta")}, UnsupportedError, "meta"),
        ({"cos": torch.zeros(4, 8, device="meta")}, ArgumentError, "cos"),
    ],
)  # fmt: skip
def test_wrong_arguments(change: dict[str, Any], error: type[AttentionError], match: str) -> None:
    args: dict[str, Any] = {"x": torch.zeros(1, 4, 2, 16), "cos": torch.zeros(4, 8), "sin": torch.zeros(4, 8)}
    with pytest.raises(error, match=match):
        apply_rotary_emb(**args | change)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("form", ["three", "grouped", "kv"])
def test_within_packed_tensors(form: str, interleaved: bool) -> None:
    (cos, sin), (cos_k, sin_k) = tables(8), (-tables(8)[0], tables(8)[1])
    shape = {"three": (2, 7, 3, 4, 24), "grouped": (2, 7, 8, 24), "kv": (2, 7, 2, 4, 24)}[form]
    leaf, dout = torch.randn(shape, requires_grad=True), torch.randn(shape)
    given = leaf * 1.0
    if form == "kv":
        out = apply_rotary_emb_kv_(given, cos, sin, interleaved)
        k, v = leaf.unbind(2)
        expected = torch.stack([apply_rotary_emb_torch(k, cos[:7], sin[:7], interleaved), v], dim=2)
    else:
        heads = {} if form == "three" else {"num_heads_q": 4}
        out = apply_rotary_emb_qkv_(given, cos, sin, cos_k, sin_k, interleaved, **heads)
        q, k, v = leaf.unbind(2) if form == "three" else leaf.split([4, 2, 2], dim=2)
        q, k = apply_rotary_emb_torch(q, cos[:7], sin[:7], interleaved), apply_rotary_emb_torch(k, cos_k[:7], sin_k[:7], interleaved)
        expected = torch.stack([q, k, v], dim=2) if form == "three" else torch.cat([q, k, v], dim=2)
    assert out is given
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    (grad,), (expected_grad,) = (torch.autograd.grad(result, leaf, dout) for result in (out, expected))
    torch.testing.assert_close(grad, expected_grad, atol=1e-6, rtol=1e-6)
    with pytest.raises(ShapeError, match="num_heads_q"):
        apply_rotary_emb_qkv_(torch.zeros(2, 7, 8, 24), cos, sin)
