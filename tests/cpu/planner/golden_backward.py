"""The golden table of backward plans, so that each change of a rule is visible in a diff.

After a deliberate change of a rule, regenerate the table and read the diff:

    python -m tests.cpu.planner.golden_backward > tests/cpu/planner/golden_backward.txt
"""

from __future__ import annotations

from pathlib import Path

from flashtile.planner.choose import plan_backward
from tests.cpu.planner.golden_forward import ELSEWHERE, SQUARES, Row, asked, problem_of

TABLE = Path(__file__).with_name("golden_backward.txt")
PROBLEMS: list[Row] = [
    *SQUARES,
    ("H200", 64, 8192, 8192, "32/8", 128, "bfloat16", "causal", "packed"),
    ("H200", 1, 16384, 16384, "32/8", 128, "bfloat16", "window", ""),
    ("H200", 1, 100, 100, "8/8", 128, "float16", "causal", ""),
    ("H200", 8, 4096, 77, "16/16", 64, "float16", "full", ""),
    ("H200", 4, 4096, 4096, "16/16", 128, "bfloat16", "causal", "softcap"),
    ("H200", 4, 4096, 4096, "16/16", 128, "bfloat16", "causal", "unaligned"),
    ("H200", 4, 4096, 4096, "16/16", 128, "float32", "causal", ""),
    *[
        (device, 4, 4096, 4096, "16/16", dim, "float16", "causal", "")
        for device in ELSEWHERE for dim in (64, 96, 128, 192, 256) if device != "T4" or dim <= 128
    ],
    *[(device, 4, 4096, 4096, "32/8", 128, "float16", "causal", "packed") for device in ELSEWHERE],
    *[(device, 1, 100, 100, "8/8", 64, "float16", "causal", "") for device in ELSEWHERE],
]  # fmt: skip


def line_of(row: Row) -> str:
    """One problem and its plan: the pass over keys, then that over queries."""
    plan = plan_backward(*problem_of(row, "backward"))
    keys = f"n{plan.block_n} m{plan.block_m} w{plan.num_warps} s{plan.num_stages}"
    queries = f"m{plan.dq_block_m} n{plan.dq_block_n} w{plan.dq_num_warps} s{plan.dq_num_stages}"
    programs = f" programs {plan.num_programs}" if plan.num_programs else ""
    return f"{asked(row)} | {plan.kernel} keys {keys} queries {queries}{programs}"


if __name__ == "__main__":
    print("\n".join(line_of(row) for row in PROBLEMS))
