"""What surrounds a call on a GPU: a default device, inference mode, tensors without memory, gradients that saved what is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import flashtile
from flashtile import PagedKV
from flashtile.flash_attn.layers.rotary import apply_rotary_emb
from flashtile.integrations import sdpa


def new(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(sum(shape)), device=device).bfloat16()


def test_pages_and_cpu_tensors_under_a_default_device(device: torch.device) -> None:
    k, lengths = new(2, 5, 2, 64, device=device), torch.tensor([5, 3], dtype=torch.int32)
    on_cpu = flashtile.decode(k[:, :1].cpu(), k.cpu(), k.cpu(), lengths, window=(2, 0))
    with device:
        cache = PagedKV(4, 4, 2, 64, device=device)
        step = cache.append([cache.allocate(), cache.allocate()], k, k)
        out = flashtile.decode(k[:, :1], cache.k[0], cache.v[0], step.seqlens_k, page_table=step.page_table)
        again = flashtile.decode(k[:, :1].cpu(), k.cpu(), k.cpu(), lengths, window=(2, 0))
    torch.testing.assert_close(out, flashtile.decode(k[:, :1], k, k, step.seqlens_k))
    assert torch.equal(again, on_cpu)


def test_rotary_offsets_and_starts_of_any_strides(device: torch.device) -> None:
    x, table = new(3, 5, 2, 64, device=device), torch.rand(16, 32, device=device)
    offsets = torch.tensor([[4, 9], [0, 9], [1, 9]], dtype=torch.int32, device=device)[:, 0]
    expected = apply_rotary_emb(x, table, table, seqlen_offsets=offsets.contiguous())
    assert torch.equal(apply_rotary_emb(x, table, table, seqlen_offsets=offsets), expected)
    starts = torch.tensor([[0, 9], [5, 9], [10, 9], [15, 9]], dtype=torch.int32, device=device)[:, 0]
    packed = apply_rotary_emb(x.flatten(0, 1), table, table, seqlen_offsets=offsets, cu_seqlens=starts, max_seqlen=5)
    assert torch.equal(packed, expected.flatten(0, 1))


@pytest.mark.parametrize("seqlen_q", [1, 7])
def test_masks_made_in_inference_mode(seqlen_q: int, device: torch.device) -> None:
    q, k = new(2, 4, seqlen_q, 64, device=device), new(2, 4, 9, 64, device=device)
    with torch.inference_mode():
        mask = torch.ones(2, 1, 1, 9, dtype=torch.bool, device=device)
        for end in (6, 4):
            mask[0, ..., end:] = False
            got = sdpa.scaled_dot_product_attention(q, k, k, attn_mask=mask)
            torch.testing.assert_close(got, torch.nn.functional.scaled_dot_product_attention(q, k, k, mask), atol=2e-2, rtol=2e-2)


def test_fake_tensors_run_no_kernel(device: torch.device) -> None:
    with FakeTensorMode():
        q, lengths = torch.empty(2, 7, 4, 64, dtype=torch.bfloat16, device=device), torch.empty(2, dtype=torch.int32, device=device)
        out, lse = flashtile.attention_with_lse(q, q, q, causal=True)
        decoded = flashtile.decode(q[:, :1], q, q, lengths)
    assert all(isinstance(x, FakeTensor) and x.device == device for x in (out, lse, decoded))
    assert out.shape == q.shape and lse.shape == (2, 4, 7) and decoded.shape == (2, 1, 4, 64)
    torch.cuda.synchronize()  # a kernel that was handed null pointers would say so here


def _append(x: torch.Tensor) -> None:
    lengths = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
    one = new(x.shape[0], 1, *x.shape[2:], device=x.device)
    flashtile.append_kv(x, x.clone(), one, one, lengths)


def _decode(x: torch.Tensor) -> None:
    lengths = torch.full((x.shape[0],), x.shape[1], dtype=torch.int32, device=x.device)
    flashtile.decode(x.clone(), x.clone(), x.clone(), lengths, out=x)


def _rotary(x: torch.Tensor) -> None:
    table = torch.full((9, 32), 0.5, device=x.device)
    apply_rotary_emb(x, table, table, inplace=True)


@pytest.mark.parametrize("write", [_append, _decode, _rotary, lambda x: flashtile.attention(x.clone(), x.clone(), x.clone(), out=x)])
def test_who_saved_what_is_written_gets_an_error(write: Callable[[torch.Tensor], object], device: torch.device) -> None:
    """Whether the call is repeated from its record, as the last one is, or not."""
    for _ in range(5):
        x, weight = new(2, 6, 2, 64, device=device), torch.ones(64, device=device, dtype=torch.bfloat16, requires_grad=True)
        product = (x * weight).sum()
        write(x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
