"""The golden table: what the planner chooses for some eighty problems, so that each change of a rule is visible in a diff.

After a deliberate change of a rule, regenerate the table and read the diff:

    python -m tests.cpu.planner.golden > tests/cpu/planner/golden.txt
"""

from __future__ import annotations

from pathlib import Path

from flashtile.band import Band
from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device
from flashtile.problem import Problem

TABLE = Path(__file__).with_name("golden.txt")

NVIDIA_AND_AMD = ("T4", "A100", "L40S", "RTX 4090", "RTX 5090", "H100", "B200", "MI300X")
BATCHES = ((8, 16384), (32, 4096), (128, 1024))
SPECULATIVE = ((1, 2), (1, 8), (1, 16), (16, 8), (1, 64))
QUANTISED_QUERIES = ((16, 4), (16, 8), (16, 16), (16, 17), (16, 32), (64, 4), (1, 8))
HEADS = {"32/8": (32, 8), "32/32": (32, 32), "64/8": (64, 8), "16/1": (16, 1)}

# device, batch, seqlen_q, keys, heads, head dim, dtype, what else is special
PROBLEMS = [
    *[("H200", 1, 1, keys, heads, 128, "bfloat16", "") for heads in HEADS for keys in (512, 4096, 131072)],
    *[("H200", batch, 1, keys, heads, 128, "bfloat16", "") for heads in ("32/8", "16/1") for batch, keys in BATCHES],
    *[("H200", batch, queries, 32768, "32/8", 128, "bfloat16", "") for batch, queries in SPECULATIVE],
    ("H200", 8, 1, 131072, "32/8", 128, "bfloat16", "window"),
    ("H200", 64, 1, 65536, "32/8", 128, "bfloat16", ""),
    ("H200", 64, 512, 8192, "32/8", 128, "bfloat16", "ragged"),
    ("H200", 1, 1, 64, "32/8", 128, "bfloat16", ""),
    ("H200", 1, 1, 777, "32/8", 128, "bfloat16", ""),
    ("H200", 8, 1, 5001, "32/8", 64, "float16", ""),
    ("H200", 8, 1, 5001, "32/8", 256, "float16", ""),
    ("H200", 8, 4, 4096, "32/8", 96, "bfloat16", ""),
    ("H200", 2, 1, 4096, "32/8", 128, "bfloat16", ""),
    ("H200", 17, 1, 2048, "32/8", 128, "bfloat16", ""),
    ("H200", 8, 1, 2048, "32/8", 128, "bfloat16", "page 16"),
    ("H200", 8, 1, 2048, "32/8", 128, "bfloat16", "page 1"),
    ("H200", 1, 1, 4096, "32/8", 128, "float32", ""),
    ("H200", 1, 1, 4096, "32/8", 64, "float32", ""),
    *[(device, 1, 1, 4096, "32/8", 128, "float16", "") for device in NVIDIA_AND_AMD],
    *[(device, 16, 8, 4096, "32/8", 256, "float16", "") for device in ("T4", "A100", "L40S", "RTX 5090", "B200", "MI300X")],
    # quantised: of q, and of keys and values
    *[("H200", batch, 1, keys, "32/8", 128, "bfloat16", "e4m3") for batch, keys in ((1, 512), (1, 4096), (1, 131072), (8, 2048), *BATCHES)],
    *[("H200", batch, queries, 4096, "32/8", 128, "bfloat16", "e4m3") for batch, queries in QUANTISED_QUERIES],
    ("H200", 16, 8, 4096, "32/8", 128, "bfloat16", "e4m3 page 16"),
    ("H200", 64, 512, 8192, "32/8", 128, "bfloat16", "e4m3 ragged"),
    *[("H200", 32, 1, 4096, "32/8", 128, "float16", special) for special in ("int8", "int8 page 16", "int8 page 1")],
    *[(device, 32, 1, 4096, "32/8", 128, "float16", "int8") for device in ("T4", "A100", "L40S", "B200", "MI300X")],
]  # fmt: skip

Row = tuple[str, int, int, int, str, int, str, str]


def problem_of(row: Row) -> tuple[Problem, Device]:
    device, batch, seqlen_q, keys, heads, head_dim, dtype, special = row
    num_heads_q, num_heads_kv = HEADS[heads]
    words = special.split()
    stored = {"e4m3": "float8_e4m3fn", "int8": "int8"}.get(words[0] if words else "", dtype)
    scales = "none" if stored == dtype else "head"
    problem = Problem(
        batch=batch, seqlen_q=seqlen_q, seqlen_k=keys, num_heads_q=num_heads_q, num_heads_kv=num_heads_kv, head_dim=head_dim, dtype_q=dtype,
        dtype_k=stored, dtype_v=stored, k_scales=scales, v_scales=scales,
        band=Band(1023, 0) if special == "window" else Band(None, 0), ragged_q="ragged" in words,
        total_q=batch + seqlen_q - 1 if "ragged" in words else -1,
        page_size=int(words[-1]) if "page" in words else 0,
    )  # fmt: skip
    return problem, Device.named(device)


def line_of(row: Row) -> str:
    """One problem and its plan, in fixed columns."""
    device, batch, seqlen_q, keys, heads, head_dim, dtype, special = row
    plan = plan_decode(*problem_of(row))
    asked = f"{device:8} {batch:3} x {seqlen_q:3} q {keys:6} k {heads:5} d{head_dim:<3} {dtype:8} {special:12}"
    tile = f"m{plan.block_m}{'s' if plan.swapped else ''} n{plan.block_n} w{plan.num_warps} s{plan.num_stages}"
    splits = f"stream {plan.num_programs}" if plan.num_programs else f"{plan.num_splits} x {plan.keys_per_split}"
    return f"{asked} | {plan.kernel} {tile} | {splits} | combine {plan.combine_block_d} w{plan.combine_warps}"


if __name__ == "__main__":
    print("\n".join(line_of(row) for row in PROBLEMS))
