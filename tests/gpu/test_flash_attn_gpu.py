"""The drop-in on a GPU, by FlashAttention's own tolerance: its functions, caches, what ring attention calls, rotary embeddings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import flashtile.flash_attn_interface as three
from flashtile.flash_attn import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flashtile.flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward, _get_block_size_n
from flashtile.flash_attn.layers.rotary import apply_rotary_emb
from flashtile.kernels import cpu_rotary
from flashtile.testing.pairwise import pairwise
from flashtile.testing.parity import Parity, assert_parity
from flashtile.testing.parity_cache import Layout, assert_cache_parity, placed

MASKS = ({}, {"causal": True}, {"window_size": (129, 40)}, {"causal": True, "window_size": (300, -1)})
FEATURES = ({}, {"alibi": True}, {"softcap": 15.0})
DENSE = pairwise(
    {
        "lengths": ((1023, 1024), (1024, 1023), (2048, 2048), (113, 203), (239, 1), (799, 3), (64, 128)),
        "head_dim": (40, 59, 64, 96, 111, 128, 192, 256),
        "mask": MASKS,
        "features": FEATURES,
        "heads": ((6, 6), (6, 1), (6, 2)),
        "dtype": ("float16", "bfloat16"),
    },
    seed=5,
)
PACKED = pairwise(
    {
        "lengths": (((1023, 1, 400), (1024, 77, 400)), ((239, 0, 512), (1, 80, 700)), ((130, 2000), (57, 2000))),
        "head_dim": (59, 64, 128, 256),
        "mask": MASKS,
        "features": FEATURES,
        "heads": ((6, 6), (6, 2)),
    },
    seed=6,
)
CACHED = pairwise(
    {
        "lengths": ((1, 2048), (3, 2048), (65, 1024), (700, 1024)),
        "head_dim": (59, 64, 128, 256),
        "mask": MASKS,
        "features": FEATURES,
        "heads": ((6, 6), (8, 1), (6, 2)),
        "layout": ("full", "int", "lengths", "batch index", 1, 16, 256),
        "num_splits": (0, 1, 5),
    },
    seed=7,
)


def leaves_of(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [tensors[name].clone().requires_grad_() for name in ("q", "k", "v")]


@pytest.mark.parametrize("row", DENSE, ids=range(len(DENSE)))
def test_dense(row: dict[str, Any], device: torch.device) -> None:
    case = Parity.of(row)
    tensors = case.tensors(device)
    leaves = leaves_of(tensors)
    out, lse, _ = flash_attn_func(*leaves, **case.scores, alibi_slopes=tensors.get("alibi_slopes"), return_attn_probs=True)
    assert_parity(case, tensors, out.detach(), lse.detach(), torch.autograd.grad(out, leaves, tensors["dout"]))
    if not case.alibi:
        alike, lse = three.flash_attn_func(*leaves, **case.scores, return_attn_probs=True)
        assert torch.equal(alike, out) and not (lse == math.inf).any()


@pytest.mark.parametrize("row", PACKED, ids=range(len(PACKED)))
def test_packed(row: dict[str, Any], device: torch.device) -> None:
    case = Parity.of(row)
    tensors = case.tensors(device)
    leaves = leaves_of(tensors)
    assert isinstance(case.lengths_q, tuple) and isinstance(case.lengths_k, tuple)
    starts = tensors["cu_seqlens_q"], tensors["cu_seqlens_k"], max(case.lengths_q), max(case.lengths_k)
    slopes = tensors.get("alibi_slopes")
    out, lse, _ = flash_attn_varlen_func(*leaves, *starts, **case.scores, alibi_slopes=slopes, return_attn_probs=True)
    assert_parity(case, tensors, out.detach(), lse.detach(), torch.autograd.grad(out, leaves, tensors["dout"]))


@pytest.mark.parametrize("row", CACHED, ids=range(len(CACHED)))
def test_caches(row: dict[str, Any], device: torch.device) -> None:
    case = Parity.of({name: value for name, value in row.items() if name not in ("layout", "num_splits")})
    cache = placed(case, row["layout"], device)
    q, k, v, slopes = (cache.tensors.get(name) for name in ("q", "k", "v", "alibi_slopes"))
    args = case.scores | {"num_splits": row["num_splits"], "return_softmax_lse": True}
    out, lse = flash_attn_with_kvcache(q, k, v, alibi_slopes=slopes, **cache.given, **args)
    assert_cache_parity(case, cache, out, lse, math.inf)
    if slopes is None:
        out, lse, *_ = three.flash_attn_with_kvcache(q, k, v, **cache.given_to_three(), **args)
        assert_cache_parity(case, cache, out, lse, -math.inf)


def test_used_queries(device: torch.device) -> None:
    case = Parity((300, 40), (500, 64), heads=(4, 2), causal=True)
    tensors = case.tensors(device)
    used = torch.tensor([129, 40], dtype=torch.int32, device=device)
    starts = tensors["cu_seqlens_q"], tensors["cu_seqlens_k"], 300, 500
    q, k, v = leaves_of(tensors)
    out = three.flash_attn_varlen_func(q, k, v, *starts, causal=True, seqused_q=used)
    grads = torch.autograd.grad(out, (q, k, v), tensors["dout"])
    assert (out[129:300] == 0).all() and (grads[0][129:300] == 0).all()
    alone = {name: tensors[name][None, :n] for name, n in (("q", 129), ("dout", 129), ("k", 500), ("v", 500))}
    one = Parity(129, 500, heads=(4, 2), causal=True, batch=1)
    assert_parity(one, alone, out[None, :129].detach(), None, (grads[0][None, :129], grads[1][None, :500], grads[2][None, :500]))


@pytest.mark.parametrize("queries", [1, 700])
@pytest.mark.parametrize("layout", ["int", "lengths", "batch index", 16])
def test_calls_over_caches_wait_for_nothing_and_are_captured(queries: int, layout: Layout, device: torch.device) -> None:
    case = Parity(queries, 1024, 128, heads=(32, 8), causal=True)
    cache = placed(case, layout, device)
    q, k, v = (cache.tensors[name] for name in ("q", "k", "v"))
    expected = flash_attn_with_kvcache(q, k, v, causal=True, **cache.given)
    try:
        torch.cuda.set_sync_debug_mode("error")
        again = flash_attn_with_kvcache(q, k, v, causal=True, **cache.given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_with_kvcache(q, k, v, causal=True, **cache.given)
    graph.replay()
    assert torch.equal(again, expected) and torch.equal(out, expected)


@pytest.mark.parametrize("queries", [1, 700])
def test_plans_made_ahead(queries: int, device: torch.device) -> None:
    case = Parity(queries, 1024, 128, heads=(32, 8), causal=True)
    cache = placed(case, "lengths", device)
    plan = three.get_scheduler_metadata(2, queries, 1024, 32, 8, 128, cache.given["cache_seqlens"], causal=True)
    q, k, v = (cache.tensors[name] for name in ("q", "k", "v"))
    out, lse, *_ = three.flash_attn_with_kvcache(
        q, k, v, causal=True, scheduler_metadata=plan, return_softmax_lse=True, **cache.given_to_three()
    )
    assert_cache_parity(case, cache, out, lse, -math.inf)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_below_the_public_functions(head_dim: int, dropout_p: float, device: torch.device) -> None:
    """Gradients land in parts of one packed tensor, and are those of the public function."""
    case = Parity(300, 300, head_dim, heads=(4, 4), causal=True)
    tensors = case.tensors(device)
    qkv = torch.stack([tensors[name] for name in ("q", "k", "v")], dim=2).requires_grad_()
    torch.manual_seed(0)
    expected = flash_attn_qkvpacked_func(qkv, dropout_p, causal=True, deterministic=True)
    (expected_grad,) = torch.autograd.grad(expected, qkv, tensors["dout"])
    q, k, v = qkv.detach().unbind(2)
    below = head_dim**-0.5, True, -1, -1, 0.0, None
    torch.manual_seed(0)
    out, lse, _, rng_state = _flash_attn_forward(q, k, v, dropout_p, *below, False)
    grads = torch.full_like(qkv, math.nan)
    _flash_attn_backward(tensors["dout"], q, k, v, out, lse, *grads.detach().unbind(2), dropout_p, *below, True, rng_state)
    assert torch.equal(out, expected)
    torch.testing.assert_close(grads.detach(), expected_grad, atol=2e-2, rtol=2e-2)
    assert _get_block_size_n(device, head_dim, bool(dropout_p), True) >= 16


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dims", [(64, 128), (16, 64), (20, 59)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_rotary(interleaved: bool, dims: tuple[int, int], packed: bool, inplace: bool, device: torch.device) -> None:
    pairs, dim = dims
    x = torch.randn(*((300,) if packed else (2, 150)), 6, dim).to(torch.bfloat16)
    angles = torch.outer(torch.arange(160), 100.0 ** (-torch.arange(pairs) / pairs))
    cos, sin = angles.cos(), angles.sin()
    offsets = torch.tensor([3, 40], dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 130, 290], dtype=torch.int32) if packed else None
    expected = torch.empty_like(x)
    cpu_rotary.rotate(x, expected, cos, sin, offsets, 0, cu_seqlens, 160, interleaved, False)
    leaf = x.to(device).requires_grad_()
    lengths = {"cu_seqlens": cu_seqlens.to(device), "max_seqlen": 160} if cu_seqlens is not None else {}
    out = apply_rotary_emb(leaf * 1.0, cos.to(device), sin.to(device), interleaved, inplace, offsets.to(device), **lengths)
    torch.testing.assert_close(out.detach().cpu(), expected, atol=1e-6, rtol=2.0**-7)
    dout = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, leaf, dout)
    back = torch.empty_like(x)
    cpu_rotary.rotate(dout.cpu(), back, cos, sin, offsets, 0, cu_seqlens, 160, interleaved, True)
    torch.testing.assert_close(grad.cpu(), back, atol=1e-6, rtol=2.0**-7)
