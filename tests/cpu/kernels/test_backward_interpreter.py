"""The portable backward in Triton's interpreter against autograd through the reference: every small case, over tiles.

The cases take turns at the tiles; each case meets one. bfloat16 cases run as float16: the interpreter's product of bfloat16
is wrong.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from flashtile.errors import UnsupportedError
from flashtile.planner.plans import BackwardPlan
from flashtile.testing import poison
from flashtile.testing.backward_inputs import BACKWARD_CASES, assert_gradients, backward_call, backward_problem
from flashtile.testing.forward_cases import ForwardCase
from flashtile.testing.forward_inputs import ForwardInputs, make_forward_inputs

pytest.importorskip("triton")
from flashtile.kernels import backward
from flashtile.kernels.call import BackwardCall

# NumPy computes both branches of a select, the product of 0 and inf of keys that nobody owns among them
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton 3.6 with NumPy 2
]

TILES = (
    (64, 128, 128, 64),
    (64, 32, 32, 64),
    (32, 64, 64, 128),
    (64, 64, 64, 32),
    (128, 64, 64, 128),
    (32, 128, 128, 64),
    (128, 128, 64, 64),
)
"""(block_m, block_n, dq_block_m, dq_block_n): what a program owns above and below what it walks, and the head dims."""


def plan_of(block_m: int = 32, block_n: int = 64, dq_block_m: int = 32, dq_block_n: int = 32) -> BackwardPlan:
    return BackwardPlan("triton.backward", block_m, block_n, 4, 2, dq_block_m, dq_block_n, 4, 2)


def run(inputs: ForwardInputs, plan: BackwardPlan, **options: Any) -> BackwardCall:
    """The call, whose gradients were NaN, after it ran. All scratch is NaN until it is written."""
    call = backward_call(inputs, **options)
    with poison.allocations():
        backward.bind(backward_problem(inputs), plan, call.q.device)(call)
    return call


def check(inputs: ForwardInputs, plan: BackwardPlan, **options: Any) -> BackwardCall:
    call = run(inputs, plan, **options)
    assert_gradients(inputs, call)
    return call


def trials() -> Iterator[Any]:
    for turn, case in enumerate(BACKWARD_CASES):
        tile = TILES[(3 * turn + 1) % len(TILES)]
        if case.dtype == "bfloat16":
            case = replace(case, dtype="float16")
        yield pytest.param(case, plan_of(*tile), id=f"{case.name}-{'-'.join(map(str, tile))}")


@pytest.mark.parametrize(("case", "plan"), list(trials()))
def test_every_case_matches_the_reference(case: ForwardCase, plan: BackwardPlan) -> None:
    check(make_forward_inputs(case, seed=3), plan)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_small_tiles(dtype: str) -> None:
    case = ForwardCase("small", 40, 56, head_dim=24, window=(20, 7), sinks=True, alibi=True, dtype=dtype)
    check(make_forward_inputs(case), plan_of(16, 16, 16, 16))


@pytest.mark.parametrize("through_lse", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("varlen", [False, True])
def test_gradients_flow_through_lse(through_lse: bool, sinks: bool, varlen: bool) -> None:
    seqlens_q, seqlens_k = ((20, 0, 9), (30, 5, 0)) if varlen else (20, 30)
    case = ForwardCase("lse", seqlens_q, seqlens_k, head_dim=16, causal=True, sinks=sinks)
    check(make_forward_inputs(case), plan_of(), through_lse=through_lse)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_of_any_sign(scale: float) -> None:
    plain = ForwardCase("scale", 20, 40, head_dim=16, scale=scale, causal=True)
    for case in (plain, replace(plain, softcap=9.0), replace(plain, alibi=True)):
        check(make_forward_inputs(case), plan_of())


def test_results_are_the_same_bit_by_bit_each_time() -> None:
    inputs = make_forward_inputs(ForwardCase("again", 70, 90, head_dim=16, causal=True, sinks=True))
    calls = [run(inputs, plan_of()) for _ in range(2)]
    for name in ("dq", "dk", "dv", "dsinks"):
        assert torch.equal(*(getattr(call, name) for call in calls))


def test_a_sink_that_takes_nothing_gets_no_gradient() -> None:
    inputs = make_forward_inputs(ForwardCase("no sink", (20, 5), (40, 0), head_dim=16, sinks=True))
    inputs.args["sinks"][0] = float("-inf")
    call = run(inputs, plan_of(), through_lse=True)
    assert call.dsinks is not None
    assert call.dsinks[0] == 0.0
    assert call.dsinks.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in (call.dq[:25], call.dk[:40], call.dv[:40]))


def test_scratch_memory_lives_until_the_last_kernel_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel gets addresses, which keep no memory alive."""
    scratch: dict[int, weakref.ref[torch.Tensor]] = {}
    read: set[int] = set()

    def remembered(size: int, device: torch.device) -> torch.Tensor:
        tensor = torch.empty(size)
        scratch[tensor.data_ptr()] = weakref.ref(tensor)
        return tensor

    class Launch:
        constants = ()

        def run(self, *args: Any) -> None:
            read.update(address for address in numbers_in(args) if address in scratch)
            assert all(scratch[address]() is not None for address in numbers_in(args) if address in scratch)

    monkeypatch.setattr(backward, "workspace", remembered)
    monkeypatch.setattr(backward, "pointer_of", lambda kernel: torch.Tensor.data_ptr)
    monkeypatch.setattr(backward, "launcher", lambda spec, device: Launch())
    run(make_forward_inputs(ForwardCase("sinks", 40, 50, head_dim=16, sinks=True)), plan_of())
    assert len(read) == 3  # lse, delta and the sinks' parts


