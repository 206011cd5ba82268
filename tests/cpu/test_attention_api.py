"""attention and attention_varlen: results against the reference, what a call allocates and hands on, what it remembers, checked."""

from __future__ import annotations

import itertools
import math
import threading
from typing import Any

import pytest
import torch

import flashtile
from flashtile import reference
from flashtile.errors import ArgumentError, UnsupportedError
from flashtile.facts import forward_key
from flashtile.ops import forward as ops
from flashtile.ops import prepared as prepared_calls
from flashtile.planner.plans import ForwardPlan, Plan
from flashtile.problem import Problem
from flashtile.testing.forward_cases import FORWARD_CASES, ForwardCase
from flashtile.testing.forward_inputs import expected_forward, make_forward_inputs
from flashtile.testing.tolerance import assert_close

INF = float("inf")
CHOSEN = {
    "more_queries_sinks_causal_fp32", "batch_zero", "no_queries", "no_keys", "no_keys_sinks", "dim_192_value_128", "hnd_fp32",
    "offset_by_one_hnd_fp32", "everything_fp32", "varlen_empty_on_either_side", "varlen_spare_rows", "varlen_all_empty",
    "varlen_batch_zero", "varlen_no_rows", "varlen_seqused_absurd_fp32", "varlen_everything", "pages_of_1", "pages_of_3_hnd",
    "pages_beyond_capacity", "pages_missing", "pages_batch_zero",
}  # fmt: skip


def plain(**changes: Any) -> dict[str, Any]:
    shape = {"batch": 2, "head_dim": 16, "dtype": "float32", "num_heads_q": 4, "num_heads_kv": 2} | changes
    return make_forward_inputs(ForwardCase("plain", 9, 30, **shape)).args


def varlen(**changes: Any) -> dict[str, Any]:
    shape = {"head_dim": 16, "dtype": "float32", "num_heads_q": 4, "num_heads_kv": 2} | changes
    return make_forward_inputs(ForwardCase("varlen", (9, 4), (30, 12), **shape)).args


def run(args: dict[str, Any], **others: Any) -> torch.Tensor:
    return (flashtile.attention_varlen if "cu_seqlens_q" in args else flashtile.attention)(**args, **others)


