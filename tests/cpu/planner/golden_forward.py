"""The golden table of forward plans, so that each change of a rule is visible in a diff.

After a deliberate change of a rule, regenerate the table and read the diff:

    python -m tests.cpu.planner.golden_forward > tests/cpu/planner/golden_forward.txt
"""

from __future__ import annotations

from pathlib import Path

from flashtile.band import Band
from flashtile.planner.choose import plan_forward
from flashtile.planner.device import Device
from flashtile.problem import Problem

TABLE = Path(__file__).with_name("golden_forward.txt")

ELSEWHERE = ("T4", "A100", "L40S", "RTX 5090", "B200", "MI300X")
BANDS = {"full": Band(), "causal": Band(None, 0), "window": Band(1023, 0)}

# device, batch, queries, keys, heads, head dim, dtype, mask, what else is special
Row = tuple[str, int, int, int, str, int, str, str, str]
SQUARES: list[Row] = [
    *[
        ("H200", 16384 // keys, keys, keys, f"{2048 // dim}/{2048 // dim}", dim, "bfloat16", mask, "")
        for dim in (64, 128, 256) for mask in ("full", "causal") for keys in (1024, 4096, 16384)
    ],
    *[("H200", 4, 4096, 4096, "16/16", dim, "bfloat16", "causal", "") for dim in (32, 80, 96, 192)],
    ("H200", 2, 8192, 8192, "32/8", 128, "bfloat16", "causal", ""),
]  # fmt: skip
PROBLEMS = [
    *SQUARES,
    ("H200", 8, 512, 16384, "32/8", 128, "bfloat16", "causal", "page 16"),
    ("H200", 64, 8192, 8192, "32/8", 128, "bfloat16", "causal", "packed"),
    ("H200", 1, 16384, 16384, "32/8", 128, "bfloat16", "window", ""),
    ("H200", 1, 100, 100, "8/8", 128, "float16", "causal", ""),
    ("H200", 8, 16, 16384, "32/8", 128, "bfloat16", "causal", ""),
    ("H200", 8, 64, 16384, "32/8", 128, "bfloat16", "causal", ""),
    ("H200", 4, 4096, 4096, "16/16", 128, "bfloat16", "causal", "unaligned"),
    ("H200", 4, 4096, 4096, "16/16", 128, "float32", "causal", ""),
    *[(device, 4, 4096, 4096, "16/16", dim, "float16", "causal", "") for device in ELSEWHERE for dim in (64, 128, 256)],
    *[(device, 8, 512, 16384, "32/8", 128, "float16", "causal", "page 16") for device in ELSEWHERE],
    *[(device, 8, 16, 16384, "32/8", 128, "float16", "causal", "") for device in ELSEWHERE],
]  # fmt: skip


def problem_of(row: Row, operation: str = "forward") -> tuple[Problem, Device]:
    device, batch, seqlen_q, seqlen_k, heads, head_dim, dtype, mask, special = row
    num_heads_q, num_heads_kv = (int(number) for number in heads.split("/"))
    packed = special == "packed"
    problem = Problem(
        operation, batch, seqlen_q, seqlen_k=seqlen_k, num_heads_q=num_heads_q, num_heads_kv=num_heads_kv, head_dim=head_dim,
        dtype_q=dtype, band=BANDS[mask], ragged_q=packed, ragged_k=packed, total_q=batch * seqlen_q // 4 if packed else -1,
        page_size=int(special.removeprefix("page ")) if special.startswith("page") else 0, seqused_k=special.startswith("page"),
        softcap=special == "softcap", lse=operation == "backward", alignment=2 if special == "unaligned" else 16,
    )  # fmt: skip
    return problem, Device.named(device)


def asked(row: Row) -> str:
    """One problem, in fixed columns."""
    device, batch, seqlen_q, seqlen_k, heads, head_dim, dtype, mask, special = row
    return f"{device:8} {batch:3} x {seqlen_q:5} q {seqlen_k:5} k {heads:5} d{head_dim:<3} {dtype:8} {mask:6} {special:9}"


def line_of(row: Row) -> str:
    """One problem and its plan."""
    plan = plan_forward(*problem_of(row))
    how = f"rescale {plan.rescale_log2}{' q in registers' if plan.q_in_registers else ''}"
    programs = f" programs {plan.num_programs} {how}" if plan.num_programs else ""
    return f"{asked(row)} | {plan.kernel} m{plan.block_m} n{plan.block_n} w{plan.num_warps} s{plan.num_stages}{programs}"


if __name__ == "__main__":
    print("\n".join(line_of(row) for row in PROBLEMS))
