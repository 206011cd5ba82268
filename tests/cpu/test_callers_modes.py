"""Modes that a caller's block is in, which reach no result: a default device, for tensors that lie elsewhere, and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashtile
from flashtile import PagedKV

pytestmark = pytest.mark.usefixtures("one_thread")

Q, K, V = (torch.randn(2, n, heads, 16, generator=torch.Generator().manual_seed(n)) for n, heads in ((7, 4), (9, 2), (9, 2)))
LENGTHS = torch.tensor([9, 5], dtype=torch.int32)
PADS = torch.tensor([2, 0], dtype=torch.int32)
STARTS_Q, STARTS_K = torch.tensor([0, 7, 14], dtype=torch.int32), torch.tensor([0, 9, 18], dtype=torch.int32)
TABLE = torch.tensor([[0, 1, 2], [5, 4, 3]], dtype=torch.int32)
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.0])
PAGES = torch.randn(6, 3, 2, 16, generator=torch.Generator().manual_seed(3))


def trained(**args: Any) -> tuple[torch.Tensor, ...]:
    inputs = [x.clone().requires_grad_() for x in (Q, K, V)]
    return torch.autograd.grad(flashtile.attention(*inputs, **args).square().sum(), inputs)


def appended() -> torch.Tensor:
    caches = [torch.zeros(2, 16, 2, 16, device="cpu") for _ in range(2)]
    lengths, _ = flashtile.append_kv(*caches, K, V, LENGTHS)
    return torch.cat([*(cache.flatten() for cache in caches), lengths])


def kept_in_pages() -> torch.Tensor:
    cache = PagedKV(4, 4, 2, 16, device="cpu", dtype=torch.float32)
    step = cache.append([cache.allocate(), cache.allocate()], K[:, :5], V[:, :5])
    return flashtile.decode(Q[:, :1], cache.k[0], cache.v[0], step.seqlens_k, page_table=step.page_table)


CALLS: dict[str, Callable[[], Any]] = {
    "attention": lambda: flashtile.attention(Q, K, V, causal=True),
    "window": lambda: flashtile.attention(Q, K, V, window=(2, 1), alibi_slopes=SLOPES),
    "packed": lambda: flashtile.attention_varlen(*(x.flatten(0, 1) for x in (Q, K, V)), STARTS_Q, STARTS_K, 7, 9, causal=True),
    "decode": lambda: flashtile.decode(Q[:, :3], K, V, LENGTHS, window=(3, 0), leftpad_k=PADS),
    "pages": lambda: flashtile.decode(Q[:, :1], PAGES, PAGES, LENGTHS, page_table=TABLE),
    "gradients": lambda: trained(causal=True),
    "gradients_window": lambda: trained(window=(2, 1)),
    "append": appended,
    "paged_kv": kept_in_pages,
}


@pytest.mark.parametrize("call", CALLS)
def test_a_default_device_is_no_place_for_tensors_of_another(call: str) -> None:
    expected = CALLS[call]()
    with torch.device("meta"):
        got = CALLS[call]()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_dropout_under_a_default_device() -> None:
    torch.manual_seed(3)
    expected = trained(dropout_p=0.3)
    torch.manual_seed(3)
    with torch.device("meta"):
        got = trained(dropout_p=0.3)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_no_gradient_flows_to_sinks_of_a_decode_call_without_keys() -> None:
    sinks = torch.ones(4, requires_grad=True)
    out, lse = flashtile.decode_with_lse(Q, K[:, :0], V[:, :0], torch.zeros(2, dtype=torch.int32), sinks=sinks)
    assert not out.requires_grad and not lse.requires_grad
