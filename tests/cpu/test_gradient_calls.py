"""Backward calls: what kernels are handed, nothing where no gradient is needed, what is remembered, planned and checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashtile
from flashtile.kernels.call import BackwardCall
from flashtile.ops import backward as ops
from flashtile.ops import forward as forward_ops
from flashtile.planner.device import Device
from flashtile.planner.plans import BackwardPlan
from flashtile.problem import Problem
from flashtile.testing.backward_inputs import backward_call
from flashtile.testing.forward_inputs import ForwardInputs
from tests.cpu.gradient_calls import NAMES, gradients, plain, run, same, varlen, with_leaves


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
