"""attention and attention_varlen: results against the reference, what a call returns, and when it has gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashtile
from flashtile.errors import UnsupportedError
from flashtile.testing.forward_cases import FORWARD_CASES, ForwardCase
from flashtile.testing.forward_inputs import expected_forward, make_forward_inputs
from flashtile.testing.tolerance import assert_close
from tests.cpu.attention_calls import plain, run, run_with_lse, varlen

INF = float("inf")
CHOSEN = {
    "more_queries_sinks_causal_fp32", "batch_zero", "no_queries", "no_keys", "no_keys_sinks", "dim_192_value_128", "hnd_fp32",
    "offset_by_one_hnd_fp32", "everything_fp32", "varlen_empty_on_either_side", "varlen_spare_rows", "varlen_all_empty",
    "varlen_batch_zero", "varlen_no_rows", "varlen_seqused_absurd_fp32", "varlen_everything", "pages_of_1", "pages_of_3_hnd",
    "pages_beyond_capacity", "pages_missing", "pages_batch_zero",
}  # fmt: skip


# Results


@pytest.mark.parametrize("case", [case for case in FORWARD_CASES if case.name in CHOSEN], ids=lambda case: case.name)
def test_agrees_with_the_reference(case: ForwardCase) -> None:
    inputs = make_forward_inputs(case)
    out, lse = run_with_lse(inputs.args)
    q = inputs.args["q"]
    assert out.shape == (*q.shape[:-1], case.head_dim_v)
    assert out.dtype == q.dtype
    assert lse.shape == (*q.shape[:-3], q.shape[-2], q.shape[-3])
    assert lse.dtype == torch.float32
    assert_close(out, lse, *expected_forward(inputs), dtype=inputs.dtype, cpu_engine=True)
    torch.testing.assert_close(run(inputs.args), out, rtol=0, atol=0, equal_nan=False)


def test_every_chosen_case_exists() -> None:
    assert {case.name for case in FORWARD_CASES} >= CHOSEN


@pytest.mark.parametrize("args", [plain(), varlen(), varlen(page_size=8)], ids=["plain", "packed", "paged"])
def test_out_is_written_and_returned(args: dict[str, Any]) -> None:
    expected = run(args)
    out = torch.full_like(expected, float("nan"))
    assert run(args, out=out) is out
    assert torch.equal(out, expected)


def test_out_is_contiguous_whatever_q_is() -> None:
    args = plain(layout="HND")
    assert not args["q"].is_contiguous()
    assert run(args).is_contiguous()


def test_sequences_of_one_length_may_be_packed() -> None:
    args = plain(padding=0) | {"causal": True}
    out, lse = run_with_lse(args)
    starts = {"cu_seqlens_q": torch.tensor([0, 9, 18], dtype=torch.int32), "cu_seqlens_k": torch.tensor([0, 30, 60], dtype=torch.int32)}
    flat = {name: args[name].flatten(0, 1) for name in ("q", "k", "v")}
    packed_out, packed_lse = run_with_lse(args | flat | starts | {"max_seqlen_q": 9})
    torch.testing.assert_close(packed_out.view_as(out), out)
    torch.testing.assert_close(packed_lse.view(4, 2, 9).transpose(0, 1), lse)


def test_pages_give_what_decode_gives() -> None:
    args = varlen(page_size=8, causal=True, window=(20, 0))
    out, lse = run_with_lse(args)
    names = {"k": "k_cache", "v": "v_cache", "seqused_k": "seqlens_k"}
    alike = {name: value for name, value in args.items() if name not in ("cu_seqlens_k", "dropout_p")}
    decoded_out, decoded_lse = flashtile.decode_with_lse(**{names.get(name, name): value for name, value in alike.items()})
    torch.testing.assert_close(out, decoded_out)
    torch.testing.assert_close(lse, decoded_lse)


@pytest.mark.parametrize("hint", [0, 1, 9, 42])
def test_the_hint_changes_no_result(hint: int) -> None:
    torch.testing.assert_close(run(varlen(), max_seqlen_k=hint), run(varlen()))


@pytest.mark.parametrize("paged", [False, True])
def test_no_room_for_keys_leaves_the_sink_to_rows_of_somebody(paged: bool) -> None:
    sinks = torch.tensor([0.5, -1.0])
    keys = torch.randn(0, 4, 1, 8) if paged else torch.randn(0, 1, 8)
    args: dict[str, Any] = {
        "q": torch.randn(3, 2, 8), "k": keys, "v": keys, "max_seqlen_q": 2,
        "cu_seqlens_q": torch.tensor([0, 2], dtype=torch.int32),
        "cu_seqlens_k": None if paged else torch.zeros(2, dtype=torch.int32),
        "page_table": torch.zeros(1, 2, dtype=torch.int32) if paged else None,
        "seqused_k": torch.tensor([7], dtype=torch.int32),
    }  # fmt: skip
    for given, expected in ((None, torch.full((2, 3), -INF)), (sinks, torch.tensor([[0.5, 0.5, -INF], [-1.0, -1.0, -INF]]))):
        out, lse = run_with_lse(args, sinks=given)
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(lse, expected)


# Gradients


@pytest.mark.parametrize("name", ["q", "k", "v", "sinks", "alibi_slopes"])
def test_no_result_is_detached_in_silence(name: str) -> None:
    args = plain(sinks=True, alibi=True)
    expected = run(args)
    args[name].requires_grad_()
    if name == "alibi_slopes":
        with pytest.raises(UnsupportedError, match=r"alibi_slopes: .*torch\.no_grad\(\)"):
            run(args)
    else:
        out = run(args)
        assert torch.equal(out, expected)
        assert out.requires_grad
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet():
            out = run(args)
        assert torch.equal(out, expected)
        assert not out.requires_grad
    assert torch.equal(run(args | {name: args[name].detach()}), expected)
