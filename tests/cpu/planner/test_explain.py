"""explain: numbers that add up, sentences that quote them, and reasons that flip when their number changes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from flashtile.errors import UnsupportedError
from flashtile.planner.catalog import CPU, GLUON_SM90, TRITON
from flashtile.planner.choose import plan_decode
from flashtile.planner.decode_alternatives import Alternative
from flashtile.planner.decode_explain import Explanation
from flashtile.planner.device import Device
from flashtile.planner.explain import explain
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem

H200 = Device.named("H200")
B200 = Device.named("B200")
LLAMA = Problem(seqlen_k=32768, num_heads_q=32, num_heads_kv=8)


def other(explanation: Explanation, block_m: int, swapped: bool = False, kernel: str | None = None) -> Alternative:
    wanted = (kernel or explanation.plan.kernel, block_m, swapped)
    return next(row for row in explanation.alternatives if (row.kernel, row.block_m, row.swapped) == wanted)


@pytest.mark.parametrize("name", Device.names())
def test_every_device_is_explained(name: str) -> None:
    explanation = explain(LLAMA, Device.named(name))
    chosen = (explanation.plan.block_m, explanation.plan.swapped)
    tiles = {(row.block_m, row.swapped) for row in explanation.alternatives} | {chosen}
    assert {block_m for block_m, _ in tiles} == {1, 8, 16, 32, 64, 128}
    assert all(row.why for row in explanation.alternatives)
    assert all(row.feasible == (row.predicted_us is not None) for row in explanation.alternatives)
    assert explanation.predicted_us >= 0.9 * explanation.roofline_us


def test_numbers() -> None:
    explanation = explain(LLAMA, H200)
    assert (explanation.rows, explanation.row_blocks, explanation.rows_wasted) == (4, 1, 4)
    assert explanation.bytes_read == 8 * 32768 * 2 * 128 * 2
    assert explanation.programs == 8 * explanation.plan.num_splits
    assert explanation.waves == pytest.approx(explanation.programs / (132 * explanation.programs_per_sm))
    assert explanation.bound == "memory"
    assert explanation.predicted_us == pytest.approx(explanation.cost.total_us)


def test_json_holds_everything() -> None:
    explanation = explain(LLAMA, H200)
    data = json.loads(explanation.to_json())
    assert data["plan"]["block_m"] == 8
    assert data["schedule"] == "16 splits"
    assert data["cost"]["memory_us"] == explanation.cost.memory_us
    assert len(data["alternatives"]) == len(explanation.alternatives)
    assert data["problem"]["seqlen_k"] == 32768


def test_lines_say_the_tile_and_each_reason() -> None:
    explanation = explain(LLAMA, H200)
    text = "\n".join(explanation.lines())
    assert "block_m 8; 4 rows in 1 block, 4 rows wasted" in text
    assert "FlashAttention-2's fixed kBlockM" in text
    for row in explanation.alternatives:
        assert row.why in text


def test_fixed_64_quotes_the_rows_it_wastes() -> None:
    row = other(explain(LLAMA, H200), 64)
    assert row.rows_wasted == 60
    assert row.why.startswith("60 of 64 rows would be empty")


@pytest.mark.parametrize(("seqlen_q", "chosen"), [(1, 8), (4, 16), (8, 64)])
def test_changing_the_rows_flips_the_choice(seqlen_q: int, chosen: int) -> None:
    assert explain(LLAMA.with_(seqlen_q=seqlen_q, total_q=seqlen_q), H200).plan.block_m == chosen


def test_where_the_choice_is_64_it_says_so() -> None:
    text = "\n".join(explain(LLAMA.with_(seqlen_q=16, total_q=16), H200).lines())
    assert "block_m 64 (as FlashAttention-2's fixed kBlockM)" in text


def test_a_smaller_tile_loses_by_the_blocks_it_needs() -> None:
    row = other(explain(LLAMA.with_(seqlen_q=16, total_q=16), H200), 16)
    assert row.why.startswith("64 rows need 4 blocks of 16")


def test_both_kernels_tiles_are_explained() -> None:
    explanation = explain(LLAMA, H200)
    tiles = {(row.kernel, row.block_m, row.swapped) for row in explanation.alternatives}
    assert tiles >= {(GLUON_SM90, block_m, False) for block_m in (16, 64, 128)}
    assert tiles >= {(TRITON, 1, False), (TRITON, 8, True), (TRITON, 16, False), (TRITON, 32, False)}
    assert explanation.other_kernels == ()
    text = "\n".join(explanation.lines())
    assert f"kernel {GLUON_SM90}, chosen by the rule" in text
    assert f"Not block_m 16 of {TRITON}: " in text
    assert "Not block_m 16: " in text


@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [
        ({}, B200, "it is made for sm_90, and B200 is sm_100"),
        ({"alignment": 8}, H200, "multiples of 8 bytes"),
        ({"dtype_q": "float32", "dtype_k": "float32", "dtype_v": "float32"}, H200, "float32 is none of"),
    ],
)
def test_a_kernel_that_cannot_run_says_why(changes: dict[str, object], device: Device, reason: str) -> None:
    explanation = explain(LLAMA.with_(**changes), device)
    (kernel,) = explanation.other_kernels
    assert kernel.kernel == GLUON_SM90
    assert reason in "; ".join(kernel.reasons)
    assert all(row.kernel == TRITON for row in explanation.alternatives)
    assert f"Not kernel {GLUON_SM90}: " in "\n".join(explanation.lines())
    assert json.loads(explanation.to_json())["other_kernels"][0]["kernel"] == GLUON_SM90


def test_a_tile_that_the_first_kernel_lacks_says_so() -> None:
    explanation = explain(LLAMA, H200, plan_decode(LLAMA, H200, block_m=32))
    (kernel,) = explanation.other_kernels
    assert (kernel.kernel, kernel.reasons) == (GLUON_SM90, ("it has no block_m 32, only block_m 8, 16, 64 and 128",))
    assert explain(LLAMA, H200, plan_decode(LLAMA, H200, block_m=64)).other_kernels == ()


def test_a_cpu_has_one_kernel() -> None:
    explanation = explain(LLAMA, Device.named("cpu"))
    assert explanation.other_kernels == ()
    assert {row.kernel for row in explanation.alternatives} == {CPU}


@pytest.mark.parametrize(
    ("batch", "wish", "schedule"),
    [(1, None, "16 splits"), (64, None, "stream-K over 264 programs"), (128, 1, "no split"), (4, None, "stream-K over 128 programs")],
)
def test_the_schedule_is_named(batch: int, wish: int | None, schedule: str) -> None:
    problem = LLAMA.with_(batch=batch, total_q=batch)
    explanation = explain(problem, H200, plan_decode(problem, H200, num_splits=wish))
    assert explanation.schedule == schedule
    assert f"Schedule: {schedule}, " in "\n".join(explanation.lines())
    if explanation.plan.num_programs:
        assert explanation.programs == explanation.plan.num_programs
        assert explanation.waves <= 1.0


def test_changing_the_shared_memory_that_decided_flips_the_reason() -> None:
    small = replace(H200, smem_per_block=40 * 1024)
    row = other(explain(LLAMA, small), 128)
    assert not row.feasible
    assert str(40 * 1024) in row.why
    needed = int(re.search(r"take (\d+) bytes", row.why)[1])  # type: ignore[index]
    assert other(explain(LLAMA, replace(H200, smem_per_block=needed)), 128).feasible


def test_an_explicit_plan_that_is_slower_says_so() -> None:
    wish = DecodePlan("triton.decode", 64, num_splits=2, source="explicit")
    explanation = explain(LLAMA, H200, wish)
    assert explanation.plan is wish
    assert "the plan was asked for" in other(explanation, 16).why


def test_a_plan_that_cannot_run_is_not_explained() -> None:
    with pytest.raises(UnsupportedError, match="block_m 12"):
        explain(LLAMA, H200, DecodePlan("triton.decode", 12))


def test_compiled_figures_replace_the_estimates() -> None:
    compiled = SimpleNamespace(registers=142, spilled_bytes=0, shared_bytes=71680, mma="mma.sync m16n8k16")
    explanation = explain(LLAMA, H200, compiled=compiled)
    assert (explanation.registers, explanation.shared_memory, explanation.spilled_bytes) == (142, 71680, 0)
    assert explanation.programs_per_sm == 3
    assert "as compiled" in "\n".join(explanation.lines())


@pytest.mark.parametrize(
    ("changes", "merged_by", "cost"),
    [
        ({}, "combine", "combine 1."),
        ({"batch": 64, "total_q": 64}, "programs", "merge 0."),
        ({"batch": 64, "total_q": 64, "head_dim": 256, "head_dim_v": 256, "seqlen_q": 16}, "combine", "combine 4."),
        ({"batch": 1, "seqlen_k": 64}, "nobody", "combine 0.0"),
    ],
    ids=str,
)
def test_who_merges_partial_results_is_said(changes: dict[str, Any], merged_by: str, cost: str) -> None:
    explanation = explain(LLAMA.with_(**changes), H200)
    assert explanation.merged_by == merged_by
    assert any(line.startswith("Merging: ") for line in explanation.lines()) == (merged_by == "programs")
    assert any(line.startswith("Bound by ") and cost in line for line in explanation.lines())


@pytest.mark.parametrize(
    ("page_size", "device", "pages", "words"),
    [
        (0, H200, "", "3 stages."),
        (16, H200, "asking warps", "two more warps ask for pages"),
        (10, H200, "key by key", "each key looks up its page"),
        (256, H200, "a page a step", "lie on one page"),
        (16, B200, "key by key", "each key looks up its page"),
    ],
)
def test_how_pages_are_found_is_said(page_size: int, device: Device, pages: str, words: str) -> None:
    explanation = explain(LLAMA.with_(page_size=page_size, batch=64, total_q=64), device)
    assert explanation.pages == pages
    assert any(line.startswith("Program: ") and words in line for line in explanation.lines())


def test_nothing_to_do_is_explained_too() -> None:
    explanation = explain(LLAMA.with_(seqlen_k=0), H200)
    assert explanation.alternatives == ()
    assert "no kernel is launched" in explanation.lines()[1]


def test_explaining_imports_neither_torch_nor_triton() -> None:
    code = (
        "import sys; from flashtile.planner.explain import explain; from flashtile.planner.device import Device; "
        "from flashtile.problem import Problem; "
        "explain(Problem(seqlen_k=4096, num_heads_q=8, num_heads_kv=8), Device.named('h200')).lines(); "
        "assert not {'torch', 'triton'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
