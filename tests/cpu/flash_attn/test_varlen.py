"""flash_attn_varlen_func and its packed forms against the reference in float64, by FlashAttention's own tolerance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import flashtile.flash_attn_interface as three
from flashtile.errors import ShapeError, UnsupportedError
from flashtile.flash_attn import flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func
from flashtile.testing.pairwise import pairwise
from flashtile.testing.parity import Parity, Tensors, assert_parity

pytestmark = pytest.mark.usefixtures("one_thread")

AXES = {
    "dtype": ("float16", "bfloat16"),
    "heads": ((4, 4), (4, 1), (6, 2)),
    "head_dim": (32, 59, 64, 96, 111, 128, 256),
    "mask": ({}, {"causal": True}, {"window_size": (29, 11)}, {"causal": True, "window_size": (40, 0)}),
    "features": ({}, {"alibi": True}, {"softcap": 15.0}),
    "lengths": (((113, 40, 1), (103, 0, 17)), ((39, 1, 30), (1, 80, 30)), ((0, 64), (100, 128)), ((130,), (57,))),
}
ROWS = pairwise(AXES, seed=2)


def starts(tensors: Tensors, case: Parity) -> tuple[Any, ...]:
    assert isinstance(case.lengths_q, tuple) and isinstance(case.lengths_k, tuple)
    return tensors["cu_seqlens_q"], tensors["cu_seqlens_k"], max(case.lengths_q), max(case.lengths_k)


def leaves_of(tensors: Tensors) -> list[torch.Tensor]:
    return [tensors[name].clone().requires_grad_() for name in ("q", "k", "v")]


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_parity(row: dict[str, Any]) -> None:
    case = Parity.of(row)
    tensors = case.tensors()
    leaves = leaves_of(tensors)
    slopes = tensors.get("alibi_slopes")
    out, lse, _ = flash_attn_varlen_func(*leaves, *starts(tensors, case), **case.scores, alibi_slopes=slopes, return_attn_probs=True)
    grads = torch.autograd.grad(out, leaves, tensors["dout"])
    assert_parity(case, tensors, out.detach(), lse.detach(), grads)


@pytest.mark.parametrize("return_attn_probs", [False, True])
def test_packed_tensors_are_the_same_call(return_attn_probs: bool) -> None:
    case = Parity((20, 13), (20, 13), 40, heads=(3, 3), causal=True)
    tensors = case.tensors()
    q, k, v = leaves_of(tensors)
    args = {**case.scores, "softmax_scale": 0.2, "return_attn_probs": return_attn_probs}
    qkv, kv = torch.stack([q, k, v], dim=1).detach().requires_grad_(), torch.stack([k, v], dim=1).detach().requires_grad_()
    lengths = starts(tensors, case)
    outs = [
        flash_attn_varlen_func(q, k, v, *lengths, **args),
        flash_attn_varlen_qkvpacked_func(qkv, lengths[0], lengths[2], **args),
        flash_attn_varlen_kvpacked_func(q, kv, *lengths, **args),
    ]
    if return_attn_probs:
        assert all(torch.equal(out[1], outs[0][1]) and out[1].shape == (3, 33) for out in outs)
        outs = [out[0] for out in outs]
    assert all(torch.equal(out, outs[0]) for out in outs)
    dq, dk, dv = torch.autograd.grad(outs[0], (q, k, v), tensors["dout"])
    assert torch.equal(torch.autograd.grad(outs[1], qkv, tensors["dout"])[0], torch.stack([dq, dk, dv], dim=1))
    assert torch.equal(torch.autograd.grad(outs[2], kv, tensors["dout"])[0], torch.stack([dk, dv], dim=1))


@pytest.mark.parametrize("page_size", [1, 16, 256])
@pytest.mark.parametrize("head_dim", [64, 59])
def test_pages(page_size: int, head_dim: int) -> None:
    """cu_seqlens_k says how many keys each sequence has, not where they lie."""
    case = Parity((20, 1, 0), (37, 90, 5), head_dim, heads=(4, 2), causal=True)
    tensors = case.tensors()
    k, v, table = in_pages(tensors, (37, 90, 5), page_size)
    out, lse, _ = flash_attn_varlen_func(
        tensors["q"], k, v, *starts(tensors, case), **case.scores, return_attn_probs=True, block_table=table
    )
    assert_parity(case, tensors, out, lse, None)


def in_pages(tensors: Tensors, lengths: tuple[int, ...], page_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """k and v of packed sequences on pages in any order, NaN beside them, and the page table."""
    counts = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(0))
    table = torch.full((len(lengths), max(counts)), -1, dtype=torch.int32)
    caches = []
    for name in ("k", "v"):
        cache = torch.full((len(order), page_size, *tensors[name].shape[1:]), math.nan, dtype=tensors[name].dtype)
        taken, start = 0, 0
        for i, (count, length) in enumerate(zip(counts, lengths)):
            pages = order[taken : taken + count]
            table[i, :count] = pages.to(torch.int32)
            rows = cache[pages].flatten(0, 1)
            rows[:length] = tensors[name][start : start + length]
            cache[pages] = rows.unflatten(0, (count, page_size))
            taken, start = taken + count, start + length
        caches.append(cache)
    return caches[0], caches[1], table


@pytest.mark.parametrize("use_queries", [False, True])
@pytest.mark.parametrize("use_keys", [False, True])
def test_used_lengths(use_queries: bool, use_keys: bool) -> None:
    """Each sequence by itself, cut to what it uses; what it does not use gets out 0, lse -inf and no gradient, NaN or not."""
    lengths_q, lengths_k = (9, 12, 0, 7), (14, 9, 5, 0)
    used_q, used_k = ((5, 12, 0, 0), (14, 3, 0, 0)) if use_queries or use_keys else (lengths_q, lengths_k)
    used_q, used_k = (used_q if use_queries else lengths_q), (used_k if use_keys else lengths_k)
    case = Parity(lengths_q, lengths_k, heads=(4, 2), causal=True)
    tensors = case.tensors()
    q, k, v = leaves_of(tensors)
    out, lse = three.flash_attn_varlen_func(
        q, k, v, *starts(tensors, case), causal=True, return_attn_probs=True,
        seqused_q=torch.tensor(used_q, dtype=torch.int32) if use_queries else None,
        seqused_k=torch.tensor(used_k, dtype=torch.int32) if use_keys else None,
    )  # fmt: skip
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), tensors["dout"])
    at_q, at_k = 0, 0
    for length_q, length_k, queries, keys in zip(lengths_q, lengths_k, used_q, used_k):
        rows, columns = slice(at_q, at_q + queries), slice(at_k, at_k + keys)
        alone = {"q": tensors["q"][None, rows], "dout": tensors["dout"][None, rows]}
        alone |= {name: tensors[name][None, columns] for name in ("k", "v")}
        one = Parity(queries, keys, heads=(4, 2), causal=True, batch=1)
        grads = dq[None, rows], dk[None, columns], dv[None, columns]
        assert_parity(
            one, alone, out[None, rows].detach(), lse[None, :, rows].detach(), grads if queries and keys else None, unseen=-math.inf
        )
        rest_q, rest_k = slice(at_q + queries, at_q + length_q), slice(at_k + keys, at_k + length_k)
        assert (out[rest_q] == 0).all() and (lse[:, rest_q] == -math.inf).all() and (dq[rest_q] == 0).all()
        assert (dk[rest_k] == 0).all() and (dv[rest_k] == 0).all()
        at_q, at_k = at_q + length_q, at_k + length_k


def test_longest_lengths_in_tensors_are_read() -> None:
    case = Parity((4, 9), (4, 9), causal=True)
    tensors = case.tensors()
    leaves, (starts_q, starts_k, *_) = leaves_of(tensors), starts(tensors, case)
    expected = flash_attn_varlen_func(*leaves, starts_q, starts_k, 9, 9, causal=True)
    longest = (starts_q.diff().max(), starts_k.diff().max())
    for function in (flash_attn_varlen_func, three.flash_attn_varlen_func):
        assert torch.equal(function(*leaves, starts_q, starts_k, *longest, causal=True), expected)


def test_arguments_that_do_not_fit() -> None:
    case = Parity((4, 4), (4, 4))
    tensors = case.tensors()
    leaves, lengths = leaves_of(tensors), starts(tensors, case)
    with pytest.raises(ShapeError, match="seqused_q"):
        three.flash_attn_varlen_func(*leaves, *lengths, seqused_q=torch.tensor([1, 2, 3], dtype=torch.int32))
    for argument in ({"qv": leaves[0]}, {"k_descale": leaves[0]}, {"attention_chunk": 2}, {"num_splits": 3}, {"sm_margin": 1}):
        with pytest.raises(UnsupportedError, match=next(iter(argument))):
            three.flash_attn_varlen_func(*leaves, *lengths, **argument)


def test_a_gradient_of_keys_in_pages_is_refused_where_it_is_asked_for() -> None:
    case = Parity((4, 4), (4, 4))
    tensors = case.tensors()
    q, k, v = leaves_of(tensors)
    pages, table = (k.unflatten(0, (2, 4)), v.unflatten(0, (2, 4))), torch.tensor([[0], [1]], dtype=torch.int32)
    out, lse, _ = flash_attn_varlen_func(q, *pages, *starts(tensors, case), return_attn_probs=True, block_table=table)
    assert torch.equal(out, flash_attn_varlen_func(q, k, v, *starts(tensors, case)))
    assert out.requires_grad and not lse.requires_grad
    with pytest.raises(UnsupportedError, match="page_table"):
        out.sum().backward()
