"""The portable backward's passes compiled for GPUs that need not be here: spills (none, or as measured), matrix instructions, loops."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from flashtile.band import Band
from flashtile.planner.figures import ARCHITECTURES
from flashtile.planner.plans import BackwardPlan
from flashtile.problem import Problem
from tests.cpu.kernels.uninterpreted import answers

pytest.importorskip("triton")

ALL: dict[str, Any] = {"band": Band(1023, 0), "softcap": True, "alibi": True, "sinks": True}
PACKED: dict[str, Any] = {"ragged_q": True, "ragged_k": True, "seqused_k": True}
FULL: dict[str, Any] = {"band": Band(None, None)}


@dataclass(frozen=True)
class Point:
    """What is compiled: the pass that owns "keys" or "queries", (rows owned, rows a step, warps, stages), the head dim, and how the
    problem differs from causal bfloat16.

    ``mma`` is how the matrix instruction starts, "" where Triton has none. ``copies`` says whether tiles come by asynchronous copies,
    ``spilled`` how many bytes a thread may spill, as the planner's table of shapes does.
    """

    arch: str
    owner: str
    tile: tuple[int, int, int, int]
    head_dim: int
    mma: str
    changes: dict[str, Any] = field(default_factory=dict)
    copies: bool = True
    spilled: int = 0

    @property
    def problem(self) -> Problem:
        shape = {"batch": 2, "seqlen_q": 4096, "seqlen_k": 4096, "num_heads_q": 8, "num_heads_kv": 2, "head_dim": self.head_dim}
        return Problem(**{"operation": "backward", "band": Band(None, 0), "lse": True, **shape, **self.changes})

    @property
    def plan(self) -> BackwardPlan:
        owned, step, num_warps, num_stages = self.tile
        if self.owner == "keys":
            return BackwardPlan("triton.backward", block_n=owned, block_m=step, num_warps=num_warps, num_stages=num_stages)
        return BackwardPlan("triton.backward", dq_block_m=owned, dq_block_n=step, dq_num_warps=num_warps, dq_num_stages=num_stages)


POINTS = {
    "sm_80, dropout, keys": Point("sm_80", "keys", (128, 16, 8, 2), 128, "mma.sync m16n8k16", {"dropout": True}),
    "sm_90, dropout, keys": Point("sm_90", "keys", (64, 32, 8, 2), 128, "wgmma", ALL | {"dropout": True}),
    "sm_90, dropout, queries": Point("sm_90", "queries", (128, 64, 8, 2), 128, "wgmma", ALL | {"dropout": True}),
    "sm_75, float16, queries": Point("sm_75", "queries", (64, 16, 8, 1), 64, "", {"dtype_q": "float16"}, copies=False),
    "sm_80, head dim 64, keys": Point("sm_80", "keys", (64, 32, 4, 2), 64, "mma.sync m16n8k16", FULL),
    "sm_80, head dim 128, keys": Point("sm_80", "keys", (128, 16, 8, 2), 128, "mma.sync m16n8k16"),
    "sm_80, head dim 128, queries": Point("sm_80", "queries", (128, 32, 8, 2), 128, "mma.sync m16n8k16"),
    "sm_80, head dim 256, queries": Point("sm_80", "queries", (64, 16, 8, 2), 256, "mma.sync m16n8k16"),
    "sm_80, TF32, queries": Point("sm_80", "queries", (64, 32, 4, 2), 64, "mma.sync m16n8k8", {"dtype_q": "float32", "allow_tf32": True}),
    "sm_90, head dim 64, keys": Point("sm_90", "keys", (128, 64, 8, 2), 64, "wgmma", FULL),
    "sm_90, head dim 64, 64 keys": Point("sm_90", "keys", (64, 64, 4, 3), 64, "wgmma", spilled=24),
    "sm_90, head dim 64, everything, packed, keys": Point("sm_90", "keys", (64, 64, 4, 2), 64, "wgmma", ALL | PACKED),
    "sm_90, head dim 64, everything, packed, queries": Point("sm_90", "queries", (128, 64, 8, 2), 64, "wgmma", ALL | PACKED),
    "sm_90, head dim 96, keys": Point("sm_90", "keys", (128, 32, 8, 2), 96, "wgmma"),
    "sm_90, head dim 128, keys": Point("sm_90", "keys", (128, 32, 8, 2), 128, "wgmma"),
    "sm_90, head dim 128, 64 keys": Point("sm_90", "keys", (64, 64, 4, 2), 128, "wgmma", spilled=204),
    "sm_90, head dim 128, queries": Point("sm_90", "queries", (128, 64, 8, 2), 128, "wgmma"),
    "sm_90, head dim 192, queries": Point("sm_90", "queries", (128, 64, 8, 2), 192, "wgmma"),
    "sm_90, head dim 256, keys": Point("sm_90", "keys", (64, 16, 8, 2), 256, "wgmma"),
    "sm_100, head dim 128, keys": Point("sm_100", "keys", (128, 32, 8, 2), 128, "tcgen05.mma"),
    "sm_100, head dim 128, queries": Point("sm_100", "queries", (128, 64, 8, 2), 128, "tcgen05.mma"),
    "gfx942, head dim 128, keys": Point("gfx942", "keys", (64, 32, 4, 1), 128, "v_mfma_f32_32x32x8_bf16", copies=False),
    "gfx942, head dim 128, queries": Point("gfx942", "queries", (128, 32, 8, 1), 128, "v_mfma_f32_32x32x8_bf16", copies=False),
}

COMPILE = """
import json, re, sys
from dataclasses import asdict
from flashtile.kernels.backward_keys import keys_spec
from flashtile.kernels.backward_queries import queries_spec
from flashtile.kernels.compiled import compile_facts, target_of
from flashtile.kernels.launch import compile_spec
from flashtile.planner.plans import BackwardPlan
from flashtile.problem import Problem

