"""The backward half of a ForwardCase: gradients that flow in, the call that a kernel gets, and what must come out of it."""

from __future__ import annotations

from typing import NamedTuple
from zlib import crc32

import torch

from flashtile import reference
from flashtile.kernels.call import BackwardCall
from flashtile.problem import Problem
from flashtile.testing import poison
from flashtile.testing.forward_cases import FORWARD_CASES, ForwardCase
from flashtile.testing.forward_inputs import ForwardInputs, expected_forward, forward_call, in_sequences
from flashtile.testing.gradient_tolerance import assert_gradients_close
from flashtile.testing.tensors import on_device
from flashtile.testing.tolerance import score_error_of, unit_of

BACKWARD_CASES: list[ForwardCase] = [case for case in FORWARD_CASES if not case.page_size]
"""Every forward case whose keys lie in no pages: those have no gradient."""
_TYPICAL_ROUNDING = 0.25  # of the unit: a sum of a row's roundings is rarely beyond eight times that, which tests allow a row


class Gradients(NamedTuple):
    """dq, dk and dv are like q, k and v; dsinks (hq,), None without sinks."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dsinks: torch.Tensor | None


def backward_problem(inputs: ForwardInputs) -> Problem:
    """The problem that a kernel's ``bind`` gets for these inputs."""
    return Problem.forward(**inputs.args, lse=True).with_(operation="backward")


def backward_call(inputs: ForwardInputs, *, through_lse: bool | None = None, seed: int = 1) -> BackwardCall:
    """What a kernel's runner gets for these inputs: out and lse of the reference, a random dout, and gradients full of NaN.

    dout lies in memory like q, NaN around it and in rows that no sequence owns. ``through_lse`` says whether there is a dlse; by
    default every other case has one, always the same ones.
    """
    case, args = inputs.case, inputs.args
    q = args["q"]
    expected_out, expected_lse = expected_forward(inputs)
    call = forward_call(inputs, expected_out.to(q.dtype), expected_lse.float())
    rng = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, case.num_heads_q, case.head_dim_v, generator=rng) for n in case.query_lengths]
    dout = in_sequences(case, rows, case.seqlens_q, case.spare_rows, case.num_heads_q, case.head_dim_v)
    flows = crc32(case.name.encode()) % 2 == 0 if through_lse is None else through_lse
    dlse = torch.randn(expected_lse.shape, generator=rng).to(q.device) if flows else None
    sinks = args["sinks"]
    fields = {name: getattr(call, name) for name in call._fields if name != "page_table"}
    return BackwardCall(
        **fields | {"lse": expected_lse.float()},
        dout=on_device(dout, q.device),
        dlse=dlse,
        dq=poison.nan_like(q),
        dk=poison.nan_like(args["k"]),
        dv=poison.nan_like(args["v"]),
        dsinks=None if sinks is None else poison.nan_like(sinks),
        max_seqlen_k=max(case.stored_lengths, default=0) if case.varlen else args["k"].shape[1],
    )


def gradients_of(call: BackwardCall) -> Gradients:
    """What a runner wrote."""
    return Gradients(call.dq, call.dk, call.dv, call.dsinks)


def expected_gradients(
    inputs: ForwardInputs, dout: torch.Tensor, dlse: torch.Tensor | None = None, *, dtype: torch.dtype = torch.float64
) -> Gradients:
    """Gradients by autograd through the reference, computed and returned in ``dtype``; 0 where nothing depends on an input."""
    leaves = [inputs.args[name] for name in ("q", "k", "v", "sinks") if inputs.args[name] is not None]
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    out, lse = reference.forward(**inputs.args | dict(zip(("q", "k", "v", "sinks"), leaves)), seed=inputs.seed, dtype=dtype)
    if not out.requires_grad:  # there was no sequence
        gradients = tuple(torch.zeros_like(leaf) for leaf in leaves)
    else:
        outputs = [(out, dout)] if dlse is None else [(out, dout), (lse, dlse)]
        gradients = torch.autograd.grad(
            [result for result, _ in outputs], leaves, [gradient.to(dtype) for _, gradient in outputs], materialize_grads=True
        )
    dq, dk, dv, *dsinks = gradients
    return Gradients(dq, dk, dv, dsinks[0] if dsinks else None)


def assert_gradients(inputs: ForwardInputs, call: BackwardCall, gradients: Gradients | None = None, *, what: str = "") -> None:
    """Raises AssertionError unless ``gradients`` are at most twice as far from the float64 reference as the reference in the inputs'
    dtype is, and a floor. By default they are those that the call's runner wrote; ``call`` says what flowed in.
    """
    expected = expected_gradients(inputs, call.dout, call.dlse)
    in_dtype = expected_gradients(inputs, call.dout, call.dlse, dtype=inputs.dtype)
    floors = _floors(inputs, call, expected)
    for name, gradient in (gradients or gradients_of(call))._asdict().items():
        if gradient is not None:
            label = f"{what or inputs.case.name}: {name}"
            assert_gradients_close(gradient, *(getattr(g, name) for g in (expected, in_dtype, floors)), what=label)


def _floors(inputs: ForwardInputs, call: BackwardCall, expected: Gradients) -> Gradients:
    """The error that each gradient may have in any case: what float32 rounds of the terms that it is the difference of.

    A row of dq also takes what delta is off by, since delta is made of out as rounded to its dtype: of rows with few keys, the
    in-dtype reference's own error may be small by chance.
    """
    out, lse = expected_forward(inputs)
    products = out * call.dout.double().nan_to_num(0.0)
    delta = products.sum(dim=-1).transpose(-1, -2)
    # A dlse equal to delta cancels it, and leaves the other term; which may be small by chance, so that delta's own terms join it, with
    # delta's sign: of a row's only key the other term is delta too, and they would cancel.
    own_terms = products.norm(dim=-1).transpose(-1, -2)
    one_term = expected_gradients(inputs, call.dout, delta + torch.copysign(own_terms, delta))
    rounding = score_error_of(lse)
    dq, dk, dv = (rounding * torch.maximum(e.abs(), t.abs()) for e, t in zip(expected[:3], one_term[:3]))
    delta_off = own_terms * unit_of(inputs.dtype) * _TYPICAL_ROUNDING
    moved = expected_gradients(inputs, call.dout, delta_off if call.dlse is None else call.dlse + delta_off)
    dq = dq + (moved.dq - expected.dq).abs()
    if call.sinks is None:
        return Gradients(dq, dk, dv, None)
    # One number a head: the reference's own error may be small by chance. Sums of products with out carry out's rounding.
    shares = torch.exp(call.sinks.double()[:, None] - lse).masked_fill(lse == float("-inf"), 0.0)
    terms = (
        products.norm(dim=-1).transpose(-1, -2) * unit_of(inputs.dtype)
        + (delta.abs() + (0.0 if call.dlse is None else call.dlse.abs())) * rounding
    )
    return Gradients(dq, dk, dv, (shares * terms).transpose(0, -2).flatten(1).norm(dim=1))
