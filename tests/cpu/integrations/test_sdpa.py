"""torch's scaled_dot_product_attention by flashtile: results and gradients are torch's own, in float64."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flashtile.errors import UnsupportedError
from flashtile.integrations import flash_backend, sdpa

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "_SAID", set())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that calls took: names of flashtile's functions."""
    taken: list[str] = []
    for name in ("dense", "spanned", "chosen"):
        real = getattr(sdpa, name)
        monkeypatch.setattr(sdpa, name, lambda *args, real=real, name=name: (taken.append(name), real(*args))[1])
    return taken


def tensors(lead: tuple[int, ...] = (2,), heads: int = 4, heads_kv: int = 4, seqlen_q: int = 7, seqlen_k: int = 7, dim: int = 16) -> Any:
    generator = torch.Generator().manual_seed(seqlen_q * 31 + seqlen_k)
    shapes = (*lead, heads, seqlen_q, dim), (*lead, heads_kv, seqlen_k, dim), (*lead, heads_kv, seqlen_k, dim)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def compare(*inputs: torch.Tensor, **args: Any) -> torch.Tensor:
    """Result and gradients in a routed block, against torch's in float64; returns the result."""
    mine = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.double().requires_grad_() for x in inputs]
    with sdpa.routed():
        got = F.scaled_dot_product_attention(*mine, **args)
    expected = F.scaled_dot_product_attention(*theirs, **args)
    assert got.shape == expected.shape and got.dtype == inputs[0].dtype
    torch.testing.assert_close(got.double(), expected, **CLOSE)
    dout = torch.randn(got.shape, generator=torch.Generator().manual_seed(5))
    for mine_x, theirs_x, gradient in zip(mine, theirs, torch.autograd.grad(got, mine, dout)):
        torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, theirs_x, dout.double(), retain_graph=True)[0], **CLOSE)
        assert mine_x.grad is None
    with sdpa.routed(), torch.no_grad():  # decode, where there are few queries
        torch.testing.assert_close(F.scaled_dot_product_attention(*inputs, **args).double(), expected, **CLOSE)
    return got


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(7, 7), (5, 9), (9, 5), (1, 6), (6, 1)])
def test_results_and_gradients_are_torchs(seqlen_q: int, seqlen_k: int, is_causal: bool, calls: list[str]) -> None:
    """A causal mask begins at the first query and key, whatever the lengths."""
    compare(*tensors(seqlen_q=seqlen_q, seqlen_k=seqlen_k), is_causal=is_causal)
    assert calls == ["dense", "dense"]


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)])
def test_leading_dimensions(lead: tuple[int, ...], calls: list[str]) -> None:
    compare(*tensors(lead))
    assert calls == ["dense", "dense"]


def test_grouped_heads_scale_and_odd_head_dims(calls: list[str]) -> None:
    compare(*tensors(heads_kv=2, dim=13), enable_gqa=True, scale=0.4)
    q, k, v = tensors()
    compare(q, k, v[..., :9].contiguous())
    compare(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)), is_causal=True)
    assert len(calls) == 6


PADS = torch.tensor([[True] * 5 + [False] * 4, [False] * 2 + [True] * 7])


@pytest.mark.parametrize("shape", [(2, 1, 1, 9), "expanded", (1, 9)])
@pytest.mark.parametrize("seqlen_q", [1, 7])
def test_padding_masks(shape: tuple[int, ...] | str, seqlen_q: int, calls: list[str]) -> None:
    if shape == "expanded":
        mask = PADS[:, None, None].expand(2, 4, seqlen_q, 9)
    else:
        mask = PADS[: 2 if shape[0] == 2 else 1].reshape(shape)  # type: ignore[index]
    compare(*tensors(seqlen_q=seqlen_q, seqlen_k=9), attn_mask=mask)
    assert calls == (["spanned", "spanned"] if seqlen_q > 1 else ["spanned", "chosen"])


@torch.no_grad()
@pytest.mark.parametrize("seqlen_q", [1, 7])
def test_autocast(seqlen_q: int) -> None:
    """Results have autocast's dtype, by whichever way; a cache of that dtype goes with a query in float32."""
    q, k, v = tensors(seqlen_q=seqlen_q, seqlen_k=9)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.scaled_dot_product_attention(q, k, v)
        with sdpa.routed():
            for keys in (torch.float32, torch.bfloat16):
                got = F.scaled_dot_product_attention(q, k.to(keys), v.to(keys))
                assert got.dtype == torch.bfloat16
                torch.testing.assert_close(got, expected, atol=1e-2, rtol=1e-2)
    with sdpa.routed(), pytest.warns(UserWarning, match="dtypes that differ"), pytest.raises(RuntimeError, match="dtype"):
        F.scaled_dot_product_attention(q, k.bfloat16(), v.bfloat16())


