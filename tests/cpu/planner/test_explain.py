"""explain: numbers that add up, sentences that quote them, and reasons that flip when their number changes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from flashtile.errors import UnsupportedError
from flashtile.planner.device import Device
from flashtile.planner.explain import Alternative, Explanation, explain
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem

H200 = Device.named("H200")
LLAMA = Problem(seqlen_k=32768, num_heads_q=32, num_heads_kv=8)


def other(explanation: Explanation, block_m: int, swapped: bool = False) -> Alternative:
    return next(row for row in explanation.alternatives if (row.block_m, row.swapped) == (block_m, swapped))


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
    assert (explanation.rows, explanation.row_blocks, explanation.rows_wasted) == (4, 1, 12)
    assert explanation.bytes_read == 8 * 32768 * 2 * 128 * 2
    assert explanation.programs == 8 * explanation.plan.num_splits
    assert explanation.waves == pytest.approx(explanation.programs / (132 * explanation.programs_per_sm))
    assert explanation.bound == "memory"
    assert explanation.predicted_us == pytest.approx(explanation.cost.total_us)


def test_json_holds_everything() -> None:
    explanation = explain(LLAMA, H200)
    data = json.loads(explanation.to_json())
    assert data["plan"]["block_m"] == 16
    assert data["cost"]["memory_us"] == explanation.cost.memory_us
    assert len(data["alternatives"]) == len(explanation.alternatives)
    assert data["problem"]["seqlen_k"] == 32768


def test_lines_say_the_tile_and_each_reason() -> None:
    explanation = explain(LLAMA, H200)
    text = "\n".join(explanation.lines())
    assert "block_m 16; 4 rows in 1 block, 12 rows wasted" in text
    assert "FlashAttention-2's fixed kBlockM" in text
    for row in explanation.alternatives:
        assert row.why in text


def test_fixed_64_quotes_the_rows_it_wastes() -> None:
    row = other(explain(LLAMA, H200), 64)
    assert row.rows_wasted == 60
    assert row.why.startswith("60 of 64 rows would be empty")


@pytest.mark.parametrize(("seqlen_q", "chosen"), [(4, 16), (8, 64), (64, 128)])
def test_changing_the_rows_flips_the_choice(seqlen_q: int, chosen: int) -> None:
    assert explain(LLAMA.with_(seqlen_q=seqlen_q, total_q=seqlen_q), H200).plan.block_m == chosen


def test_where_the_choice_is_64_it_says_so() -> None:
    text = "\n".join(explain(LLAMA.with_(seqlen_q=16, total_q=16), H200).lines())
    assert "block_m 64 (as FlashAttention-2's fixed kBlockM)" in text


def test_a_smaller_tile_loses_by_the_blocks_it_needs() -> None:
    row = other(explain(LLAMA.with_(seqlen_q=16, total_q=16), H200), 16)
    assert row.why.startswith("64 rows need 4 blocks of 16")


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


def test_explaining_imports_neither_torch_nor_triton() -> None:
    code = (
        "import sys; from flashtile.planner.explain import explain; from flashtile.planner.device import Device; "
        "from flashtile.problem import Problem; "
        "explain(Problem(seqlen_k=4096, num_heads_q=8, num_heads_kv=8), Device.named('h200')).lines(); "
        "assert not {'torch', 'triton'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
