"""Gradients of attention and attention_varlen: against autograd of the reference, whatever flows in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import flashtile
from flashtile.testing.backward_inputs import Gradients, assert_gradients, backward_call
from flashtile.testing.forward_cases import FORWARD_CASES, ForwardCase
from flashtile.testing.forward_inputs import ForwardInputs, make_forward_inputs
from tests.cpu.gradient_calls import gradients, plain, same, varlen, with_leaves

CHOSEN = {
    "q63_k65", "more_queries_sinks_causal_fp32", "batch_zero", "no_queries", "no_keys", "no_keys_sinks", "dim_192_value_128", "hnd_fp32",
    "offset_by_one_hnd_fp32", "window_both_sides", "softcap", "alibi_per_sequence_full", "sinks", "negative_scale", "everything_fp32",
    "varlen_cross_bf16", "varlen_empty_on_either_side", "varlen_spare_rows", "varlen_all_empty", "varlen_batch_zero", "varlen_no_rows",
    "varlen_seqused", "varlen_seqused_absurd_fp32", "varlen_everything",
}  # fmt: skip


# Against the reference


@pytest.mark.parametrize("case", [case for case in FORWARD_CASES if case.name in CHOSEN], ids=lambda case: case.name)
def test_agrees_with_autograd_of_the_reference(case: ForwardCase) -> None:
    inputs = make_forward_inputs(case)
    call = backward_call(inputs)
    found = gradients(inputs, call.dout, call.dlse)
    for name in ("q", "k", "v"):
        assert getattr(found, f"d{name}").dtype == inputs.dtype
    assert_gradients(inputs, call, found)


def test_every_chosen_case_exists() -> None:
    assert {case.name for case in FORWARD_CASES} >= CHOSEN


@pytest.mark.parametrize("inputs", [plain(), varlen()], ids=["plain", "packed"])
def test_a_loss_of_out_alone_and_of_lse_alone(inputs: ForwardInputs) -> None:
    call = backward_call(inputs, through_lse=True)
    assert_gradients(inputs, call._replace(dlse=None), gradients(inputs, call.dout, None))
    assert_gradients(inputs, call._replace(dout=torch.zeros_like(call.dout)), gradients(inputs, None, call.dlse))


def test_out_without_lse_has_the_same_gradients() -> None:
    for inputs in (plain(), varlen()):
        function = flashtile.attention_varlen if inputs.varlen else flashtile.attention
        dout = backward_call(inputs).dout
        assert same(gradients(inputs, dout, None, of=lambda args, f=function: [f(**args)]), gradients(inputs, dout, None))


def test_rows_and_keys_of_nobody_get_nothing() -> None:
    inputs = make_forward_inputs(ForwardCase("spare", (3, 5), (9, 20), spare_rows=4, spare_keys=6, seqused_k=(9, 7), dtype="bfloat16"))
    call = backward_call(inputs, through_lse=True)
    assert call.dout[8:].isnan().all()
    found = gradients(inputs, call.dout, call.dlse)
    assert (found.dq[8:] == 0).all()
    for grad in (found.dk, found.dv):
        assert (grad[16:] == 0).all()
        assert (grad[:16] != 0).any(dim=-1).all()


@pytest.mark.parametrize("through_lse", [False, True])
def test_without_keys_only_sinks_have_a_gradient(through_lse: bool) -> None:
    sinks = torch.tensor([0.5, -1.0], requires_grad=True)
    q, k = torch.randn(5, 2, 8, requires_grad=True), torch.randn(0, 1, 8, requires_grad=True)
    starts = torch.tensor([0, 3], dtype=torch.int32)
    out, lse = flashtile.attention_varlen_with_lse(q, k, k, starts, torch.zeros_like(starts), 3, sinks=sinks)
    dlse = torch.arange(10.0).view(2, 5) if through_lse else None
    grads = torch.autograd.grad([out, lse][: 1 + through_lse], [q, k, sinks], [torch.ones_like(out), dlse][: 1 + through_lse])
    assert (grads[0] == 0).all()
    assert grads[1].shape == k.shape
    # Rows 3 and 4 belong to nobody.
    assert grads[2].tolist() == ([0.0 + 1 + 2, 5.0 + 6 + 7] if through_lse else [0.0, 0.0])


# What flows in, and what is asked for


@pytest.mark.parametrize(
    "laid_out",
    [
        lambda t: t[:, :, :1, :1].expand(t.shape),
        lambda t: t[:1].expand(t.shape),
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
        lambda t: torch.cat([t, t], dim=-1)[..., 1:17],
        torch._neg_view,
    ],
    ids=["of_a_sum", "of_a_sum_over_the_batch", "heads_first", "dims_first", "every_other", "offset", "negated"],
)
def test_gradients_that_flow_in_may_have_any_strides(laid_out: Callable[[torch.Tensor], torch.Tensor]) -> None:
    inputs = plain()
    call = backward_call(inputs, through_lse=True)
    assert call.dlse is not None
    dout = laid_out(call.dout)
    expected = gradients(inputs, dout.clone(memory_format=torch.contiguous_format), call.dlse)
    assert same(gradients(inputs, dout, call.dlse.mT.contiguous().mT), expected)
    assert_gradients(inputs, call._replace(dout=dout.contiguous()), expected)


@pytest.mark.parametrize("name", ["q", "k"])
def test_tensors_that_share_memory_sum_their_gradients(name: str) -> None:
    """Of an expanded tensor, whose heads are all one, and of views into one projection."""
    inputs = plain(sinks=False)
    one = inputs.args[name][:, :, :1].detach().requires_grad_()
    args = inputs.args | {name: one.expand(inputs.args[name].shape)}
    dout = torch.randn(2, 9, 4, 16)
    (found,) = torch.autograd.grad(flashtile.attention(**args), one, dout)
    apart = args | {name: args[name].detach().contiguous().requires_grad_()}
    (expected,) = torch.autograd.grad(flashtile.attention(**apart), apart[name], dout)
    torch.testing.assert_close(found, expected.sum(dim=2, keepdim=True))

    qkv = torch.randn(2, 9, 3, 4, 16, requires_grad=True)
    apart_qkv = [part.detach().contiguous().requires_grad_() for part in qkv.unbind(2)]
    (found,) = torch.autograd.grad(flashtile.attention(*qkv.unbind(2)), qkv, dout)
    torch.testing.assert_close(found, torch.stack(torch.autograd.grad(flashtile.attention(*apart_qkv), apart_qkv, dout), dim=2))


@pytest.mark.parametrize("compiled", [False, True])
def test_heads_that_overlap_in_memory_are_trained_like_others(compiled: bool) -> None:
    """Windows of a line: torch would lay their gradients out with the heads last."""
    line = torch.randn(80, generator=torch.Generator().manual_seed(1), requires_grad=True)
    q = torch.randn(2, 3, 2, 16, generator=torch.Generator().manual_seed(2))
    windows = line.as_strided((2, 3, 2, 16), (16, 16, 1, 1))
    attend = torch.compile(flashtile.attention, backend="aot_eager") if compiled else flashtile.attention
    results = [attend(q, k, k, causal=True) for k in (windows, windows.contiguous())]
    (got,), (expected,) = (torch.autograd.grad(result.square().sum(), line) for result in results)
    torch.testing.assert_close(got, expected)


def test_the_gradient_of_a_sum() -> None:
    inputs = plain()
    args, leaves = with_leaves(inputs.args)
    flashtile.attention(**args).sum().backward()
    expected = gradients(inputs, torch.ones_like(backward_call(inputs).dout), None)
    assert same(Gradients(*(leaf.grad for leaf in leaves)), expected)  # type: ignore[arg-type]
