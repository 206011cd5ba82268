"""Gradients of attention and attention_varlen: against autograd of the reference, whatever flows in, and nothing where none is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import flashtile
from flashtile import reference
from flashtile.errors import UnsupportedError
from flashtile.kernels.call import BackwardCall
from flashtile.ops import backward as ops
from flashtile.ops import forward as forward_ops
from flashtile.planner.device import Device
from flashtile.planner.plans import BackwardPlan
from flashtile.problem import Problem
from flashtile.testing.backward_inputs import Gradients, assert_gradients, backward_call
from flashtile.testing.forward_cases import FORWARD_CASES, ForwardCase
from flashtile.testing.forward_inputs import ForwardInputs, make_forward_inputs

NAMES = ("q", "k", "v", "sinks")
CHOSEN = {
    "q63_k65", "more_queries_sinks_causal_fp32", "batch_zero", "no_queries", "no_keys", "no_keys_sinks", "dim_192_value_128", "hnd_fp32",
    "offset_by_one_hnd_fp32", "window_both_sides", "softcap", "alibi_per_sequence_full", "sinks", "negative_scale", "everything_fp32",
    "varlen_cross_bf16", "varlen_empty_on_either_side", "varlen_spare_rows", "varlen_all_empty", "varlen_batch_zero", "varlen_no_rows",
    "varlen_seqused", "varlen_seqused_absurd_fp32", "varlen_everything",
}  # fmt: skip


def plain(**changes: Any) -> ForwardInputs:
    shape = {"batch": 2, "head_dim": 16, "dtype": "float32", "num_heads_q": 4, "num_heads_kv": 2, "sinks": True, "causal": True} | changes
    return make_forward_inputs(ForwardCase("plain", 9, 30, **shape))


def varlen(**changes: Any) -> ForwardInputs:
    shape = {"head_dim": 16, "dtype": "float32", "num_heads_q": 4, "num_heads_kv": 2, "sinks": True} | changes
    return make_forward_inputs(ForwardCase("varlen", (9, 4), (30, 12), **shape))


def run(args: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return (flashtile.attention_varlen_with_lse if "cu_seqlens_q" in args else flashtile.attention_with_lse)(**args)


def with_leaves(args: dict[str, Any], names: tuple[str, ...] = NAMES) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The arguments with those of ``names`` that are there as leaves that need a gradient, and these leaves."""
    leaves = {name: args[name].detach().requires_grad_() for name in names if args[name] is not None}
    return args | leaves, list(leaves.values())


def gradients(inputs: ForwardInputs, dout: torch.Tensor | None, dlse: torch.Tensor | None, *, of: Callable[..., Any] = run) -> Gradients:
    """What autograd finds for q, k, v and sinks."""
    args, leaves = with_leaves(inputs.args)
    results = [(result, flows) for result, flows in zip(of(args), (dout, dlse)) if flows is not None]
    found = torch.autograd.grad([result for result, _ in results], leaves, [flows for _, flows in results])
    return Gradients(*found[:3], found[3] if len(found) > 3 else None)


def same(found: Gradients, expected: Gradients) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected))


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


