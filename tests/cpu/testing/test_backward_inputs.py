"""What flows into a backward call, and that wrong gradients are told from rounded ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from flashtile.testing.backward_inputs import BACKWARD_CASES, Gradients, assert_gradients, backward_call, expected_gradients, gradients_of
from flashtile.testing.forward_cases import ForwardCase
from flashtile.testing.forward_inputs import make_forward_inputs

pytestmark = pytest.mark.usefixtures("one_thread")
CASE = ForwardCase("wrong", (70, 20), (90, 20), dtype="bfloat16", causal=True, sinks=True, spare_rows=3, spare_keys=4, num_heads_q=4)


def in_dtype(gradients: Gradients, dtype: torch.dtype) -> Gradients:
    dsinks = None if gradients.dsinks is None else gradients.dsinks.float()
    return Gradients(gradients.dq.to(dtype), gradients.dk.to(dtype), gradients.dv.to(dtype), dsinks)


@pytest.mark.parametrize("case", BACKWARD_CASES, ids=lambda c: c.name)
def test_rounded_gradients_are_close(case: ForwardCase) -> None:
    inputs = make_forward_inputs(case)
    call = backward_call(inputs)
    assert_gradients(inputs, call, in_dtype(expected_gradients(inputs, call.dout, call.dlse), inputs.dtype))


def test_what_a_runner_does_not_write_is_seen() -> None:
    inputs = make_forward_inputs(CASE)
    call = backward_call(inputs)
    assert all(gradient is not None and gradient.isnan().all() for gradient in gradients_of(call))
    with pytest.raises(AssertionError, match="elements NaN or infinite"):
        assert_gradients(inputs, call)


def test_rows_of_nobody_hold_nan_and_flow_nowhere() -> None:
    inputs = make_forward_inputs(CASE)
    call = backward_call(inputs, through_lse=True)
    assert call.dlse is not None
    assert call.dout[90:].isnan().all()
    gradients = expected_gradients(inputs, call.dout, call.dlse)
    assert not gradients.dq[90:].any()
    assert not gradients.dk[110:].any()


@pytest.mark.parametrize("through_lse", [False, True])
def test_some_cases_flow_through_lse(through_lse: bool) -> None:
    assert (backward_call(make_forward_inputs(CASE), through_lse=through_lse).dlse is not None) is through_lse
    flows = [backward_call(make_forward_inputs(case)).dlse is not None for case in BACKWARD_CASES[:20]]
    assert 4 < sum(flows) < 16


WRONG: list[tuple[str, Callable[[Gradients], object]]] = [
    ("dq", lambda g: g.dq.mul_(1.03)),
    ("dk", lambda g: g.dk[89].mul_(1.5)),
    ("dv", lambda g: g.dv[30].zero_()),
    ("dv", lambda g: g.dv[109, 0, 63].add_(0.2)),
    ("dk", lambda g: g.dk[111].add_(1e-30)),
    ("dsinks", lambda g: g.dsinks is not None and g.dsinks.mul_(1.1)),
]


@pytest.mark.parametrize(("name", "spoil"), WRONG)
def test_wrong_gradients_are_told(name: str, spoil: Callable[[Gradients], object]) -> None:
    inputs = make_forward_inputs(CASE)
    call = backward_call(inputs)
    gradients = in_dtype(expected_gradients(inputs, call.dout, call.dlse), inputs.dtype)
    spoil(gradients)
    with pytest.raises(AssertionError, match=f"wrong: {name} "):
        assert_gradients(inputs, call, gradients)
