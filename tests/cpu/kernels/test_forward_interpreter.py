"""The portable forward kernel in Triton's interpreter against the reference: every small case, over tiles.

The cases take turns at the tiles; each case meets one. bfloat16 cases run as float16: the interpreter's product of bfloat16
is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from flashtile import reference
from flashtile.band import Band
from flashtile.errors import UnsupportedError
from flashtile.planner.forward_footprint import parts_of
from flashtile.planner.plans import ForwardPlan
from flashtile.problem import Problem
from flashtile.testing import poison
from flashtile.testing.forward_cases import FORWARD_CASES, ForwardCase
from flashtile.testing.forward_inputs import ForwardInputs, expected_forward, forward_call, make_forward_inputs
from flashtile.testing.tolerance import assert_close

pytest.importorskip("triton")
from flashtile.kernels import forward
from flashtile.kernels.call import ForwardCall

# NumPy computes both branches of a select, log2(0) and 1/0 of rows without keys among them
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton 3.6 with NumPy 2
]

TILES = ((16, 16), (64, 32), (128, 64), (32, 128), (128, 16), (64, 64), (32, 32), (16, 64), (128, 128))
"""(block_m, block_n): rows above and below the head dims, key tiles above and below the rows."""


def plan_of(block_m: int = 32, block_n: int = 16) -> ForwardPlan:
    return ForwardPlan("triton.forward", block_m=block_m, block_n=block_n, num_warps=4, num_stages=2)


def problem_of(inputs: ForwardInputs, *, lse: bool = True) -> Problem:
    """The problem that the kernel is bound for."""
    case, used = inputs.case, inputs.args.get("seqused_k")
    return Problem(
        operation="forward", batch=case.batch, seqlen_q=max(case.query_lengths, default=0), total_q=sum(case.query_lengths),
        seqlen_k=max(case.key_lengths, default=0), num_heads_q=case.num_heads_q, num_heads_kv=case.num_heads_kv,
        head_dim=case.head_dim, head_dim_v=case.head_dim_v, dtype_q=case.dtype, band=Band.of(case.causal, case.window),
        softcap=case.softcap != 0.0, alibi=case.alibi, sinks=case.sinks, lse=lse, page_size=case.page_size,
        ragged_q=case.varlen, ragged_k=case.varlen and not case.page_size, seqused_k=used is not None,
        alignment=min(16, (case.offset_elements or 16) * inputs.args["q"].element_size()),
    )  # fmt: skip


def run(
    inputs: ForwardInputs, plan: ForwardPlan, *, lse: bool = True, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, NaN where nothing was written."""
    fresh, lse_out = poison.outputs(inputs.args["q"], inputs.case.head_dim_v)
    call = forward_call(inputs, fresh if out is None else out, lse_out if lse else None)
    forward.bind(problem_of(inputs, lse=lse), plan, call.q.device)(call)
    return call.out, lse_out


def check(inputs: ForwardInputs, plan: ForwardPlan) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = run(inputs, plan)
    assert_close(out, lse, *expected_forward(inputs), dtype=inputs.dtype, what=inputs.case.name)
    return out, lse


def trials() -> Iterator[Any]:
    # a call without sequences runs no kernel
    for turn, case in enumerate(case for case in FORWARD_CASES if case.batch):
        block_m, block_n = TILES[(7 * turn + 2) % len(TILES)]  # so that the longest cases do not meet the smallest tiles
        if case.dtype == "bfloat16":
            case = replace(case, dtype="float16")
        yield pytest.param(case, plan_of(block_m, block_n), id=f"{case.name}-m{block_m}-n{block_n}")


@pytest.mark.parametrize(("case", "plan"), list(trials()))
def test_every_case_matches_the_reference(case: ForwardCase, plan: ForwardPlan) -> None:
    check(make_forward_inputs(case, seed=3), plan)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_of_any_sign(scale: float) -> None:
    plain = ForwardCase("scale", 20, 40, head_dim=16, scale=scale, causal=True)
    for case in (plain, replace(plain, softcap=9.0), replace(plain, alibi=True)):
        check(make_forward_inputs(case), plan_of())