class Noted:
    """A kernel module that takes notes and writes ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[BackwardCall] = []
        self.problems: list[Problem] = []
        monkeypatch.setattr(ops, "kernel_module", lambda plan: self)
        monkeypatch.setattr(ops, "_PREPARED", {})

    def bind(self, problem: Problem, plan: Any, device: torch.device) -> Callable[[BackwardCall], None]:
        self.problems.append(problem)
        return self.run

    def run(self, call: BackwardCall) -> None:
        self.calls.append(call)
        for grad in (call.dq, call.dk, call.dv, call.dsinks):
            if grad is not None:
                grad.fill_(1.0)


@pytest.mark.parametrize("inputs", [plain(layout="HND"), varlen(seqused_k=(3, 12), alibi=True, window=(5, 3))], ids=["hnd", "packed"])
def test_kernels_get_the_forward_calls_own_tensors(inputs: ForwardInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = Noted(monkeypatch)
    args, leaves = with_leaves(inputs.args)
    out, lse = run(args)
    dout, dlse = torch.randn(9, *out.shape)[4], torch.randn(lse.shape)
    torch.autograd.backward([out, lse], [dout, dlse])
    [call], [problem] = noted.calls, noted.problems
    given = args | {"out": out, "lse": lse, "dout": dout, "dlse": dlse}
    names = ("q", "k", "v", "sinks", "alibi_slopes", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "out", "lse", "dout", "dlse")
    for name in names:
        found, wanted = getattr(call, name), given.get(name)
        assert (found is None) == (wanted is None), name
        assert found is None or (found.data_ptr() == wanted.data_ptr() and found.stride() == wanted.stride()), name
    assert (call.max_seqlen_q, call.max_seqlen_k) == (9, 42 if inputs.varlen else 30)
    assert (call.scale, call.softcap) == (0.25, 0.0)
    assert problem == Problem.forward(**inputs.args, lse=True).with_(operation="backward")
    for leaf, grad in zip(leaves, (call.dq, call.dk, call.dv, call.dsinks)):
        assert grad is not None
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)
        assert grad.shape[-1] == 1 or grad.stride(-1) == 1


def test_what_flows_into_lse_is_laid_out_like_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    noted = Noted(monkeypatch)
    args, leaves = with_leaves(plain().args)
    _, lse = run(args)
    for dlse in (torch.randn(2, 9, 4).mT, torch.randn(()).expand(lse.shape)):
        torch.autograd.grad(lse, leaves, dlse, retain_graph=True)
        given = noted.calls[-1].dlse
        assert given is not None
        assert given.stride() == lse.stride()
        assert torch.equal(given, dlse)
    assert all((call.dout == 0).all() and call.dout.is_contiguous() for call in noted.calls)


def test_only_gradients_that_are_needed_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    noted = Noted(monkeypatch)
    for name in NAMES:
        args, [leaf] = with_leaves(plain().args, (name,))
        flashtile.attention(**args).sum().backward()
        assert leaf.grad is not None
        assert (leaf.grad == 1).all()
    assert [call.dsinks is None for call in noted.calls] == [True, True, True, False]
    assert all(call.dlse is None for call in noted.calls)


def test_nobody_pays_who_needs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("autograd was asked")

    monkeypatch.setattr(forward_ops.Attention, "apply", refuse)
    args, _ = with_leaves(plain().args)
    flashtile.attention(**plain().args)
    with torch.no_grad():
        flashtile.attention(**args)
    with pytest.raises(AssertionError, match="autograd was asked"):
        flashtile.attention(**args)


def test_a_warm_call_neither_checks_nor_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = varlen()
    call = backward_call(inputs)
    expected = gradients(inputs, call.dout, call.dlse)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a warm call came to the slow path")

    monkeypatch.setattr(Problem, "forward", refuse)
    monkeypatch.setattr(ops, "plan_backward", refuse)
    assert same(gradients(inputs, call.dout, call.dlse), expected)  # and the same bits
    monkeypatch.setattr(ops, "_PREPARED", {})
    with pytest.raises(AssertionError, match="slow path"):
        gradients(inputs, call.dout, call.dlse)


@pytest.mark.parametrize("inputs", [plain(), varlen()], ids=["plain", "packed"])
def test_gradients_are_planned_as_deterministic_as_asked_or_as_torch_is(inputs: ForwardInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, asked = ops.plan_backward, []

    def note(problem: Problem, device: Device) -> BackwardPlan:
        asked.append(problem.deterministic)
        return planned(problem, device)

    monkeypatch.setattr(ops, "plan_backward", note)
    monkeypatch.setattr(ops, "_PREPARED", {})
    dout = backward_call(inputs).dout
    for _ in range(2):  # the second time both kinds are known
        for wish, torchs, expected in ((None, False, False), (True, False, True), (False, True, False), (None, True, True)):
            args, leaves = with_leaves(inputs.args | {"deterministic": wish})
            out = run(args)[0]
            torch.use_deterministic_algorithms(torchs)  # as it stands when gradients are computed
            try:
                torch.autograd.grad(out, leaves, dout)
            finally:
                torch.use_deterministic_algorithms(False)
            assert {key[-1] for key in ops._PREPARED} >= {expected}
    assert asked == [False, True]


def test_checked_names_a_sequence_of_more_keys_than_it_was_said_to_have() -> None:
    args, _ = with_leaves(varlen().args | {"max_seqlen_k": 29})
    with flashtile.checked():
        run(args | {"max_seqlen_k": 30})
        with torch.no_grad():  # a hint and no more
            run(args)
        with pytest.raises(flashtile.ArgumentError, match=r"cu_seqlens_k\[1\]: .*max_seqlen_k \(29\).* got 30\."):
            run(args)


# Whole models


def test_merged_parts_train_like_the_whole() -> None:
    q, k, v = (torch.randn(2, n, h, 16, requires_grad=True) for n, h in ((7, 4), (40, 2), (40, 2)))
    sinks = torch.randn(4, requires_grad=True)
    dout, dlse = torch.randn(2, 7, 4, 16), torch.randn(2, 4, 7)

    def merged() -> tuple[torch.Tensor, torch.Tensor]:
        parts = [
            flashtile.attention_with_lse(q, k[:, keys], v[:, keys], sinks=sinks if i == 0 else None)
            for i, keys in enumerate((slice(0, 13), slice(13, 40)))
        ]
        return flashtile.merge([out for out, _ in parts], [lse for _, lse in parts])

    leaves = [q, k, v, sinks]
    whole = torch.autograd.grad(flashtile.attention_with_lse(q, k, v, sinks=sinks), leaves, [dout, dlse])
    for found, expected in zip(torch.autograd.grad(merged(), leaves, [dout, dlse]), whole):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    inputs = plain()
    call = backward_call(inputs)

    def again(args: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        rest = {name: value for name, value in args.items() if name not in NAMES}
        found: tuple[torch.Tensor, torch.Tensor] = checkpoint(
            lambda *leaves: run(rest | dict(zip(NAMES, leaves))), *(args[name] for name in NAMES), use_reentrant=use_reentrant
        )
        return found

    args, leaves = with_leaves(inputs.args)
    torch.autograd.backward(again(args), [call.dout, torch.ones(2, 4, 9)])
    found = Gradients(*(leaf.grad for leaf in leaves))  # type: ignore[arg-type]
    assert same(found, gradients(inputs, call.dout, torch.ones(2, 4, 9)))


def test_hooks_see_what_is_saved() -> None:
    inputs, packed = plain(), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor.shape)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        args, leaves = with_leaves(inputs.args)
        out = flashtile.attention(**args)
    assert len(packed) == 6  # q, k, v, sinks, out and lse
    torch.autograd.backward(out, torch.ones_like(out))
    assert same(Gradients(*(leaf.grad for leaf in leaves)), gradients(inputs, torch.ones_like(out), None))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["q", "out"])
def test_a_change_in_place_of_what_is_saved_is_noticed(name: str) -> None:
    args, _ = with_leaves(plain().args, ("k",))
    out = flashtile.attention(**args)
    (args["q"] if name == "q" else out.detach()).mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_second_derivative_is_refused() -> None:
    args, leaves = with_leaves(plain().args)
    found = torch.autograd.grad(flashtile.attention(**args).sum(), leaves, create_graph=True)
    assert same(Gradients(*found), gradients(plain(), torch.ones(2, 9, 4, 16), None))
    with pytest.raises(UnsupportedError, match="no second derivative"):
        torch.autograd.grad(found[0].square().sum(), leaves)


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_torchs_own_attention(dtype: torch.dtype) -> None:
    inputs = plain()
    args, leaves = with_leaves(inputs.args)
    mixed = args | {"k": args["k"].to(dtype)}
    with torch.autocast("cpu", dtype=dtype):
        out, lse = run(args)
        assert torch.equal(run(mixed)[0], out)
        assert torch.nn.functional.scaled_dot_product_attention(*(args[n].transpose(1, 2) for n in ("q", "q", "q"))).dtype == dtype
    cast = {name: args[name].detach().to(dtype) for name in ("q", "k", "v")}
    expected, expected_lse = run(inputs.args | cast)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    out.sum().backward()
    assert [leaf.grad.dtype for leaf in leaves if leaf.grad is not None] == [torch.float32] * 4


def test_autocast_leaves_16_bit_tensors_alone() -> None:
    args = plain(dtype="float16").args
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flashtile.attention(**args).dtype == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(flashtile.DtypeError, match=r"q: .*float64"):
        flashtile.attention(**args | {name: args[name].double() for name in ("q", "k", "v")})


def test_training_on_the_reference_and_on_flashtile_is_the_same() -> None:
    """Some steps of gradient descent on projections, by either."""
    rng = torch.Generator().manual_seed(0)
    x, target = (torch.randn(2, 20, 16, generator=rng) for _ in range(2))

    def train(attend: Callable[..., torch.Tensor]) -> list[float]:
        weights = [(torch.randn(16, 16, generator=torch.Generator().manual_seed(i)) / 4).requires_grad_() for i in range(3)]
        losses = []
        for _ in range(5):
            q, k, v = ((x @ weight).view(2, 20, 2, 8) for weight in weights)
            loss = (attend(q, k, v).flatten(2) - target).square().mean()
            losses.append(loss.item())
            for weight, grad in zip(weights, torch.autograd.grad(loss, weights)):
                weight.data -= 2.0 * grad
        return losses

    losses = train(lambda q, k, v: flashtile.attention(q, k, v, causal=True, softcap=5.0))
    assert losses == pytest.approx(train(lambda q, k, v: reference.forward(q, k, v, causal=True, softcap=5.0)[0].float()), rel=1e-4)
    assert losses[-1] < losses[0]
