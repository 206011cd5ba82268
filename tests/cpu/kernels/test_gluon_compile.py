"""Hopper's kernel compiled without a GPU: no spills, the matrix instruction and the copy engine that it is made for."""

from __future__ import annotations

from typing import Any

import pytest

from flashtile.band import Band
from flashtile.planner.device import Device
from flashtile.planner.footprint import gathers, shared_memory_bytes
from flashtile.planner.footprint_gluon import asks_by_page
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem
from flashtile.testing.variants import HOPPER, ONE, Share, fitting_plan
from tests.cpu.kernels.uninterpreted import answers

pytest.importorskip("triton")

H200 = Device.named("h200")
ALL: dict[str, Any] = {"band": Band(1023, 0), "softcap": True, "alibi": True, "sinks": True, "lse": True}
PACKED: dict[str, Any] = {"seqlen_q": 4, "total_q": 9, "ragged_q": True}
SPLITS, LINE = Share(3), Share(1, 7)


def quantised(dtype: str, **others: Any) -> dict[str, Any]:
    return {"dtype_k": dtype, "dtype_v": dtype, "k_scales": "head", "v_scales": "sequence"} | others


E4M3, INT8 = "float8_e4m3fn", "int8"
# name: (block_m, what the problem has beside defaults, how its keys are shared)
CASES: dict[str, tuple[int, dict[str, Any], Share]] = {
    "8 rows": (8, {}, ONE),
    "8 rows, splits": (8, {}, SPLITS),
    "8 rows, a line": (8, {"batch": 3}, LINE),
    "8 rows, a long line": (8, {"batch": 300}, LINE),
    "8 rows, pages of 16": (8, {"page_size": 16}, SPLITS),
    "8 rows, pages of 32, a line": (8, {"page_size": 32, "batch": 3}, LINE),
    "8 rows, pages of 1, a line": (8, {"page_size": 1, "batch": 3}, LINE),
    "64 rows, pages of 16, a line": (64, {"page_size": 16, "batch": 3, "seqlen_q": 16}, LINE),
    "8 rows, pages of 256, a line": (8, {"page_size": 256, "batch": 3}, LINE),
    "8 rows, head dim 64": (8, {"head_dim": 64, "head_dim_v": 64}, ONE),
    "16 rows, splits, everything": (16, ALL, SPLITS),
    "16 rows, packed, a line, everything": (16, ALL | PACKED | {"batch": 3, "page_size": 16}, LINE),
    "64 rows, head dims 192 and 128, a line": (64, {"head_dim": 192, "head_dim_v": 128, "batch": 3}, LINE),
    "16 rows, head dims 192 and 128": (16, {"head_dim": 192, "head_dim_v": 128, "dtype_q": "float16"}, ONE),
    "8 rows, e4m3, splits": (8, quantised(E4M3), SPLITS),
    "8 rows, e4m3, a line": (8, quantised(E4M3, batch=3, dtype_q="float16"), LINE),
    "8 rows, int8, a line, pages of 16": (8, quantised(INT8, batch=3, page_size=16), LINE),
    "8 rows, e4m3, a line, pages of 1": (8, quantised(E4M3, batch=3, page_size=1), LINE),
    "8 rows, int8, pages of 256": (8, quantised(INT8, page_size=256, head_dim=64, head_dim_v=64), ONE),
    "16 rows, int8, a line, everything": (16, quantised(INT8, batch=3, **ALL), LINE),
    "16 rows, e4m3, packed, a line, everything": (16, quantised(E4M3, batch=3, page_size=64, **ALL, **PACKED), LINE),
    "8 rows, e4m3, head dims 192 and 128": (8, quantised(E4M3, head_dim=192, head_dim_v=128), SPLITS),
    "64 rows": (64, {"seqlen_q": 16}, ONE),
    "64 rows, splits, float32 out": (64, {"seqlen_q": 16, "dtype_out": "float32"}, SPLITS),
    "64 rows, packed, a line, everything": (64, ALL | PACKED | {"batch": 3, "page_size": 128}, LINE),
    "64 rows, head dim 96": (64, {"head_dim": 96, "head_dim_v": 96, "dtype_q": "float16"}, ONE),
    "64 rows, head dim 256, pages of 16": (64, {"head_dim": 256, "head_dim_v": 256, "page_size": 16}, ONE),
    "128 rows, splits": (128, {"seqlen_q": 32}, SPLITS),
    "128 rows, a line, everything": (128, ALL | {"seqlen_q": 32, "batch": 3}, LINE),
    "128 rows, head dims 192 and 128, pages of 64": (128, {"head_dim": 192, "head_dim_v": 128, "page_size": 64}, ONE),
}

