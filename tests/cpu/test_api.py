"""The public functions: results against the reference, what a call allocates, what it remembers, and merge."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import flashtile
from flashtile import reference
from flashtile.errors import ArgumentError
from flashtile.facts import decode_key
from flashtile.ops import decode as ops
from flashtile.ops import prepared as prepared_calls
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem
from flashtile.rounding import length_bucket, query_bucket
from flashtile.testing.cases import SMALL_CASES, Case
from flashtile.testing.inputs import make_inputs
from flashtile.testing.tolerance import assert_close
from tests.cpu.bound_plans import bound_plans

INF = float("inf")
CHOSEN = {
    "length_zero", "no_capacity", "batch_zero", "no_queries", "ragged", "ragged_no_queries", "ragged_batch_zero",
    "pages_of_3_hnd", "value_dim_smaller_paged", "window_paged_ragged", "everything", "everything_contiguous_fp32",
}  # fmt: skip


def small(**changes: Any) -> dict[str, Any]:
    return make_inputs(Case("small", (9, 30), capacity=40, dtype="float32", **changes)).args


@pytest.mark.parametrize("case", [case for case in SMALL_CASES if case.name in CHOSEN], ids=lambda case: case.name)
def test_agrees_with_the_reference(case: Case) -> None:
    inputs = make_inputs(case)
    out, lse = flashtile.decode_with_lse(**inputs.args)
    expected_out, expected_lse = reference.decode(**inputs.args)
    q = inputs.args["q"]
    assert out.shape == (*q.shape[:-1], case.head_dim_v)
    assert out.dtype == q.dtype
    assert lse.shape == (*q.shape[:-3], q.shape[-2], q.shape[-3])
    assert lse.dtype == torch.float32
    assert_close(out, lse, expected_out, expected_lse)
    torch.testing.assert_close(flashtile.decode(**inputs.args), out, rtol=0, atol=0, equal_nan=False)


def test_every_name_is_public() -> None:
    for name in flashtile.__all__:
        assert getattr(flashtile, name) is not None
        assert name in dir(flashtile)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = flashtile.no_such_name  # type: ignore[attr-defined]


def test_out_is_written_and_returned() -> None:
    args = small()
    expected = flashtile.decode(**args)
    out = torch.full_like(expected, float("nan"))
    assert flashtile.decode(**args, out=out) is out
    assert torch.equal(out, expected)


def test_out_is_contiguous_whatever_q_is() -> None:
    args = small(seqlens_q=3)
    args["q"] = args["q"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not args["q"].is_contiguous()
    assert flashtile.decode(**args).is_contiguous()


def test_partial_results_are_float32() -> None:
    args = make_inputs(Case("half", (9, 30), dtype="bfloat16")).args
    out, lse = flashtile.decode_with_lse(**args, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    assert (out != out.bfloat16().float()).any(), "rounded to bfloat16 before it was stored"
    assert_close(out, lse, *reference.decode(**args), dtype=torch.bfloat16)


@pytest.mark.parametrize("paged", [False, True])
def test_no_capacity_leaves_the_sink(paged: bool) -> None:
    sinks = torch.tensor([0.5, -1.0])
    args: dict[str, Any] = {
        "q": torch.randn(3, 2, 2, 8),
        "k_cache": torch.randn(0, 4, 1, 8) if paged else torch.randn(3, 0, 1, 8),
        "seqlens_k": torch.full((3,), 7, dtype=torch.int32),
        "page_table": torch.zeros(3, 2, dtype=torch.int32) if paged else None,
    }
    args["v_cache"] = args["k_cache"]
    out, lse = flashtile.decode_with_lse(**args)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full((3, 2, 2), -INF))
    out, lse = flashtile.decode_with_lse(**args, sinks=sinks)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, sinks[None, :, None].expand(3, 2, 2))


def test_no_capacity_gives_unowned_rows_no_sink() -> None:
    cache = torch.randn(1, 0, 1, 8)
    _, lse = flashtile.decode_with_lse(
        torch.randn(3, 2, 8), cache, cache, torch.zeros(1, dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, 2], dtype=torch.int32), max_seqlen_q=2, sinks=torch.tensor([0.5, -1.0]),
    )  # fmt: skip
    assert torch.equal(lse, torch.tensor([[0.5, 0.5, -INF], [-1.0, -1.0, -INF]]))


@pytest.mark.parametrize("hint", [0, 1, 9, 40])
def test_the_hint_changes_no_result(hint: int) -> None:
    args = small()
    torch.testing.assert_close(flashtile.decode(**args, max_seqlen_k=hint), flashtile.decode(**args))


@pytest.mark.parametrize("changes", [{"layout": "HND"}, {"offset_elements": 1}, {"page_size": 3, "alibi": True, "sinks": True}], ids=str)
def test_kernels_get_the_callers_own_tensors(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Module:
        @staticmethod
        def bind(problem: Problem, plan: DecodePlan, device: torch.device) -> Any:
            return calls.append

    monkeypatch.setattr(ops, "kernel_module", lambda plan: Module)
    monkeypatch.setattr(ops, "_PREPARED", {})
    args = small(**changes)
    out = torch.empty_like(args["q"])
    assert flashtile.decode(**args, out=out) is out
    tensors = {name: value for name, value in args.items() if isinstance(value, torch.Tensor)}
    assert calls[0].out is out
    assert all(getattr(calls[0], name) is tensor for name, tensor in tensors.items())


@pytest.mark.parametrize("changes", [{}, {"softcap": 5.0}, {"ragged_q": True}, {"page_size": 3}], ids=str)
def test_no_gradient_flows(changes: dict[str, Any]) -> None:
    args = small(**changes)
    plain = flashtile.decode_with_lse(**args)
    for name in ("q", "k_cache", "v_cache"):
        args[name].requires_grad_()
    tracked = flashtile.decode_with_lse(**args)
    assert [part.requires_grad for part in tracked] == [False, False]
    assert all(torch.equal(a, b) for a, b in zip(plain, tracked))


def test_an_explicit_plan_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    args = small()
    bound = bound_plans(ops, monkeypatch)
    expected = flashtile.decode(**args)
    wanted = bound[0].with_(block_m=64)
    torch.testing.assert_close(flashtile.decode(**args, plan=wanted), expected)
    assert bound[1:] == [wanted]
    flashtile.decode(**args, block_m=32)
    assert bound[2].block_m == 32


def test_a_warm_call_neither_checks_nor_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    args = small()
    expected = flashtile.decode(**args)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a warm call came to the slow path")

    monkeypatch.setattr(Problem, "decode", refuse)
    monkeypatch.setattr(ops, "plan_decode", refuse)
    assert torch.equal(flashtile.decode(**args), expected)
    monkeypatch.setattr(ops, "_PREPARED", {})
    with pytest.raises(AssertionError, match="slow path"):
        flashtile.decode(**args)


def key_of(q: torch.Tensor, k_cache: torch.Tensor, seqlens_k: torch.Tensor, **others: Any) -> Any:
    names = (
        "page_table", "cu_seqlens_q", "max_seqlen_q", "max_seqlen_k", "causal", "window", "softcap", "sinks", "alibi_slopes",
        "k_scale", "v_scale", "leftpad_k", "out", "out_dtype", "block_m", "num_splits", "plan", "allow_tf32", "after_append", "lse",
    )  # fmt: skip
    defaults = {"causal": True, "softcap": 0.0, "allow_tf32": False, "after_append": False, "lse": False}
    return decode_key(q, k_cache, k_cache, seqlens_k, *({**defaults, **others}.get(name) for name in names))  # type: ignore[arg-type]


@pytest.mark.parametrize("grows", ["contiguous", "page_table", "hint"])
def test_a_thousand_growing_lengths_share_a_handful_of_keys(grows: str) -> None:
    q, lengths = torch.randn(1, 1, 2, 8), torch.zeros(1, dtype=torch.int32)
    keys = set()
    for length in range(3000, 4000):
        if grows == "contiguous":
            keys.add(key_of(q, torch.empty(1, length, 1, 8), lengths))
        elif grows == "page_table":
            keys.add(key_of(q, torch.empty(length, 1, 1, 8), lengths, page_table=torch.empty(1, length, dtype=torch.int32)))
        else:
            keys.add(key_of(q, torch.empty(1, 8192, 1, 8), lengths, max_seqlen_k=length))
    assert None not in keys
    assert len(keys) <= 5


def test_what_shares_a_key_shares_a_problem() -> None:
    """Over calls that differ in everything: equal keys come with equal Problems (calls that fail the checks included)."""
    lengths = torch.zeros(2, dtype=torch.int32)
    starts = torch.tensor([0, 1, 2], dtype=torch.int32)
    buffer = torch.zeros(2 * 40 * 2 * 16 + 8)
    problems: dict[Any, Problem] = {}
    calls = 0
    for packed in (False, True):
        for heads in (2, 4):
            for capacity in (3, 9, 33, 40):
                for shift in (0, 1, 2):
                    for hint in (None, 0, 3):
                        for window in (None, (4, None), (4, 0)):
                            q = torch.zeros(2 + 3 * packed, heads, 16) if packed else torch.zeros(2, 1, heads, 16)
                            k = buffer[shift : shift + 2 * capacity * 2 * 16].view(2, capacity, 2, 16)
                            more: dict[str, Any] = {"cu_seqlens_q": starts, "max_seqlen_q": 1} if packed else {}
                            more |= {"max_seqlen_k": hint, "window": window}
                            key = key_of(q, k, lengths, **more)
                            problem = Problem.decode(q, k, k, lengths, **more)
                            assert problems.setdefault(key, problem) == problem
                            calls += 1
    assert None not in problems
    assert 10 < len(problems) < calls


def test_quantised_caches_have_keys_of_their_own() -> None:
    q, lengths = torch.zeros(2, 1, 4, 16, dtype=torch.float16), torch.zeros(2, dtype=torch.int32)
    cache = torch.zeros(2, 33, 2, 16)
    scales = {"none": None, "tensor": torch.ones(1), "head": torch.ones(2), "sequence": torch.ones(2, 2)}
    problems: dict[Any, Problem] = {}
    for dtype in (torch.float16, torch.float8_e4m3fn, torch.int8):
        for k_scale in scales.values() if dtype.itemsize == 1 else (None,):
            for v_scale in scales.values() if dtype.itemsize == 1 else (None,):
                stored = cache.to(dtype)
                key = key_of(q, stored, lengths, k_scale=k_scale, v_scale=v_scale)
                problem = Problem.decode(q, stored, stored, lengths, k_scale=k_scale, v_scale=v_scale)
                assert problems.setdefault(key, problem) == problem
    assert None not in problems
    assert len(problems) == len(set(problems.values())) == 1 + 2 * 16
    assert {(p.k_scales, p.v_scales) for p in problems.values()} == {(k, v) for k in scales for v in scales}


def test_a_quantised_cache_is_aligned_by_its_bytes() -> None:
    q, lengths = torch.zeros(1, 1, 4, 24, dtype=torch.float16), torch.zeros(1, dtype=torch.int32)
    for dtype, alignment, size in ((torch.float16, 16, 2), (torch.float8_e4m3fn, 8, 1), (torch.int8, 8, 1)):
        cache = torch.zeros(1, 32, 1, 24).to(dtype)
        problem = Problem.decode(q, cache, cache, lengths)
        assert problem.alignment == alignment
        assert problem.kv_bytes == 2 * 64 * 24 * size


def test_buckets_bound_what_they_round() -> None:
    for length in range(1, 5000):
        assert length <= length_bucket(length) <= max(length + 63, length * 9 // 8)
        assert length <= query_bucket(length) <= length * 9 // 8
    assert length_bucket(0) == query_bucket(0) == 0
    assert len({length_bucket(n) for n in range(4097, 8193)}) == 8


def test_the_memory_of_prepared_calls_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_PREPARED", {})
    monkeypatch.setattr(prepared_calls, "MAX_PREPARED", 3)
    for batch in range(1, 8):
        cache = torch.zeros(batch, 4, 1, 8)
        flashtile.decode(torch.zeros(batch, 1, 1, 8), cache, cache, torch.zeros(batch, dtype=torch.int32))
    assert len(ops._PREPARED) == 3


def test_threads_share_what_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_PREPARED", {})
    args = small()
    expected = reference.decode(**args)[0]
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(flashtile.decode(**args))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    for out in results:
        torch.testing.assert_close(out, expected.to(out.dtype))
    assert len(ops._PREPARED) == 1


# The debug switch


def test_checked_accepts_what_is_right() -> None:
    for case in SMALL_CASES:
        if case.name in {"pages_of_16", "window_paged_ragged", "everything", "length_zero", "batch_zero"}:
            with flashtile.checked():
                flashtile.decode(**make_inputs(case).args)


@pytest.mark.parametrize(("lengths", "entry"), [((9, 41), 1), ((-1, 50), 0)])
def test_checked_names_the_first_bad_length(lengths: tuple[int, int], entry: int) -> None:
    args = small() | {"seqlens_k": torch.tensor(lengths, dtype=torch.int32)}
    flashtile.decode(**args)
    with flashtile.checked(), pytest.raises(ArgumentError, match=rf"seqlens_k\[{entry}\]: .*capacity, 40, got {lengths[entry]}\."):
        flashtile.decode(**args)
    flashtile.decode(**args)


def test_checked_names_the_first_bad_page() -> None:
    args = small(page_size=8)
    args["page_table"][1, 3] = 1000
    flashtile.decode(**args)
    with flashtile.checked(), pytest.raises(ArgumentError, match=r"page_table\[1, 3\]: .* got 1000"):
        flashtile.decode(**args)
    args["seqlens_k"][1] = 24
    with flashtile.checked():
        flashtile.decode(**args)


def test_checked_forgives_pages_that_the_window_has_left() -> None:
    args = small(page_size=8)
    args["page_table"][1, 0] = -1
    with flashtile.checked():
        flashtile.decode(**args | {"window": (10, 0)})
        with pytest.raises(ArgumentError, match=r"page_table\[1, 0\]"):
            flashtile.decode(**args)


@pytest.mark.parametrize(("starts", "entry"), [((1, 2, 5), 0), ((0, 3, 2), 2), ((0, 1, 6), 2), ((0, 4, 5), 1)])
def test_checked_names_the_first_bad_start(starts: tuple[int, ...], entry: int) -> None:
    args = small(seqlens_q=(2, 3), ragged_q=True)
    flashtile.decode(**args)
    args["cu_seqlens_q"] = torch.tensor(starts, dtype=torch.int32)
    with flashtile.checked(), pytest.raises(ArgumentError, match=rf"cu_seqlens_q\[{entry}\]"):
        flashtile.decode(**args)


# merge


def test_merge_of_key_ranges_is_attention_over_all() -> None:
    args = small(seqlens_q=1)
    lengths = args["seqlens_k"]
    expected_out, expected_lse = flashtile.decode_with_lse(**args)
    outs, lses = [], []
    for start, end in ((0, 4), (4, 21), (21, 40)):
        part = {"k_cache": args["k_cache"][:, start:end], "v_cache": args["v_cache"][:, start:end], "causal": False}
        part["seqlens_k"] = (lengths - start).clamp(0, end - start).to(torch.int32)
        out, lse = flashtile.decode_with_lse(**args | part)
        outs.append(out)
        lses.append(lse)
    out, lse = flashtile.merge(outs, lses)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)
