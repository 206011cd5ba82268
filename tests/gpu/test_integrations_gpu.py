"""Clients on a GPU: torch's scaled_dot_product_attention, models of transformers, and PagedKV."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashtile import PagedKV, attention, decode
from flashtile.integrations import flash_backend, sdpa
from flashtile.testing.tiny_models import FAMILIES, make_model

TOKENS = 24
needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed here")


def tensors(device: torch.device, heads_kv: int = 8, seqlen_q: int = 300, seqlen_k: int = 300, dim: int = 64) -> list[torch.Tensor]:
    shapes = (2, 8, seqlen_q, dim), (2, heads_kv, seqlen_k, dim), (2, heads_kv, seqlen_k, dim)
    torch.manual_seed(seqlen_q + seqlen_k)
    return [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm())


def obvious(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, mask: torch.Tensor | None = None) -> torch.Tensor:
    """In the tensors' own dtype, step by step; a causal mask begins at the first query and key."""
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, dim=1).transpose(-1, -2) * q.shape[-1] ** -0.5
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ v.repeat_interleave(group, dim=1)


def check(run: Any, inputs: list[torch.Tensor], is_causal: bool) -> None:
    """Result and gradients of ``run`` are as near those in float64 as the obvious computation in bfloat16, within a factor of 2."""
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    dout = torch.randn((*inputs[0].shape[:-1], inputs[2].shape[-1]), device=inputs[0].device, dtype=torch.float64)
    results = []
    for call, leaves in ((partial(obvious, is_causal=is_causal), doubles), (partial(obvious, is_causal=is_causal), inputs), (run, inputs)):
        out = call(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))])
    for name, exact, plainly, got in zip(("out", "dq", "dk", "dv"), *results):
        assert error(got, exact) <= 2 * error(plainly, exact), name


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(300, 300), (100, 257), (257, 100)])
def test_routed(device: torch.device, seqlen_q: int, seqlen_k: int, is_causal: bool) -> None:
    def run(*inputs: torch.Tensor) -> torch.Tensor:
        with sdpa.routed():
            return F.scaled_dot_product_attention(*inputs, is_causal=is_causal)

    check(run, tensors(device, seqlen_q=seqlen_q, seqlen_k=seqlen_k), is_causal)


@torch.no_grad()
@pytest.mark.parametrize("seqlen_q", [1, 100])
def test_routed_padding(device: torch.device, seqlen_q: int) -> None:
    q, k, v = tensors(device, seqlen_q=seqlen_q)
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool, device=device)
    mask[0, ..., 250:] = False
    mask[1, ..., :40] = False
    with sdpa.routed():
        got = F.scaled_dot_product_attention(q, k, v, mask)
    exact = obvious(q.double(), k.double(), v.double(), False, mask)
    assert error(got, exact) <= 2 * error(obvious(q, k, v, False, mask), exact)


@pytest.fixture
def active() -> Any:
    """flashtile in torch's flash backend."""
    if importlib.util.find_spec("torch.nn.attention._registry") is None:
        pytest.skip("this torch takes no flash implementations of others")
    sdpa.register_flash_implementation()
    torch.nn.attention.activate_flash_attention_impl(flash_backend.NAME)
    yield
    torch.nn.attention.restore_flash_attention_impl()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("heads_kv", "dim"), [(8, 64), (2, 128), (8, 40)])
def test_flash_implementation(
    device: torch.device, active: None, monkeypatch: pytest.MonkeyPatch, heads_kv: int, dim: int, is_causal: bool, compiled: bool
) -> None:
    taken = []
    real = flash_backend.ops.forward.forward
    monkeypatch.setattr(flash_backend.ops.forward, "forward", lambda *args: (taken.append(args[0].shape), real(*args))[1])

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)

    torch._dynamo.reset()
    check(torch.compile(run) if compiled else run, tensors(device, heads_kv, dim=dim), is_causal)
    assert taken, "torch gave the call to another backend"


@needs_transformers
@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_in_float32(device: torch.device, family: str, cache: str, padding: str) -> None:
    import flashtile.integrations.transformers as integration

    integration.register()
    model = make_model(family).to(device)
    ids = torch.randint(2, 64, (3, 40), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :17] = 0
    more = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    written = []
    for name in ("eager", "flashtile"):
        model.set_attn_implementation(name)
        written.append(model.generate(ids * mask, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, **more))
    assert torch.equal(*written)


@needs_transformers
@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_bfloat16(device: torch.device, family: str, padding: str) -> None:
    """A prompt, and steps whose tokens are given: as near float32 as eager attention in bfloat16, within a factor of 2."""
    import transformers

    import flashtile.integrations.transformers as integration

    integration.register()
    ids = torch.randint(2, 64, (3, 48), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :17] = 0

    def logits(model: Any) -> torch.Tensor:
        past = transformers.DynamicCache(config=model.config)
        parts = []
        for first, last in ((0, 40), *((i, i + 1) for i in range(40, 48))):
            seen = {} if padding == "none" else {"attention_mask": mask[:, :last]}
            parts.append(model((ids * mask)[:, first:last], past_key_values=past, **seen).logits)
        return torch.cat(parts, dim=1)[mask.bool()]

    model = make_model(family).to(device)
    exact = logits(model)  # in float32: its errors are a hundredth of bfloat16's
    model.to(torch.bfloat16)
    plainly = logits(model)
    model.set_attn_implementation("flashtile")
    assert error(logits(model), exact) <= 2 * error(plainly, exact)


@needs_transformers
@torch.no_grad()
def test_compiled_generation(device: torch.device) -> None:
    """Transformers compiles steps over a static cache, CUDA graphs and all."""
    import flashtile.integrations.transformers as integration

    integration.register()
    model = make_model("llama", "flashtile").to(device)
    ids = torch.randint(2, 64, (2, 40), generator=torch.Generator().manual_seed(1)).to(device)
    expected = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=TOKENS, do_sample=False, cache_implementation="static"), expected)


@torch.no_grad()
def test_paged_cache(device: torch.device) -> None:
    like = {"device": device, "dtype": torch.bfloat16}
    cache = PagedKV(num_pages=64, page_size=16, num_heads_kv=2, head_dim=64, **like)
    first, second = cache.allocate(), cache.allocate()
    k, v = torch.randn(2, 150, 2, 64, **like)
    cache.append([first, second], k, v, [100, 50])
    fork = cache.fork(first)
    new_k, new_v = torch.randn(2, 3, 1, 2, 64, **like)
    step = cache.append([first, second, fork], new_k, new_v)
    q = torch.randn(3, 1, 8, 64, **like)
    got = decode(q, cache.k[0], cache.v[0], step.seqlens_k, page_table=step.page_table, max_seqlen_k=step.max_seqlen_k)
    for i, own in enumerate((slice(0, 100), slice(100, 150), slice(0, 100))):
        keys, values = (torch.cat([x[own], new[i]])[None] for x, new in ((k, new_k), (v, new_v)))
        torch.testing.assert_close(got[i : i + 1], attention(q[i : i + 1], keys, values), atol=1e-2, rtol=1e-2)
