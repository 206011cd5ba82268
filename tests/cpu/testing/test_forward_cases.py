"""Forward cases and their tensors: what they cover, and that NaN lies wherever a kernel must not look."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from flashtile.problem import Problem
from flashtile.testing.forward_cases import FORWARD_CASES, ForwardCase
from flashtile.testing.forward_inputs import expected_forward, forward_call, make_forward_inputs
from flashtile.testing.poison import outputs

NAMED = {case.name: case for case in FORWARD_CASES}


def around(tensor: torch.Tensor) -> torch.Tensor:
    """Which elements of a tensor's buffer (n,) are not the tensor's."""
    buffer = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    mine = torch.zeros(buffer.shape, dtype=torch.bool)
    torch.as_strided(mine, tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    return buffer[~mine]


def test_names_are_unique() -> None:
    assert len(NAMED) == len(FORWARD_CASES)


def test_they_cover_what_a_kernel_branches_on() -> None:
    assert {(case.head_dim, case.head_dim_v) for case in FORWARD_CASES} >= {
        *((dim, dim) for dim in (8, 40, 64, 80, 96, 128, 192, 256)), (192, 128), (64, 128),
    }  # fmt: skip
    assert {case.dtype for case in FORWARD_CASES} == {"float16", "bfloat16", "float32"}
    assert {case.page_size for case in FORWARD_CASES} == {0, 1, 3, 16, 64, 128}
    edges = {1, *(size + by for size in (64, 128, 192) for by in (-1, 0, 1))}
    assert {case.seqlens_q for case in FORWARD_CASES} >= edges
    assert {case.seqlens_k for case in FORWARD_CASES} >= edges


@pytest.mark.parametrize("case", FORWARD_CASES, ids=lambda c: c.name)
def test_every_case_is_a_call_with_an_answer(case: ForwardCase) -> None:
    inputs = make_forward_inputs(case)
    problem = Problem.forward(**inputs.args)
    assert (problem.ragged_q, problem.ragged_k) == (case.varlen, case.varlen and not case.page_size)
    out, lse = expected_forward(inputs)
    assert out.isfinite().all()
    assert not lse.isnan().any()
    assert (out.shape, lse.shape) == tuple(tensor.shape for tensor in outputs(inputs.args["q"], case.head_dim_v))


@pytest.mark.parametrize("case", FORWARD_CASES, ids=lambda c: c.name)
def test_memory_around_the_tensors_is_nan(case: ForwardCase) -> None:
    inputs = make_forward_inputs(case)
    for name in ("q", "k", "v"):
        tensor, outside = inputs.args[name], around(inputs.args[name])
        assert outside.isnan().all(), name
        if case.padding and not (case.page_size and name != "q") and tensor.numel():
            assert outside.numel() > 0, name
        assert tensor.numel() == 0 or tensor.stride(-1) == 1
        assert tensor.storage_offset() == case.offset_elements


def test_rows_and_keys_that_do_not_count_are_nan() -> None:
    args = make_forward_inputs(NAMED["varlen_seqused"]).args
    starts, used = args["cu_seqlens_k"].tolist(), args["seqused_k"].tolist()
    for (start, stop), count in zip(pairwise(starts), used):
        for name in ("k", "v"):
            assert args[name][start : start + count].isfinite().all()
            assert args[name][start + count : stop].isnan().all()
    args = make_forward_inputs(NAMED["varlen_spare_rows"]).args
    assert args["q"].shape[0] - int(args["cu_seqlens_q"][-1]) == 70
    assert args["q"][int(args["cu_seqlens_q"][-1]) :].isnan().all()
    assert args["k"][int(args["cu_seqlens_k"][-1]) :].isnan().all()


def test_pages_hold_each_sequence_and_nan() -> None:
    args = make_forward_inputs(NAMED["pages_missing"]).args
    table, num_pages, lengths = args["page_table"], args["k"].shape[0], args["seqused_k"].tolist()
    for ids, length in zip(table, lengths):
        inside = ids[: -(-length // 16)]
        exists = (inside >= 0) & (inside < num_pages)
        assert int((~exists).sum()) == 1
        assert ((ids[len(inside) :] < 0) | (ids[len(inside) :] >= num_pages)).all()
        last = args["k"][int(inside[-1])] if exists[-1] else None
        assert last is None or length % 16 == 0 or last[length % 16 :].isnan().all()
    owned = {int(i) for i in table.flatten() if 0 <= i < num_pages}
    assert args["k"].isnan().flatten(1).all(dim=1).sum() >= 3
    assert all(not args["v"][i].isnan().all() for i in owned)


def test_rising_keys_move_the_maximum_at_most_steps() -> None:
    args = make_forward_inputs(NAMED["large_logits"]).args
    scores = torch.einsum("qd,kd->qk", args["q"][0, :, 0].double(), args["k"][0, :, 0].double())
    maxima = torch.stack([tile.amax(dim=1) for tile in scores.split(64, dim=1)]).cummax(dim=0).values
    assert (maxima.diff(dim=0) > 0).double().mean() > 0.5


def test_one_seed_gives_one_set_of_tensors() -> None:
    case = NAMED["everything_fp32"]
    first, again, other = (make_forward_inputs(case, seed=seed).args["q"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_call_has_the_tensors_and_numbers_of_the_inputs() -> None:
    inputs = make_forward_inputs(NAMED["varlen_everything"])
    out, lse = outputs(inputs.args["q"], inputs.case.head_dim_v)
    call = forward_call(inputs, out, lse)
    for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "page_table", "sinks", "alibi_slopes"):
        assert getattr(call, name) is inputs.args[name]
    assert (call.max_seqlen_q, call.scale, call.softcap) == (70, 40**-0.5, 15.0)
    assert forward_call(make_forward_inputs(NAMED["negative_scale"]), out, None).scale == -0.25


@pytest.mark.parametrize(
    "wrong",
    [
        {"seqlens_q": (3,), "seqlens_k": 3},
        {"seqlens_q": (3, 4), "seqlens_k": (3,)},
        {"seqlens_q": 3, "seqlens_k": 3, "page_size": 16},
        {"seqlens_q": (3,), "seqlens_k": (3,), "page_size": 16, "seqused_k": (2,)},
        {"seqlens_q": 3, "seqlens_k": 3, "layout": "HDN"},
    ],
)
def test_descriptions_that_make_no_sense_raise(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="case wrong"):
        ForwardCase("wrong", **wrong)  # type: ignore[arg-type]