COMPILE = """
import json, re, sys
from triton.backends.compiler import GPUTarget
from flashtile.kernels.block import Kernel, sizes_of
from flashtile.kernels.cubin import parameter_sizes, stack_bytes
from flashtile.kernels.gluon.decode_sm90 import decode_spec
from flashtile.kernels.launch import compile_spec
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem

for problem, plan in json.load(sys.stdin):
    spec = decode_spec(Problem.from_json(problem), DecodePlan.from_json(plan))
    compiled = compile_spec(spec, GPUTarget("cuda", 90, 32))
    ptx, binary = compiled.asm["ptx"], compiled.asm["cubin"]
    names = ("mma.sync", "wgmma", "cp.async.bulk.tensor", "cp.async.cg", "griddepcontrol", "e4m3x2", "xor.b32")
    facts = {name: bool(re.search(name, ptx)) for name in names}
    facts |= {"stack": stack_bytes(binary), "shared": compiled.metadata.shared, "takes": parameter_sizes(binary)}
    facts["operands"] = sorted(set(re.findall(r"mma[.]sync[.]aligned[.]m16n8k16[.]row[.]col[.]f32[.](\\w+)[.]", ptx)))
    facts["fenced"] = "fence.proxy.async" in ptx.split("mbarrier.init")[-1].split("cp.async.bulk.tensor")[0]
    facts["passed"] = sizes_of(Kernel(1, 32, 0, False, False, spec.parameters(compiled.metadata.tensordesc_meta)))
    print(json.dumps(facts), flush=True)
"""


def planned(name: str) -> tuple[Problem, DecodePlan]:
    block_m, changes, share = CASES[name]
    problem = Problem(**({"seqlen_k": 65536, "num_heads_q": 8, "num_heads_kv": 2} | changes))
    return problem, fitting_plan(problem, H200, HOPPER, (block_m, False), share)


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """What each case became, compiled in a process without Triton's interpreter."""
    asked = [[value.to_json() for value in planned(name)] for name in CASES]
    return dict(zip(CASES, answers(COMPILE, asked), strict=True))


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("name", CASES)
def test_a_plan_compiles_to_what_was_planned(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    problem, plan = planned(name)
    facts = compiled[name]
    assert facts["stack"] == 0, "it spills"
    assert (facts["mma.sync"], facts["wgmma"]) == ((True, False) if plan.block_m <= 16 else (False, True))
    assert (facts["cp.async.bulk.tensor"], facts["cp.async.cg"]) == (
        (False, True) if gathers(problem, plan) and not asks_by_page(problem, plan) else (True, False)
    )
    assert facts["fenced"], "the copy engine may not see that the barriers are ready"
    assert facts["shared"] <= shared_memory_bytes(problem, plan, H200) <= H200.smem_per_block == 227 * 1024
    assert facts["takes"] == facts["passed"]


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("name", [name for name, (_, changes, _) in CASES.items() if "dtype_k" in changes])
def test_quantised_keys_are_converted_in_registers(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    assert (compiled[name]["e4m3x2"], "e4m3" in name) in ((True, True), (False, False))
    assert compiled[name]["xor.b32"] or "int8" not in name
    assert compiled[name]["operands"] == ["f16"], "products of any other dtype"


@pytest.mark.slow
@pytest.mark.compiles
def test_combine_is_let_go_early_where_there_is_one(compiled: dict[str, dict[str, Any]]) -> None:
    assert compiled["8 rows, splits"]["griddepcontrol"]
    assert not compiled["8 rows"]["griddepcontrol"]