def numbers_in(args: tuple[Any, ...]) -> Iterator[int]:
    """Every number among a launch's arguments, views' fields too."""
    for arg in args:
        if isinstance(arg, tuple):
            yield from numbers_in(arg)
        elif isinstance(arg, int):
            yield arg


def test_a_sink_gradient_that_nobody_wants_is_not_needed() -> None:
    inputs = make_forward_inputs(ForwardCase("unwanted", 20, 40, head_dim=16, sinks=True))
    call = backward_call(inputs)._replace(dsinks=None)
    backward.bind(backward_problem(inputs), plan_of(), call.q.device)(call)
    assert_gradients(inputs, call)


def test_an_lse_gradient_of_rows_that_see_nothing_goes_nowhere() -> None:
    """A loss may send NaN through an lse of -inf."""
    inputs = make_forward_inputs(ForwardCase("unseen", 30, 12, head_dim=16, causal=True))
    call = backward_call(inputs, through_lse=True)
    assert call.dlse is not None
    finite = backward_call(inputs, through_lse=True)
    call.dlse[call.lse == float("-inf")] = float("nan")
    for each in (call, finite):
        backward.bind(backward_problem(inputs), plan_of(), each.q.device)(each)
    assert torch.equal(call.dq, finite.dq)
    assert torch.equal(call.dk, finite.dk)
    assert torch.equal(call.dv, finite.dv)


def test_rows_and_keys_of_nobody_get_zeros() -> None:
    case = ForwardCase("spare", (20, 3), (30, 25), seqused_k=(17, 25), head_dim=16, spare_rows=40, spare_keys=50, causal=True)
    call = check(make_forward_inputs(case), plan_of(16, 16, 16, 16))
    assert (call.dq[23:] == 0).all()
    for gradient in (call.dk, call.dv):
        assert (gradient[17:30] == 0).all()
        assert (gradient[55:] == 0).all()
        assert (gradient[:17] != 0).any()


def test_without_sequences_all_gradients_are_zero() -> None:
    inputs = make_forward_inputs(ForwardCase("nobody", (), (), head_dim=16, spare_rows=3, spare_keys=4, sinks=True))
    call = run(inputs, plan_of())
    assert not any(gradient.count_nonzero() for gradient in (call.dq, call.dk, call.dv, call.dsinks) if gradient is not None)


WILD_STARTS = [(0, -5), (-4, 2), (0, 2**30), (5, 3), (-(2**31), 2**31 - 1)]


