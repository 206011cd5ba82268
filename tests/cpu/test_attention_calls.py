"""attention and attention_varlen: what kernels are handed, and what a call remembers of calls before it."""

from __future__ import annotations

import itertools
import math
import threading
from typing import Any

import pytest
import torch

import flashtile
from flashtile import reference
from flashtile.facts import forward_key
from flashtile.ops import forward as ops
from flashtile.ops import prepared as prepared_calls
from flashtile.planner.plans import ForwardPlan, Plan
from flashtile.problem import Problem
from tests.cpu.attention_calls import plain, run, varlen


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