for arch, owner, problem, plan in json.load(sys.stdin):
    spec = (keys_spec if owner == "keys" else queries_spec)(Problem.from_json(problem), BackwardPlan.from_json(plan))
    facts = asdict(compile_facts(spec, arch))
    asm = compile_spec(spec, target_of(arch)).asm

    def loops(text):  # those over tiles
        bodies = [body.split("scf.yield")[0] for body in re.split(r"scf\\.for|scf\\.while", text)[1:]]
        return [body for body in bodies if re.search(r"tt\\.dot|warp_group_dot|tc_gen5_mma", body)]

    owned, step = spec.constants["BLOCK_N"], spec.constants["BLOCK_M"]
    tile = f"{owned}x{step}" if owner == "keys" else f"{step}x{owned}"
    facts["copies"] = [body.count("async_copy_global_to_local") for body in loops(asm["ttgir"])]
    facts["products"] = [body.count("tt.dot ") for body in loops(asm["ttir"])]
    facts["selects"] = [len(re.findall(r"arith\\.select[^\\n]*tensor<" + tile + "xi1", body)) for body in loops(asm["ttir"])]
    facts["masked_loads"] = [len(re.findall(r"tt\\.load %[\\w#]+, ", body)) for body in loops(asm["ttir"])]
    facts["atomics"] = len(re.findall(r"tt\\.atomic", asm["ttir"]))
    print(json.dumps(facts), flush=True)
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """What each point became, compiled in a process without Triton's interpreter."""
    asked = [[point.arch, point.owner, point.problem.to_json(), point.plan.to_json()] for point in POINTS.values()]
    return dict(zip(POINTS, answers(COMPILE, asked), strict=True))


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("name", POINTS)
def test_a_tile_compiles_to_what_the_architecture_has(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    point, facts = POINTS[name], compiled[name]
    assert facts["spilled_bytes"] <= point.spilled
    assert facts["shared_bytes"] <= ARCHITECTURES[point.arch].smem_per_block
    assert facts["mma"].startswith(point.mma)
    assert bool(facts["mma"]) == bool(point.mma)


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("name", POINTS)
def test_a_pass_multiplies_what_it_must_and_adds_by_itself(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    """Scores, dP, dK and dV, or scores, dP and dQ: each once for each part of a head dim. No atomics."""
    point, facts = POINTS[name], compiled[name]
    parts = 2 if point.head_dim in (96, 192) or point.head_dim > point.tile[0] else 1
    assert facts["products"] == [parts * (4 if point.owner == "keys" else 3)] * 2
    assert facts["atomics"] == 0


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("name", POINTS)
def test_only_the_loop_over_edges_has_masks(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    """The second loop masks neither scores nor loads. Nothing but the band masks scores of queries that are walked: others have lse inf."""
    point, facts = POINTS[name], compiled[name]
    edges, whole = facts["selects"]
    assert bool(edges) == (point.owner == "queries" or not point.problem.band.is_full)
    # dropout takes entries of P, which dV is summed from, and of dP
    assert whole == point.problem.dropout * (2 if point.owner == "keys" else 1)
    masked_at_edges, masked = facts["masked_loads"]
    assert masked_at_edges > 0
    assert masked == 0


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("name", [name for name, point in POINTS.items() if point.copies])
def test_tiles_are_on_their_way_while_others_are_computed_on(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    assert all(compiled[name]["copies"])