def test_a_mask_without_padding_costs_nothing(calls: list[str]) -> None:
    compare(*tensors(), attn_mask=torch.ones(2, 1, 1, 7, dtype=torch.bool))
    assert calls == ["dense", "dense"]


def test_a_mask_that_is_changed_in_place_is_read_again() -> None:
    inputs = tensors(seqlen_k=9)
    mask = PADS[:, None, None].clone()
    compare(*inputs, attn_mask=mask)
    mask[0, ..., 4] = False
    compare(*inputs, attn_mask=mask)


def test_masks_made_in_inference_mode() -> None:
    q, k, v = tensors(seqlen_k=9)
    with torch.inference_mode():
        mask = PADS[:, None, None].clone()
        for there in (False, True):
            mask[0, ..., 4] = there
            got = sdpa.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, mask), **CLOSE)


def test_another_threads_mask_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    mask, others = torch.ones(1, 1, 1, 9, dtype=torch.bool), torch.zeros(4, 2, dtype=torch.int32)
    facts = (torch.Size((1, 9)), 7, mask._version)

    def looked_at() -> torch.Tensor:
        monkeypatch.setattr(sdpa, "_last", (lambda: others, facts, others))
        return mask

    monkeypatch.setattr(sdpa, "_last", (looked_at, facts, None))
    assert sdpa._spans(mask, mask[0, 0], 7) is None


def test_gaps_are_read_by_one_query_and_left_to_torch_by_several(calls: list[str]) -> None:
    gaps = torch.tensor([True, False, True, True, False, True, True])[None]
    q, k, v = tensors()
    with torch.no_grad():
        got = sdpa.scaled_dot_product_attention(q[..., :1, :], k, v, gaps)
        torch.testing.assert_close(got, F.scaled_dot_product_attention(q[..., :1, :], k, v, gaps), **CLOSE)
    assert calls == ["chosen"]
    with pytest.warns(UserWarning, match="gaps"):
        compare(q, k, v, attn_mask=gaps)
    assert calls == ["chosen"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attn_mask": torch.zeros(7, 7)}, "added to scores"),
        ({"attn_mask": torch.ones(7, 7, dtype=torch.bool).tril()}, "queries x keys"),
        ({"attn_mask": torch.ones(4, 1, 7, dtype=torch.bool)}, "of heads"),
    ],
)
def test_other_masks_are_torchs_and_said_once(change: dict[str, Any], reason: str, calls: list[str]) -> None:
    inputs = tensors()
    with sdpa.routed():
        with pytest.warns(UserWarning, match=reason):
            got = F.scaled_dot_product_attention(*inputs, **change)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            F.scaled_dot_product_attention(*inputs, **change)
    assert torch.equal(got, F.scaled_dot_product_attention(*inputs, **change))
    assert not calls


@pytest.mark.parametrize("call", ["float64", "unlike batches", "no heads", "negated", "vmap"])
def test_what_else_is_torchs(call: str, calls: list[str]) -> None:
    q, k, v = tensors()
    run: Any = F.scaled_dot_product_attention
    if call == "float64":
        q, k, v = q.double(), k.double(), v.double()
    elif call == "unlike batches":
        k, v = k[:1], v[:1]
    elif call == "no heads":
        q, k, v = q[0, 0], k[0, 0], v[0, 0]
    elif call == "negated":
        q = torch._neg_view(q)
    else:
        run = torch.func.vmap(run)
    expected = run(q, k, v)
    with sdpa.routed(), pytest.warns(UserWarning, match="left to torch"):
        got = run(q, k, v)
    torch.testing.assert_close(got, expected)
    assert not calls


def test_wrong_calls_get_torchs_complaint(calls: list[str]) -> None:
    q, k, v = tensors()
    with sdpa.routed(), pytest.warns(UserWarning, match="do not go together"), pytest.raises(RuntimeError, match="size of tensor"):
        F.scaled_dot_product_attention(q, k[:, :3], v[:, :3])
    assert not calls