def test_one_runner_takes_scales_of_both_signs() -> None:
    positive, negative = (make_forward_inputs(ForwardCase("signs", 20, 40, head_dim=16, scale=scale)) for scale in (0.2, -0.2))
    runner = forward.bind(problem_of(positive), plan_of(), torch.device("cpu"))
    for inputs in (positive, negative, positive):
        call = forward_call(inputs, *poison.outputs(inputs.args["q"], 16))
        runner(call)
        assert_close(call.out, call.lse, *expected_forward(inputs))


@pytest.mark.parametrize("varlen", [False, True])
def test_an_lse_that_is_not_wanted_is_not_written(varlen: bool) -> None:
    lengths: Any = ((20, 3), (40, 9)) if varlen else (20, 40)
    inputs = make_forward_inputs(ForwardCase("no lse", *lengths, head_dim=16, sinks=True, spare_rows=2 * varlen))
    out, lse = run(inputs, plan_of(), lse=False)
    assert_close(out, None, expected_forward(inputs)[0], None)
    assert lse.isnan().all()


@pytest.mark.parametrize("sinks", [False, True])
def test_spare_rows_of_a_packed_q_are_empty(sinks: bool) -> None:
    inputs = make_forward_inputs(ForwardCase("spare", (2, 0), (40, 25), head_dim=16, spare_rows=40, sinks=sinks))
    out, lse = check(inputs, plan_of(16, 16))
    assert (out[2:] == 0).all()
    assert (lse[:, 2:] == float("-inf")).all()


WILD_STARTS = [(0, -5), (-4, 2), (0, 2**30), (5, 3), (-(2**31), 2**31 - 1)]


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("starts", WILD_STARTS)
def test_starts_that_make_no_sense_read_and_write_nothing_outside(starts: tuple[int, int]) -> None:
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        inputs = make_forward_inputs(ForwardCase("starts", (4,), (40,), head_dim=16, padding=0))
        inputs.args[name] = torch.tensor(starts, dtype=torch.int32)
        guarded = torch.full((300, 2, 16), 7.0, dtype=torch.float16)
        run(inputs, plan_of(), out=guarded[100:104])
        assert (guarded[:100] == 7.0).all()
        assert (guarded[104:] == 7.0).all()
        assert guarded.isfinite().all()


@pytest.mark.parametrize(("page_size", "block_n"), [(16, 16), (64, 16), (5, 32)])
def test_freed_pages_left_of_a_window_are_never_read(page_size: int, block_n: int) -> None:
    length, queries, left = 200, 20, 40
    inputs = make_forward_inputs(ForwardCase("freed", (queries, 5), (length, 50), head_dim=16, page_size=page_size, window=(left, 0)))
    plan = plan_of(16, block_n)
    out, lse = check(inputs, plan)
    table = inputs.args["page_table"]
    free = (length - queries - left) // page_size
    for name in ("k", "v"):
        inputs.args[name][table[0, :free].long()] = float("nan")
    unowned = sorted(set(range(len(inputs.args["k"]))) - set(table.flatten().tolist()))
    for filler in (unowned[0], 2**31 - 1):
        table[0, :free] = filler
        again, lse_again = run(inputs, plan)
        assert torch.equal(again[:queries], out[:queries])
        assert torch.equal(lse_again[:, :queries], lse[:, :queries])


@pytest.mark.parametrize("bad", [2**31 - 1, -(2**31), -1])
def test_page_ids_outside_the_cache_hide_their_keys(bad: int) -> None:
    for page_size, block_n in ((16, 16), (5, 32)):
        inputs = make_forward_inputs(ForwardCase("hidden", (20, 9, 5), (60, 40, 5), head_dim=16, page_size=page_size))
        inputs.args["page_table"][0, 1], inputs.args["page_table"][1, 0], inputs.args["page_table"][2] = bad, bad, bad
        out, _ = check(inputs, plan_of(16, block_n))
        assert (out[29:] == 0).all()


@pytest.mark.parametrize("window", [(2**31 - 1, 0), (2**31 - 1, 2**31 - 1), (None, 2**31 - 1), (2**40, None), (3, 2**31 - 2)])
def test_windows_wider_than_any_sequence(window: tuple[int | None, int | None]) -> None:
    check(make_forward_inputs(ForwardCase("wide", 25, 40, head_dim=16, window=window)), plan_of(16, 16))


