"""flash_attn_func and its packed forms against the reference in float64, by FlashAttention's own tolerance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import flashtile.flash_attn_interface as three
from flashtile.errors import ArgumentError, DtypeError, ShapeError, UnsupportedError
from flashtile.flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func, flash_attn_with_kvcache
from flashtile.testing.pairwise import pairwise
from flashtile.testing.parity import Parity, assert_parity

pytestmark = pytest.mark.usefixtures("one_thread")

AXES = {
    "dtype": ("float16", "bfloat16", "float32"),
    "heads": ((6, 6), (6, 1), (6, 2)),
    "head_dim": (32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256),
    "mask": ({}, {"causal": True}, {"window_size": (29, 11)}, {"causal": True, "window_size": (40, -1)}, {"window_size": (-1, 7)}),
    "features": ({}, {"alibi": True}, {"softcap": 15.0}),
    "lengths": ((113, 203), (239, 1), (1, 147), (108, 256), (128, 113), (3, 79)),
}
ROWS = pairwise(AXES, seed=1)


def leaves_of(tensors: dict[str, torch.Tensor], *names: str) -> list[torch.Tensor]:
    return [tensors[name].clone().requires_grad_() for name in names]


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_parity(row: dict[str, Any]) -> None:
    case = Parity.of(row)
    tensors = case.tensors()
    q, k, v = leaves_of(tensors, "q", "k", "v")
    out, lse, probs = flash_attn_func(q, k, v, **case.scores, alibi_slopes=tensors.get("alibi_slopes"), return_attn_probs=True)
    assert probs is None
    grads = torch.autograd.grad(out, (q, k, v), tensors["dout"])
    assert_parity(case, tensors, out.detach(), lse.detach(), grads)


@pytest.mark.parametrize("row", [row for row in ROWS if "alibi" not in row["features"]][::2])
def test_parity_of_the_third_generation(row: dict[str, Any]) -> None:
    case = Parity.of(row)
    tensors = case.tensors()
    q, k, v = leaves_of(tensors, "q", "k", "v")
    out, lse = three.flash_attn_func(q, k, v, **case.scores, return_attn_probs=True)
    grads = torch.autograd.grad(out, (q, k, v), tensors["dout"])
    assert_parity(case, tensors, out.detach(), lse.detach(), grads, unseen=-math.inf)


@pytest.mark.parametrize("head_dim", [64, 59])
@pytest.mark.parametrize("return_attn_probs", [False, True])
def test_packed_tensors_are_the_same_call(head_dim: int, return_attn_probs: bool) -> None:
    case = Parity(33, 33, head_dim, heads=(4, 4), causal=True)
    tensors = case.tensors()
    args = {**case.scores, "return_attn_probs": return_attn_probs, "softmax_scale": 0.3, "deterministic": True}
    q, k, v = leaves_of(tensors, "q", "k", "v")
    qkv = torch.stack([q.detach(), k.detach(), v.detach()], dim=2).requires_grad_()
    kv = torch.stack([k.detach(), v.detach()], dim=2).requires_grad_()
    expected = flash_attn_func(q, k, v, **args)
    outs = [expected, flash_attn_qkvpacked_func(qkv, **args), flash_attn_kvpacked_func(q, kv, **args)]
    if return_attn_probs:
        assert all(torch.equal(out[1], expected[1]) for out in outs)
        outs = [out[0] for out in outs]
    assert all(torch.equal(out, outs[0]) for out in outs)
    dq, dk, dv = torch.autograd.grad(outs[0], (q, k, v), tensors["dout"])
    (dqkv,) = torch.autograd.grad(outs[1], qkv, tensors["dout"])
    (dkv,) = torch.autograd.grad(outs[2], kv, tensors["dout"])
    assert torch.equal(dqkv, torch.stack([dq, dk, dv], dim=2))
    assert torch.equal(dkv, torch.stack([dk, dv], dim=2))


def test_heads_beside_each_other_in_one_tensor() -> None:
    case = Parity(17, 17, 64, heads=(6, 2), causal=True)
    tensors = case.tensors()
    qkv = torch.cat([tensors[name] for name in ("q", "k", "v")], dim=2)
    out = three.flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=6)
    assert torch.equal(out, three.flash_attn_func(tensors["q"], tensors["k"], tensors["v"], causal=True))
    stacked = torch.stack([tensors["k"], tensors["k"], tensors["v"]], dim=2)
    alike = three.flash_attn_func(tensors["k"], tensors["k"], tensors["v"])
    assert torch.equal(three.flash_attn_qkvpacked_func(stacked), alike)
    with pytest.raises(ShapeError, match="num_heads_q"):
        three.flash_attn_qkvpacked_func(qkv, causal=True)


def test_values_of_another_width() -> None:
    case = Parity(40, 70, 96, head_dim_v=37, causal=True)
    tensors = case.tensors()
    q, k, v = leaves_of(tensors, "q", "k", "v")
    out = three.flash_attn_func(q, k, v, causal=True)
    assert_parity(case, tensors, out.detach(), None, torch.autograd.grad(out, (q, k, v), tensors["dout"]))


def test_layouts_without_a_contiguous_last_dimension_are_copied() -> None:
    tensors = Parity(20, 30).tensors()
    strided = {name: tensors[name].transpose(1, 3).contiguous().transpose(1, 3) for name in ("q", "k", "v")}
    assert strided["q"].stride(-1) != 1
    assert torch.equal(flash_attn_func(**strided), flash_attn_func(*(tensors[name] for name in ("q", "k", "v"))))


def test_a_gradient_flows_through_lse() -> None:
    """FlashAttention drops it in silence."""
    q, k, v = leaves_of(Parity(9, 12, dtype="float32").tensors(), "q", "k", "v")
    _, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    (dq,) = torch.autograd.grad(lse.sum(), q)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 64**-0.5
    seen = torch.ones(9, 12, dtype=torch.bool).tril(3)
    (expected,) = torch.autograd.grad(scores.masked_fill(~seen, -math.inf).logsumexp(-1).sum(), q)
    torch.testing.assert_close(dq, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keys", [0, 5])
def test_lse_of_queries_that_see_no_key(keys: int) -> None:
    tensors = Parity(8, keys).tensors()
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    blind = 8 - keys
    assert (out[:, :blind] == 0).all() and (lse[..., :blind] == math.inf).all() and lse[..., blind:].isfinite().all()
    out, lse = three.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out[:, :blind] == 0).all() and (lse[..., :blind] == (-math.inf if keys else math.inf)).all()


@pytest.mark.parametrize("causal", [False, True])
def test_dropout_keeps_the_share_that_it_should_and_its_gradient_knows_which(causal: bool) -> None:
    """v is the identity, so that out is the softmax after dropout."""
    p, n = 0.17, 64
    q, k = (tensor.float() for tensor in (Parity(n, n, heads=(3, 3)).tensors()[name] for name in ("q", "k")))
    v = torch.eye(n)[None, :, None, :].expand(2, n, 3, n).contiguous().requires_grad_()
    torch.manual_seed(3)
    out, lse, _ = flash_attn_func(q, k, v, dropout_p=p, causal=causal, return_attn_probs=True)
    whole, whole_lse, _ = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    torch.testing.assert_close(lse, whole_lse)
    seen = whole.detach() > 0
    kept = (out.detach() > 0)[seen]
    share = kept.double().mean().item()
    assert abs(share - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())
    torch.testing.assert_close(out.detach()[seen][kept] * (1 - p), whole.detach()[seen][kept], atol=1e-6, rtol=1e-4)
    dout = torch.randn(out.shape)
    (dv,) = torch.autograd.grad(out, v, dout)
    torch.testing.assert_close(dv, torch.einsum("bqhk,bqhd->bkhd", out.detach(), dout), atol=1e-4, rtol=1e-4)
    torch.manual_seed(3)
    again = flash_attn_func(q, k, v, dropout_p=p, causal=causal)
    assert torch.equal(again, out)
    assert not torch.equal(flash_attn_func(q, k, v, dropout_p=p, causal=causal), out)


def test_dropout_of_packed_tensors_is_drawn_alike() -> None:
    tensors = Parity(16, 16).tensors()
    q, k, v = (tensors[name] for name in ("q", "k", "v"))
    torch.manual_seed(1)
    expected = flash_attn_func(q, k, v, 0.3)
    torch.manual_seed(1)
    assert torch.equal(flash_attn_qkvpacked_func(torch.stack([q, k, v], dim=2), 0.3), expected)


@pytest.mark.parametrize(
    "argument",
    [{"qv": torch.zeros(1)}, {"q_descale": torch.ones(1)}, {"k_descale": torch.ones(1)}, {"v_descale": torch.ones(1)},
     {"attention_chunk": 64}, {"num_splits": 2}, {"sm_margin": 8}],
    ids=lambda argument: next(iter(argument)),
)  # fmt: skip
def test_what_has_no_counterpart_is_refused(argument: dict[str, Any]) -> None:
    tensors = Parity(4, 4).tensors()
    (name,) = argument
    with pytest.raises(UnsupportedError, match=name):
        three.flash_attn_func(tensors["q"], tensors["k"], tensors["v"], **argument)
    if name not in ("qv", "num_splits"):
        with pytest.raises(UnsupportedError, match=name):
            three.flash_attn_qkvpacked_func(torch.stack([tensors["q"]] * 3, dim=2), **argument)


@pytest.mark.parametrize("window_size", [(None, 3), (-5, 3), torch.tensor([-1, 3])])
def test_sides_without_a_bound(window_size: tuple[Any, int]) -> None:
    q, k, v = (Parity(9, 9).tensors()[name] for name in ("q", "k", "v"))
    assert torch.equal(flash_attn_func(q, k, v, window_size=window_size), flash_attn_func(q, k, v, window_size=(-1, 3)))


@pytest.mark.parametrize("hint", [{"num_splits": 0}, {"num_splits": 1}, {"pack_gqa": True}, {"pack_gqa": False}])
def test_hints_change_no_result(hint: dict[str, Any]) -> None:
    tensors = Parity(4, 4).tensors()
    q, k, v = (tensors[name] for name in ("q", "k", "v"))
    assert torch.equal(three.flash_attn_func(q, k, v, **hint), three.flash_attn_func(q, k, v))


def test_compilers_see_one_graph() -> None:
    tensors = Parity(12, 12, 36, causal=True).tensors()
    q, k, v = leaves_of(tensors, "q", "k", "v")
    compiled = torch.compile(lambda *args: flash_attn_func(*args, causal=True), fullgraph=True, backend="aot_eager")
    out = compiled(q, k, v)
    assert torch.equal(out, flash_attn_func(q, k, v, causal=True))
    grads = torch.autograd.grad(out, (q, k, v), tensors["dout"])
    assert_parity(Parity(12, 12, 36, causal=True), tensors, out.detach(), None, grads)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"q": None}, DtypeError, "q: expected a torch.Tensor, got NoneType"),
        ({"window_size": 5}, ArgumentError, "window_size: expected a pair"),
        ({"window_size": (3,)}, ArgumentError, "window_size: expected a pair"),
        ({"q": torch.zeros(1, 2, 2, 0), "k": torch.zeros(1, 2, 2, 0)}, ShapeError, "head_dim: expected a multiple of 8"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], match: str) -> None:
    q = torch.zeros(1, 2, 2, 16)
    with pytest.raises(error, match=match):
        flash_attn_func(**{"q": q, "k": q, "v": q} | change)


@pytest.mark.parametrize("length", [-3, 1.5, [1, 2]])
def test_a_wrong_length_of_the_cache_is_named(length: Any) -> None:
    q = torch.zeros(2, 1, 2, 16)
    with pytest.raises(ArgumentError, match="cache_seqlens: expected an int that is not negative"):
        flash_attn_with_kvcache(q, q, q, cache_seqlens=length)


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_a_cache_that_is_no_tensor_is_named(name: str) -> None:
    q = torch.zeros(2, 1, 2, 16)
    with pytest.raises(ArgumentError, match=f"{name}: expected a tensor .* got None"):
        flash_attn_with_kvcache(**{"q": q, "k_cache": q, "v_cache": q} | {name: None})
