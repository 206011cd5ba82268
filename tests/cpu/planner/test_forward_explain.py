"""explain for forward: right numbers, and a reason for every tile and kernel that lost."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from flashtile.band import Band
from flashtile.errors import ArgumentError, UnsupportedError
from flashtile.planner.catalog import CPU_FORWARD, GLUON_FORWARD_SM90, TRITON_FORWARD
from flashtile.planner.choose import plan_forward
from flashtile.planner.device import Device
from flashtile.planner.explain import explain
from flashtile.planner.forward_alternatives import ForwardAlternative
from flashtile.planner.forward_explain import ForwardExplanation, explain_forward
from flashtile.planner.plans import DecodePlan, ForwardPlan
from flashtile.problem import Problem

H200 = Device.named("H200")
A100 = Device.named("A100")
MI300X = Device.named("MI300X")
PREFILL = Problem("forward", 4, 4096, seqlen_k=4096, num_heads_q=16, num_heads_kv=16)


class Facts(NamedTuple):
    registers: int
    spilled_bytes: int
    shared_bytes: int
    mma: str


def other(explanation: ForwardExplanation, block_m: int, kernel: str | None = None) -> ForwardAlternative:
    wanted = (kernel or explanation.plan.kernel, block_m)
    return next(row for row in explanation.alternatives if (row.kernel, row.block_m) == wanted)


@pytest.mark.parametrize("name", Device.names())
def test_every_device_is_explained(name: str) -> None:
    explanation = explain_forward(PREFILL, Device.named(name))
    assert all(row.why for row in explanation.alternatives)
    assert all(row.feasible == (row.predicted_us is not None) for row in explanation.alternatives)
    assert explanation.predicted_us >= explanation.roofline_us
    assert len(explanation.lines()) >= 3


def test_numbers_of_a_causal_prefill() -> None:
    explanation = explain_forward(PREFILL, H200)
    assert explanation.row_tiles == 4 * 16 * 32
    assert (explanation.full_waves, explanation.tail_tiles) == (2048 // 132, 2048 % 132)
    assert explanation.waves == pytest.approx(2048 / 132)
    assert explanation.key_tiles == 4 * 16 * (32 * 33 // 2)
    assert explanation.masked_tiles == 4 * 16 * 32
    assert explanation.masked_share == pytest.approx(2 / 33)
    assert explanation.flops == 4 * 16 * (4096 * 4097 // 2) * 4 * 128
    assert explanation.bytes_moved == 4 * 4 * 16 * 4096 * 128 * 2
    assert explanation.intensity == pytest.approx(explanation.flops / explanation.bytes_moved)
    assert explanation.roofline_matrix_us == pytest.approx(1e6 * explanation.flops / H200.matrix_rate)
    assert explanation.programs == 132
    assert explanation.predicted_us == pytest.approx(explanation.cost.total_us)


@pytest.mark.parametrize(
    ("device", "allow_tf32", "rate"),
    [(H200, False, H200.vector_rate), (H200, True, H200.matrix_rate / 2), (MI300X, False, MI300X.matrix_rate / 8)],
)
def test_the_roofline_is_that_of_the_products_dtype(device: Device, allow_tf32: bool, rate: float) -> None:
    wide = PREFILL.with_(dtype_q="float32", dtype_k="float32", dtype_v="float32", dtype_out="float32", allow_tf32=allow_tf32)
    explanation = explain_forward(wide, device)
    assert explanation.roofline_matrix_us == pytest.approx(1e6 * explanation.flops / rate)


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({}, "matrix"),
        ({"head_dim": 64, "head_dim_v": 64}, "exp"),
        ({"seqlen_q": 16, "total_q": 4096, "batch": 256, "num_heads_q": 8, "num_heads_kv": 8, "seqlen_k": 8192}, "memory"),
        ({"batch": 1, "num_heads_q": 1, "num_heads_kv": 1, "seqlen_q": 128, "total_q": 128, "seqlen_k": 65536}, "tail"),
        ({"batch": 1, "num_heads_q": 1, "num_heads_kv": 1, "seqlen_q": 16, "total_q": 16, "seqlen_k": 64}, "start"),
    ],
)
def test_the_bound_is_named(changes: dict[str, Any], bound: str) -> None:
    explanation = explain_forward(PREFILL.with_(**changes), H200)
    assert explanation.bound == bound
    assert any(line.startswith(f"Bound by {bound}: predicted ") for line in explanation.lines())


def test_json_holds_everything() -> None:
    explanation = explain_forward(PREFILL, H200)
    data = json.loads(explanation.to_json())
    assert data["plan"]["block_m"] == 128
    assert data["cost"]["exp_us"] == explanation.cost.exp_us
    assert data["masked_share"] == explanation.masked_share
    assert data["tflops"] == pytest.approx(explanation.tflops)
    assert len(data["alternatives"]) == len(explanation.alternatives)


def test_lines_say_tile_waves_and_each_reason() -> None:
    explanation = explain_forward(PREFILL, H200)
    text = "\n".join(explanation.lines())
    assert "4 x 4096 queries over 4096 keys (causal), 16/16 heads, head dim 128, bfloat16 on H200: kernel gluon.forward_sm90" in text
    assert "Tile: block_m 128, 128 keys a step, 8 warps and one that loads, 2 stages" in text
    assert "2048 tiles of rows, 132 programs that stay, on 132 SMs: 15 full waves and a tail of 68 tiles; 6.1% of 33792 key tiles" in text
    for row in explanation.alternatives:
        assert row.why in text


@pytest.mark.parametrize(
    ("band", "words"), [(Band(), "(full)"), (Band(1023, 0), "(window 1023, 0)"), (Band(7, None), "(window 7, unbounded)")]
)
def test_masks_in_words(band: Band, words: str) -> None:
    assert words in explain_forward(PREFILL.with_(band=band), H200).lines()[0]


def test_smaller_tiles_lose_by_the_keys_they_read_again() -> None:
    row = other(explain_forward(PREFILL, H200), 16, TRITON_FORWARD)
    assert row.why.startswith("16384 tiles of rows instead of 2048, and each reads its keys")
    assert row.predicted_us is not None


def test_tiles_of_all_kernels_that_can_run_are_explained() -> None:
    tiles = {(row.kernel, row.block_m) for row in explain_forward(PREFILL, H200).alternatives}
    assert tiles == {(GLUON_FORWARD_SM90, 192), *((TRITON_FORWARD, block_m) for block_m in (16, 32, 64, 128))}


@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [({}, A100, "it is made for sm_90, and A100 is sm_80"), ({"alignment": 8}, H200, "multiples of 8 bytes")],
)
def test_a_kernel_that_cannot_run_says_why(changes: dict[str, Any], device: Device, reason: str) -> None:
    explanation = explain_forward(PREFILL.with_(**changes), device)
    (kernel,) = explanation.other_kernels
    assert kernel.kernel == GLUON_FORWARD_SM90
    assert reason in "; ".join(kernel.reasons)
    assert all(row.kernel == TRITON_FORWARD for row in explanation.alternatives)


def test_a_kernel_that_leaves_few_queries_to_another_says_why() -> None:
    few = PREFILL.with_(seqlen_q=16, total_q=128, batch=8, seqlen_k=16384, num_heads_q=32, num_heads_kv=8)
    explanation = explain_forward(few, H200)
    (kernel,) = explanation.other_kernels
    assert kernel.kernel == GLUON_FORWARD_SM90
    assert kernel.reasons[0].startswith("16 queries fill few of its 128 rows")


def test_decode_is_suggested_where_few_queries_leave_sms_idle() -> None:
    few = PREFILL.with_(batch=1, seqlen_q=16, total_q=16, seqlen_k=65536, num_heads_q=8, num_heads_kv=8)
    explanation = explain_forward(few, H200)
    assert explanation.decode_us is not None
    assert explanation.decode_us < explanation.predicted_us
    assert "Consider decode, which splits the keys" in "\n".join(explanation.lines())


@pytest.mark.parametrize(
    "changes", [{}, {"batch": 1, "seqlen_q": 16, "total_q": 16, "ragged_k": True}, {"batch": 0, "total_q": 0}], ids=str
)
def test_decode_is_not_suggested_where_it_is_no_help(changes: dict[str, Any]) -> None:
    assert explain_forward(PREFILL.with_(**changes), H200).decode_us is None


def test_an_explicit_plan_is_explained_as_asked() -> None:
    wish = ForwardPlan(TRITON_FORWARD, 64, 64, num_warps=4, num_stages=2, source="explicit")
    explanation = explain_forward(PREFILL, H200, wish)
    assert explanation.plan is wish
    assert other(explanation, 128, GLUON_FORWARD_SM90).why.endswith("the plan was asked for")
    assert "chosen by the caller" in explanation.lines()[0]


def test_a_tile_that_cannot_run_quotes_the_number() -> None:
    small = replace(A100, smem_per_block=90_000)
    needed = explain_forward(PREFILL, A100).shared_memory
    assert needed > small.smem_per_block
    assert explain_forward(PREFILL, small).shared_memory <= small.smem_per_block
    with pytest.raises(UnsupportedError, match=f"{needed} bytes of shared memory"):
        explain_forward(PREFILL, small, plan_forward(PREFILL, A100))


def test_a_compilers_findings_replace_the_estimates() -> None:
    explanation = explain_forward(PREFILL, A100, compiled=Facts(200, 8, 99_999, "mma.sync m16n8k16"))
    assert (explanation.registers, explanation.shared_memory, explanation.spilled_bytes) == (200, 99_999, 8)
    assert "as compiled" in "\n".join(explanation.lines())


def test_the_cpu_is_explained_without_tiles() -> None:
    explanation = explain_forward(PREFILL, Device.named("cpu"))
    assert explanation.plan.kernel == CPU_FORWARD
    assert explanation.alternatives == ()
    assert not any("shared memory" in line for line in explanation.lines())


@pytest.mark.parametrize("changes", [{"batch": 0, "total_q": 0}, {"seqlen_q": 0, "total_q": 0}, {"seqlen_k": 0}], ids=str)
def test_nothing_to_do_is_explained_too(changes: dict[str, int]) -> None:
    explanation = explain_forward(PREFILL.with_(**changes), H200)
    assert explanation.flops == 0
    assert explanation.bound == "start"
    assert explanation.alternatives == ()
    assert "launched" in explanation.lines()[1]


def test_explain_goes_by_the_operation_and_refuses_the_others_plan() -> None:
    assert isinstance(explain(PREFILL, H200), ForwardExplanation)
    with pytest.raises(ArgumentError, match="a ForwardPlan"):
        explain(PREFILL, H200, DecodePlan("triton.decode", 16))
    with pytest.raises(ArgumentError, match="a DecodePlan"):
        explain(PREFILL.with_(operation="decode", seqlen_q=1, total_q=4), H200, ForwardPlan(TRITON_FORWARD))


def test_explaining_needs_neither_torch_nor_triton() -> None:
    code = (
        "import sys; from flashtile.planner.explain import explain; from flashtile.planner.device import Device; "
        "from flashtile.problem import Problem; "
        "explain(Problem('forward', 4, 4096, seqlen_k=4096), Device.named('h200')).lines(); "
        "print([name for name in ('torch', 'triton') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