def test_after_the_block_calls_are_torchs_again(calls: list[str]) -> None:
    block = sdpa.routed()
    for _ in range(2):
        with block:
            F.scaled_dot_product_attention(*tensors())
        F.scaled_dot_product_attention(*tensors())
    assert calls == ["dense"] * 2


def test_dropout_follows_the_seed(calls: list[str]) -> None:
    inputs = tensors(seqlen_q=40, seqlen_k=40)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with sdpa.routed():
            results.append(F.scaled_dot_product_attention(*inputs, dropout_p=0.4))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert calls == ["dense"] * 3


@pytest.mark.parametrize("compiled", [False, True])
def test_multi_head_attention_in_training(compiled: bool, calls: list[str]) -> None:
    layer = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 9, 32)

    def attend(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = layer(x, x, x, need_weights=False)[0]
        return out

    expected = attend(x)
    torch._dynamo.reset()
    run = torch.compile(attend, backend="eager") if compiled else attend
    with sdpa.routed():
        torch.testing.assert_close(run(x), expected, **CLOSE)
    assert compiled or calls == ["dense"]


@pytest.mark.parametrize("inside", [False, True])
def test_compiled(inside: bool) -> None:
    """The block around a compiled function, and within it: one graph, with flashtile's operator in it."""
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def layer(*inputs: torch.Tensor) -> torch.Tensor:
        if not inside:
            return F.scaled_dot_product_attention(*inputs, is_causal=True) * 2
        with sdpa.routed():
            return F.scaled_dot_product_attention(*inputs, is_causal=True) * 2

    inputs = tensors(seqlen_k=9)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True) * 2
    if inside:
        got = compiled(*inputs)
    else:
        with sdpa.routed():
            got = compiled(*inputs)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert any("flashtile" in name for name in seen), seen


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("heads_kv", "dim"), [(4, 16), (2, 24)])
def test_flash_implementation_gives_torchs_results(heads_kv: int, dim: int, is_causal: bool) -> None:
    """The two functions as torch's dispatcher calls them."""
    inputs = tensors(heads_kv=heads_kv, dim=dim)
    q, k, v = (x.double().requires_grad_() for x in inputs)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=0.3, enable_gqa=True)
    out, lse, *rest = flash_backend.forward(*inputs, 0.0, is_causal, scale=0.3)
    torch.testing.assert_close(out.double(), expected, **CLOSE)
    assert out.stride() == inputs[0].stride() and lse.shape == inputs[0].shape[:-1]
    starts_q, starts_k, max_q, max_k, seed, unused, _ = rest
    dout = torch.randn(out.shape)
    got = flash_backend.backward(
        dout, *inputs, out, lse, starts_q, starts_k, max_q, max_k, 0.0, is_causal, seed, unused, scale=0.3
    )  # fmt: skip
    for gradient, wanted in zip(got, torch.autograd.grad(expected, (q, k, v), dout.double())):
        torch.testing.assert_close(gradient.double(), wanted, **CLOSE)


def test_flash_implementation_drops_the_same_entries_backward() -> None:
    """The gradient of v is linear in what was kept: with v the identity, out is the dropped softmax itself."""
    q, k, _ = tensors((1,), heads=1, heads_kv=1, seqlen_q=16, seqlen_k=16)
    eye = torch.eye(16)[None, None]
    out, lse, starts_q, starts_k, max_q, max_k, seed, unused, _ = flash_backend.forward(q, k, eye, 0.5)
    assert (out == 0).any() and (out != 0).any()
    dout = torch.randn(out.shape)
    dv = flash_backend.backward(dout, q, k, eye, out, lse, starts_q, starts_k, max_q, max_k, 0.5, False, seed, unused)[2]
    torch.testing.assert_close(dv, out.transpose(-1, -2) @ dout, **CLOSE)


def test_flash_implementation_is_offered_and_withdrawn() -> None:
    from torch.nn import attention

    sdpa.register_flash_implementation()
    assert flash_backend.NAME in attention.list_flash_attention_impls()
    attention.activate_flash_attention_impl(flash_backend.NAME)
    assert attention.current_flash_attention_impl() == flash_backend.NAME
    attention.restore_flash_attention_impl()
    attention.activate_flash_attention_impl(flash_backend.NAME)  # nothing of the first time is left in the way
    attention.restore_flash_attention_impl()
    with pytest.raises(UnsupportedError, match="return_debug_mask"):
        flash_backend.forward(*tensors(), return_debug_mask=True)