def run_with_lse(args: dict[str, Any], **others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return (flashtile.attention_varlen_with_lse if "cu_seqlens_q" in args else flashtile.attention_with_lse)(**args, **others)


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


# What kernels get


class Noted:
    """A kernel module that takes notes and computes nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        self.plans: list[ForwardPlan] = []
        self.problems: list[Problem] = []
        monkeypatch.setattr(ops, "kernel_module", lambda plan: self)
        monkeypatch.setattr(ops, "_PREPARED", {})

    def bind(self, problem: Problem, plan: ForwardPlan, device: torch.device) -> Any:
        self.problems.append(problem)
        self.plans.append(plan)
        return self.calls.append


@pytest.mark.parametrize(
    "args",
    [plain(layout="HND"), plain(offset_elements=1, sinks=True), varlen(seqused_k=(3, 12), alibi=True), varlen(page_size=3)],
    ids=["hnd", "offset", "packed", "paged"],
)
def test_kernels_get_the_callers_own_tensors(args: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    noted = Noted(monkeypatch)
    out = torch.empty_like(args["q"])
    assert run(args, out=out) is out
    [call] = noted.calls
    assert call.out is out
    assert call.lse is None
    assert all(getattr(call, name) is value for name, value in args.items() if isinstance(value, torch.Tensor))
    assert call.max_seqlen_q == 9
    assert call.scale == 16**-0.5
    names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "page_table", "sinks", "alibi_slopes")
    assert all(getattr(call, name) is None for name in names if args.get(name) is None)


def test_a_problem_says_how_keys_come(monkeypatch: pytest.MonkeyPatch) -> None:
    noted = Noted(monkeypatch)
    for args in (plain(), varlen(), varlen(seqused_k=(3, 12)), varlen(page_size=8)):
        run(args)
    assert all(problem.operation == "forward" for problem in noted.problems)
    facts = [(p.ragged_q, p.ragged_k, p.seqused_k, p.page_size) for p in noted.problems]
    assert facts == [(False, False, False, 0), (True, True, False, 0), (True, True, True, 0), (True, False, True, 8)]
    assert [p.batch for p in noted.problems] == [2] * 4
    assert [p.seqlen_q for p in noted.problems] == [9] * 4
    assert all(problem == Problem.from_json(problem.to_json()) for problem in noted.problems)


def test_numbers_become_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    noted = Noted(monkeypatch)
    run(plain() | {"scale": 2, "softcap": 3})
    [call] = noted.calls
    assert (call.scale, call.softcap) == (2.0, 3.0)
    assert isinstance(call.scale, float)
    assert isinstance(call.softcap, float)


def test_an_explicit_plan_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    noted = Noted(monkeypatch)
    args = plain()
    run(args)
    wanted = noted.plans[0].with_(block_m=4)
    run(args, plan=wanted)
    run(args, block_m=8)
    assert noted.plans[1] == wanted
    assert noted.plans[2].block_m == 8


def test_warmup_plans_and_compiles_every_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Problem.forward(**plain())
    problems = [forward, Problem(seqlen_k=64), Problem.forward(**varlen()), forward.with_(operation="backward", lse=True)]
    prepared: list[Any] = []

    class Module:
        @staticmethod
        def prepare(problem: Problem, plan: Plan, device: torch.device) -> None:
            prepared.append((problem, plan, device))

    monkeypatch.setattr("flashtile.ops.kernel_module", lambda plan: Module)
    plans = flashtile.warmup(problems, device="cpu")
    assert [type(plan).__name__ for plan in plans] == ["ForwardPlan", "DecodePlan", "ForwardPlan", "BackwardPlan"]
    assert prepared == [(problem, plan, torch.device("cpu")) for problem, plan in zip(problems, plans)]


# What a call remembers


@pytest.mark.parametrize("args", [plain(), varlen(), varlen(page_size=8)], ids=["plain", "packed", "paged"])
def test_a_warm_call_neither_checks_nor_plans(args: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(args)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a warm call came to the slow path")

    monkeypatch.setattr(Problem, "forward", refuse)
    monkeypatch.setattr(ops, "plan_forward", refuse)
    assert torch.equal(run(args), expected)
    monkeypatch.setattr(ops, "_PREPARED", {})
    with pytest.raises(AssertionError, match="slow path"):
        run(args)


def key_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None = None, **others: Any) -> Any:
    names = (
        "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "page_table", "seqused_k", "causal", "window", "softcap",
        "sinks", "alibi_slopes", "out", "block_m", "plan", "allow_tf32", "lse",
    )  # fmt: skip
    defaults = {"causal": False, "softcap": 0.0, "allow_tf32": False, "lse": False}
    return forward_key(q, k, k if v is None else v, *({**defaults, **others}.get(name) for name in names))  # type: ignore[arg-type]


def test_neighbouring_lengths_share_a_handful_of_keys() -> None:
    starts = torch.zeros(2, dtype=torch.int32)
    keys: dict[str, set[Any]] = {"plain": set(), "packed": set(), "paged": set()}
    for length in range(3000, 4000):
        q, k = torch.empty(1, length, 2, 8), torch.empty(1, length, 1, 8)
        keys["plain"].add(key_of(q, k))
        packed = {"cu_seqlens_q": starts, "max_seqlen_q": length}
        keys["packed"].add(key_of(q[0], k[0], cu_seqlens_k=starts, max_seqlen_k=length, **packed))
        pages = {"page_table": torch.empty(1, length, dtype=torch.int32), "seqused_k": starts[:1]}
        keys["paged"].add(key_of(q[0], k.transpose(0, 1), **packed, **pages))
    for name, found in keys.items():
        assert None not in found, name
        assert len(found) <= 5, name


def test_what_shares_a_key_shares_a_problem() -> None:
    """Over calls that differ in everything, equal keys come with equal Problems."""
    starts, used = torch.tensor([0, 1, 3], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    table = torch.zeros(2, 5, dtype=torch.int32)
    buffer = torch.zeros(16 * 6 * 70 * 2 + 2)
    problems: dict[Any, Problem] = {}
    calls = 0
    kinds = ("plain", "packed", "used", "paged")
    windows = (None, (4, None), (4, 0))
    for kind, heads, size, shift, hint, window, dim_v in itertools.product(
        kinds, (2, 4), (3, 9, 33, 70), (0, 1, 2), (None, 3), windows, (8, 16)
    ):
        if hint is not None and kind == "plain":
            continue
        q = torch.zeros(2, 20, heads, 8) if kind == "plain" else torch.zeros(25, heads, 8)
        shape = {"plain": (2, size, 2), "paged": (6, size, 2)}.get(kind, (size, 2))
        k, v = (buffer[shift : shift + math.prod(shape) * dim].view(*shape, dim) for dim in (8, dim_v))
        more: dict[str, Any] = {"window": window, "max_seqlen_k": hint}
        if kind != "plain":
            more |= {"cu_seqlens_q": starts, "max_seqlen_q": 21}
            more |= {"page_table": table} if kind == "paged" else {"cu_seqlens_k": starts}
        if kind in ("used", "paged"):
            more["seqused_k"] = used
        key, problem = key_of(q, k, v, **more), Problem.forward(q, k, v, **more)
        assert key is not None
        assert problems.setdefault(key, problem) == problem
        calls += 1
    assert 10 < len(problems) < calls


def test_the_memory_of_prepared_calls_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_PREPARED", {})
    monkeypatch.setattr(prepared_calls, "MAX_PREPARED", 3)
    for batch in range(1, 8):
        k = torch.zeros(batch, 4, 1, 8)
        flashtile.attention(torch.zeros(batch, 1, 1, 8), k, k)
    assert len(ops._PREPARED) == 3


def test_threads_share_what_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_PREPARED", {})
    args = plain()
    expected = reference.forward(**args)[0]
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(run(args))) for _ in range(6)]
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
    for case in FORWARD_CASES:
        if case.name in {"no_keys", "varlen_everything", "varlen_spare_rows", "varlen_batch_zero", "pages_of_16", "pages_batch_zero"}:
            with flashtile.checked():
                run(make_forward_inputs(case).args)


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize(("starts", "entry"), [((1, 9, 13), 0), ((0, 9, 8), 2), ((0, 9, 99), 2), ((0, -1, 13), 1)])
def test_checked_names_the_first_bad_start(name: str, starts: tuple[int, ...], entry: int) -> None:
    args = varlen() | {name: torch.tensor(starts, dtype=torch.int32)}
    run(args)
    with flashtile.checked(), pytest.raises(ArgumentError, match=rf"{name}\[{entry}\]: .* got {starts[entry]}\."):
        run(args)


def test_checked_names_a_sequence_longer_than_it_was_said_to_be() -> None:
    args = varlen() | {"max_seqlen_q": 8}
    run(args)
    with flashtile.checked(), pytest.raises(ArgumentError, match=r"cu_seqlens_q\[1\]: .*max_seqlen_q \(8\).* got 9\."):
        run(args)


@pytest.mark.parametrize(("used", "entry"), [((31, 5), 0), ((30, 13), 1), ((30, -1), 1)])
def test_checked_names_keys_that_a_sequence_has_not(used: tuple[int, int], entry: int) -> None:
    args = varlen(seqused_k=used)
    run(args)
    with flashtile.checked(), pytest.raises(ArgumentError, match=rf"seqused_k\[{entry}\]: .*the sequence has, .* got {used[entry]}\."):
        run(args)


def test_checked_names_the_first_bad_page() -> None:
    args = varlen(page_size=8)
    args["page_table"][1, 1] = 1000
    run(args)
    with flashtile.checked(), pytest.raises(ArgumentError, match=r"page_table\[1, 1\]: .* got 1000"):
        run(args)
    args["seqused_k"][1] = 8
    with flashtile.checked():
        run(args)
    args["seqused_k"][0] = 99
    with flashtile.checked(), pytest.raises(ArgumentError, match=r"seqused_k\[0\]: .*pages hold, 40, got 99"):
        run(args)


def test_checked_forgives_pages_that_the_window_has_left() -> None:
    args = varlen(page_size=8, causal=True)
    args["page_table"][0, 0] = -1
    with flashtile.checked():
        run(args | {"window": (10, 0)})
        with pytest.raises(ArgumentError, match=r"page_table\[0, 0\]"):
            run(args)
