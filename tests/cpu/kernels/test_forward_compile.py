"""The portable forward kernel compiled for GPUs that need not be here: no spills, the matrix instruction, the loops."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from flashtile.band import Band
from flashtile.planner.figures import ARCHITECTURES
from flashtile.planner.plans import ForwardPlan
from flashtile.problem import Problem
from tests.cpu.kernels.uninterpreted import answers

pytest.importorskip("triton")

ALL: dict[str, Any] = {"band": Band(1023, 0), "softcap": True, "alibi": True, "sinks": True, "lse": True}
PACKED: dict[str, Any] = {"ragged_q": True, "ragged_k": True}
PAGED: dict[str, Any] = {"ragged_q": True, "seqused_k": True}
FULL: dict[str, Any] = {"band": Band(None, None), "lse": False}
TF32: dict[str, Any] = {"dtype_q": "float32", "allow_tf32": True}


@dataclass(frozen=True)
class Point:
    """What is compiled: (block_m, block_n, warps, stages), head dims, and how the problem differs from causal bfloat16.

    ``mma`` is how the matrix instruction starts, "" where Triton has none. ``copies`` says whether tiles come by asynchronous copies.
    """

    arch: str
    tile: tuple[int, int, int, int]
    head_dims: tuple[int, int]
    mma: str
    changes: dict[str, Any] = field(default_factory=dict)
    copies: bool = True

    @property
    def problem(self) -> Problem:
        shape = {"batch": 2, "seqlen_q": 4096, "seqlen_k": 4096, "num_heads_q": 8, "num_heads_kv": 2}
        dim, dim_v = self.head_dims
        causal = {"band": Band(None, 0), "lse": True}
        return Problem(**{"operation": "forward", "head_dim": dim, "head_dim_v": dim_v, **shape, **causal, **self.changes})

    @property
    def plan(self) -> ForwardPlan:
        block_m, block_n, num_warps, num_stages = self.tile
        return ForwardPlan("triton.forward", block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages)


POINTS = {
    "sm_80, dropout": Point("sm_80", (128, 32, 8, 3), (128, 128), "mma.sync m16n8k16", {"dropout": True}),
    "sm_90, dropout": Point("sm_90", (64, 64, 4, 3), (128, 128), "wgmma m64n64k16", ALL | {"dropout": True}),
    "sm_75": Point("sm_75", (64, 32, 8, 1), (64, 64), "", {"dtype_q": "float16"}, copies=False),
    "sm_80, head dim 64": Point("sm_80", (128, 64, 8, 3), (64, 64), "mma.sync m16n8k16", FULL),
    "sm_80, head dim 128": Point("sm_80", (128, 64, 8, 2), (128, 128), "mma.sync m16n8k16"),
    "sm_80, head dim 256, pages of 16": Point("sm_80", (128, 16, 8, 2), (256, 256), "mma.sync m16n8k16", PAGED | {"page_size": 16}),
    "sm_80, few rows": Point("sm_80", (64, 64, 4, 2), (128, 128), "mma.sync m16n8k16", {"dtype_q": "float16"}),
    "sm_80, float32": Point("sm_80", (32, 32, 4, 2), (128, 128), "", {"dtype_q": "float32"}),
    "sm_80, TF32": Point("sm_80", (64, 32, 4, 2), (128, 128), "mma.sync m16n8k8", TF32),
    "sm_86": Point("sm_86", (128, 64, 8, 2), (128, 128), "mma.sync m16n8k16"),
    "sm_89, head dims 192 and 128": Point("sm_89", (128, 16, 8, 3), (192, 128), "mma.sync m16n8k16"),
    "sm_90, head dim 64": Point("sm_90", (64, 128, 4, 3), (64, 64), "wgmma m64n64k16", FULL),
    "sm_90, head dim 64, everything, packed": Point("sm_90", (128, 64, 8, 2), (64, 64), "wgmma m64n64k16", ALL | PACKED),
    "sm_90, head dim 96": Point("sm_90", (128, 64, 8, 3), (96, 96), "wgmma"),
    "sm_90, head dim 128": Point("sm_90", (128, 64, 8, 3), (128, 128), "wgmma"),
    "sm_90, head dim 128, full, float16": Point("sm_90", (128, 64, 8, 3), (128, 128), "wgmma", FULL | {"dtype_q": "float16"}),
    "sm_90, head dim 128, pages of 16": Point("sm_90", (128, 64, 8, 2), (128, 128), "wgmma", PAGED | {"page_size": 16}),
    "sm_90, head dim 128, pages of 128, everything": Point("sm_90", (128, 64, 8, 2), (128, 128), "wgmma", ALL | PAGED | {"page_size": 128}),
    "sm_90, head dim 192": Point("sm_90", (128, 64, 8, 2), (192, 192), "wgmma"),
    "sm_90, head dim 256": Point("sm_90", (128, 64, 8, 2), (256, 256), "wgmma"),
    "sm_90, head dim 40, a view": Point("sm_90", (128, 64, 8, 2), (40, 40), "wgmma", {"alignment": 2}, copies=False),
    "sm_100": Point("sm_100", (128, 64, 8, 2), (128, 128), "tcgen05.mma"),
    "sm_120": Point("sm_120", (128, 64, 8, 2), (64, 64), "mma.sync m16n8k16"),
    "gfx942": Point("gfx942", (128, 32, 8, 2), (128, 128), "v_mfma_f32_32x32x8_bf16", copies=False),
}

COMPILE = """
import json, re, sys
from dataclasses import asdict
from flashtile.kernels.compiled import compile_facts, target_of
from flashtile.kernels.forward import forward_spec, specs
from flashtile.kernels.launch import compile_spec
from flashtile.planner.plans import ForwardPlan
from flashtile.problem import Problem