@pytest.mark.parametrize("starts", WILD_STARTS)
@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_starts_that_make_no_sense_read_and_write_nothing_outside(name: str, starts: tuple[int, int]) -> None:
    inputs = make_forward_inputs(ForwardCase("starts", (4,), (20,), head_dim=16, padding=0))
    guarded = {gradient: torch.full((120, heads, 16), 7.0, dtype=torch.float16) for gradient, heads in (("dq", 2), ("dk", 1), ("dv", 1))}
    length = {"dq": 4, "dk": 20, "dv": 20}
    changes: dict[str, Any] = {gradient: guarded[gradient][50 : 50 + n] for gradient, n in length.items()}
    call = backward_call(inputs)._replace(**changes | {name: torch.tensor(starts, dtype=torch.int32)})
    backward.bind(backward_problem(inputs), plan_of(), call.q.device)(call)
    for gradient, n in length.items():
        assert (guarded[gradient][:50] == 7.0).all()
        assert (guarded[gradient][50 + n :] == 7.0).all()


@pytest.mark.parametrize("window", [(2**31 - 1, 0), (2**31 - 1, 2**31 - 1), (None, 2**31 - 1), (2**40, None), (3, 2**31 - 2)])
def test_windows_wider_than_any_sequence(window: tuple[int | None, int | None]) -> None:
    check(make_forward_inputs(ForwardCase("wide", 25, 40, head_dim=16, window=window)), plan_of(16, 16, 16, 16))


def test_tensors_are_read_by_their_strides_however_far() -> None:
    """dout laid out unlike q and V unlike K, and strides over sequences that leave 32 bits: layouts that are compiled when they come."""
    inputs = make_forward_inputs(ForwardCase("strided", 20, 40, num_heads_kv=2, head_dim=24, causal=True))
    wide = torch.full((1, 40, 5, 24), float("nan"), dtype=torch.float16)
    inputs.args["v"] = wide[:, :, 2:4].copy_(inputs.args["v"])
    call = backward_call(inputs)
    wide_dout = torch.full((1, 20, 2, 40), float("nan"), dtype=torch.float16)
    call = call._replace(dout=wide_dout[..., 8:32].copy_(call.dout))
    problem = backward_problem(inputs)
    backward.bind(problem, plan_of(), call.q.device)(call)
    assert_gradients(inputs, call)
    far: dict[str, Any] = {
        name: (tensor := getattr(call, name)).as_strided(tensor.shape, (2**31, *tensor.stride()[1:])) for name in ("q", "k", "dout")
    }
    fresh: dict[str, Any] = {name: poison.nan_like(getattr(call, name)) for name in ("dq", "dk", "dv")}
    again = call._replace(**far, **fresh)
    backward.bind(problem, plan_of(), call.q.device)(again)
    assert_gradients(inputs, again)


def test_results_go_where_the_strides_of_gradients_say() -> None:
    inputs = make_forward_inputs(ForwardCase("views", 20, 40, head_dim=16))
    call = backward_call(inputs)
    packed = torch.full((1, 40, 5, 32), 7.0, dtype=torch.float16)
    views: dict[str, Any] = {"dq": packed[:, :20, 1:3, 8:24], "dk": packed[:, :, 3:4, 8:24], "dv": packed[:, :, 4:5, 8:24]}
    call = call._replace(**views)
    backward.bind(backward_problem(inputs), plan_of(), call.q.device)(call)
    assert_gradients(inputs, call)
    for view in views.values():
        view.fill_(7.0)
    assert (packed == 7.0).all()


def test_sequences_and_lengths_are_those_of_the_call() -> None:
    """A runner that was bound for one call runs others of its kind: kernels read sizes from the tensors."""
    bound = make_forward_inputs(ForwardCase("bound", (30, 4), (40, 9), head_dim=16, causal=True))
    runner = backward.bind(backward_problem(bound), plan_of(), torch.device("cpu"))
    cases: list[tuple[Any, Any]] = [((50, 4), (60, 70)), ((3, 3, 40), (5, 0, 90))]
    for seqlens_q, seqlens_k in cases:
        inputs = make_forward_inputs(ForwardCase("other", seqlens_q, seqlens_k, head_dim=16, causal=True))
        call = backward_call(inputs)
        runner(call)
        assert_gradients(inputs, call)


def test_a_grid_that_no_launch_holds_is_refused() -> None:
    inputs = make_forward_inputs(ForwardCase("grid", (4,), (9,), head_dim=16))
    runner = backward.bind(backward_problem(inputs), plan_of(), torch.device("cpu"))
    call = backward_call(inputs)
    for refused in (call._replace(max_seqlen_q=2**36), call._replace(max_seqlen_k=2**36)):
        with pytest.raises(UnsupportedError, match="2147483647"):
            runner(refused)