def test_keys_are_read_by_their_strides_however_far() -> None:
    """V laid out unlike K, and strides over sequences that leave 32 bits: layouts that are compiled when they come."""
    inputs = make_forward_inputs(ForwardCase("strided", 20, 40, num_heads_kv=2, head_dim=24, causal=True))
    wide = torch.full((1, 40, 5, 24), float("nan"), dtype=torch.float16)
    inputs.args["v"] = wide[:, :, 2:4].copy_(inputs.args["v"])
    check(inputs, plan_of())
    for name in ("k", "v"):
        tensor = inputs.args[name]
        inputs.args[name] = tensor.as_strided(tensor.shape, (2**31, *tensor.stride()[1:]))
    check(inputs, plan_of())


def test_results_go_where_the_strides_of_out_say() -> None:
    inputs = make_forward_inputs(ForwardCase("out", 20, 40, head_dim=16))
    wide = torch.full((1, 20, 5, 32), 7.0, dtype=torch.float16)
    out, lse = run(inputs, plan_of(), out=wide[:, :, 1:3, 8:24])
    assert_close(out, lse, *expected_forward(inputs))
    wide[:, :, 1:3, 8:24] = 7.0
    assert (wide == 7.0).all()


def test_sequences_and_lengths_are_those_of_the_call() -> None:
    """A runner that was bound for one call runs others of its kind: kernels read sizes from the tensors."""
    bound = make_forward_inputs(ForwardCase("bound", (30, 4), (40, 9), head_dim=16, causal=True))
    runner = forward.bind(problem_of(bound), plan_of(), torch.device("cpu"))
    for lengths in (((50, 4), (60, 70)), ((3, 3, 40), (5, 0, 90))):
        inputs = make_forward_inputs(ForwardCase("other", *lengths, head_dim=16, causal=True))
        call = forward_call(inputs, *poison.outputs(inputs.args["q"], 16))
        runner(call)
        assert_close(call.out, call.lse, *expected_forward(inputs))


def test_a_grid_that_no_launch_holds_is_refused() -> None:
    inputs = make_forward_inputs(ForwardCase("grid", (4,), (9,), head_dim=16))
    call: ForwardCall = forward_call(inputs, *poison.outputs(inputs.args["q"], 16))
    with pytest.raises(UnsupportedError, match="2147483647"):
        forward.bind(problem_of(inputs), plan_of(16), torch.device("cpu"))(call._replace(max_seqlen_q=2**34))


@pytest.mark.parametrize("head_dim", range(8, 264, 8))
def test_parts_hold_a_head_dim_and_no_more_than_padding_would(head_dim: int) -> None:
    padded = max(16, 1 << (head_dim - 1).bit_length())
    for whole, rest in (parts_of(head_dim), *(forward.value_parts(head_dim, block_m) for block_m in (16, 64, 128))):
        assert all(part & (part - 1) == 0 for part in (whole, rest))
        assert head_dim <= whole + rest <= padded
        assert rest == 0 or whole < head_dim


def test_head_dims_of_two_parts() -> None:
    assert {dim: parts_of(dim) for dim in (8, 40, 64, 80, 96, 192, 256)} == {
        8: (16, 0), 40: (64, 0), 64: (64, 0), 80: (64, 32), 96: (64, 32), 192: (128, 64), 256: (256, 0),
    }  # fmt: skip
    assert forward.value_parts(256, block_m=128) == (128, 128)
    assert forward.value_parts(192, block_m=64) == (128, 64)
    assert forward.value_parts(16, block_m=16) == (16, 0)


def test_a_float32_result_of_float16_inputs_is_nearer_to_the_reference() -> None:
    inputs = make_forward_inputs(ForwardCase("wide out", 20, 40, head_dim=16))
    out = torch.empty(1, 20, 2, 16)
    call = forward_call(inputs, out, poison.outputs(inputs.args["q"], 16)[1])
    forward.bind(problem_of(inputs).with_(dtype_out="float32"), plan_of(), torch.device("cpu"))(call)
    expected, _ = reference.forward(**inputs.args)
    assert (out - expected).norm() < (run(inputs, plan_of())[0] - expected).norm()