for arch, problem, plan in json.load(sys.stdin):
    problem, plan = Problem.from_json(problem), ForwardPlan.from_json(plan)
    facts = asdict(compile_facts(forward_spec(problem, plan), arch))
    asm = compile_spec(forward_spec(problem, plan), target_of(arch)).asm

    def loops(text):  # those over tiles
        bodies = [body.split("scf.yield")[0] for body in re.split(r"scf\\.for|scf\\.while", text)[1:]]
        return [body for body in bodies if re.search(r"tt\\.dot|warp_group_dot|tc_gen5_mma", body)]

    select = r"arith\\.select[^\\n]*" + re.escape(f"tensor<{plan.block_m}x{plan.block_n}xi1")
    facts["copies"] = [body.count("async_copy_global_to_local") for body in loops(asm["ttgir"])]
    facts["selects"] = [len(re.findall(select, body)) for body in loops(asm["ttir"])]
    facts["masked_loads"] = [len(re.findall(r"tt\\.load %[\\w#]+, ", body)) for body in loops(asm["ttir"])]
    print(json.dumps(facts), flush=True)
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """What each point became, compiled in a process without Triton's interpreter."""
    asked = [[point.arch, point.problem.to_json(), point.plan.to_json()] for point in POINTS.values()]
    return dict(zip(POINTS, answers(COMPILE, asked), strict=True))


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("name", POINTS)
def test_a_tile_compiles_to_what_the_architecture_has(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    point, facts = POINTS[name], compiled[name]
    assert facts["spilled_bytes"] == 0
    assert facts["shared_bytes"] <= ARCHITECTURES[point.arch].smem_per_block
    assert facts["mma"].startswith(point.mma)
    assert bool(facts["mma"]) == bool(point.mma)


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("name", POINTS)
def test_only_the_loop_over_edges_has_masks(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    """Two loops, each with its products; the second masks neither scores nor loads, but for pages, dims that do not exist and dropout."""
    point, facts = POINTS[name], compiled[name]
    edges, whole = facts["selects"]
    assert edges > 0
    assert whole == bool(point.problem.page_size) + point.problem.dropout
    masked_at_edges, masked = facts["masked_loads"]
    assert masked_at_edges > 0
    assert masked == 0 or point.problem.page_size or point.head_dims == (40, 40)


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("name", [name for name, point in POINTS.items() if point.copies])
def test_tiles_are_on_their_way_while_others_are_computed_on(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    assert all(compiled[name]["copies"])


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("name", ["sm_80, head dim 128", "sm_80, few rows", "sm_90, head dim 128", "sm_90, head dim 256"])
def test_warps_have_rows_of_their_own(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    """No row's maximum is agreed on between warps, also where the result is wider than high."""
    assert compiled[name]["warps_per_cta"] == [POINTS[name].plan.num_warps, 1]
