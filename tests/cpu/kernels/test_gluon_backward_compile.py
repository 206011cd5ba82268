"""Hopper's backward kernels compiled without a GPU: the instructions that they are made for, and main loops that spill nothing."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import pytest

from flashtile.band import Band
from flashtile.planner.plans import BackwardPlan
from flashtile.problem import Problem
from tests.cpu.kernels.uninterpreted import answers

pytest.importorskip("triton")

from flashtile.kernels.gluon.backward_sm90 import heads_at_once

FULL, CAUSAL, WINDOW = Band(None, None), Band(None, 0), Band(1023, 16)
PACKED: dict[str, Any] = {"batch": 3, "total_q": 4096, "ragged_q": True, "ragged_k": True}
OWN_HEADS: dict[str, Any] = {"num_heads_q": 8, "num_heads_kv": 8}  # then a tile's loop may have no step
USUAL: dict[str, Any] = {"block_m": 64, "num_stages": 3, "dq_block_n": 64, "dq_num_stages": 4}
SHORT: dict[str, Any] = {"block_m": 128, "num_stages": 3, "dq_block_n": 128, "dq_num_stages": 3}
# name: (what the problem has beside defaults, the plan's tile, most instructions that touch spilled registers in a main loop)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "head dim 128": ({"band": FULL}, USUAL, 0),
    "head dim 128, causal": ({"band": CAUSAL, "dtype_q": "float16"}, USUAL, 0),
    "head dim 128, packed, a window, used keys, sinks": ({"band": WINDOW, "seqused_k": True, "sinks": True} | PACKED, USUAL, 8),
    "head dim 64": ({"band": FULL, "head_dim": 64}, SHORT, 0),
    "head dim 64, causal": ({"band": CAUSAL, "head_dim": 64}, SHORT | {"num_programs": 0}, 0),
    "head dim 64, packed, causal": ({"band": CAUSAL, "head_dim": 64} | PACKED, SHORT, 2),
    "head dims 96 and 64, causal": ({"band": CAUSAL, "head_dim": 96, "head_dim_v": 64}, USUAL, 0),
    "head dim 128, packed, causal, no groups": ({"band": CAUSAL} | OWN_HEADS | PACKED, USUAL, 8),
    "head dim 64, packed, causal, no groups": ({"band": CAUSAL, "head_dim": 64} | OWN_HEADS | PACKED, SHORT, 2),
}
WIDE: dict[str, Any] = {"block_n": 64, "block_m": 64, "num_stages": 2, "dq_block_n": 64, "dq_num_stages": 2}
WIDE_CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "head dim 256": ({"band": FULL, "head_dim": 256}, WIDE, 0),
    "head dim 256, causal": ({"band": CAUSAL, "head_dim": 256, "dtype_q": "float16"}, WIDE | {"num_programs": 0}, 0),
    "head dim 256, packed, a window, used keys": ({"band": WINDOW, "head_dim": 256, "seqused_k": True} | PACKED, WIDE, 8),
    "head dims 192 and 128, causal": (
        {"band": CAUSAL, "head_dim": 192, "head_dim_v": 128}, WIDE | {"num_stages": 3, "dq_num_stages": 4}, 0,
    ),
    "head dim 160, packed": ({"band": CAUSAL, "head_dim": 160} | PACKED, WIDE | {"dq_num_stages": 3}, 0),
}  # fmt: skip
WHOLE: dict[str, Any] = {"block_m": 64, "num_stages": 2, "num_programs": 0, "one_pass": True}
IN_ONE_PASS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "head dim 128, causal": ({"band": CAUSAL}, WHOLE, 0),
    "head dim 128, packed, a window, used keys": ({"band": WINDOW, "seqused_k": True} | PACKED, WHOLE | {"num_programs": 132}, 8),
    "head dim 128, causal, programs that stay": ({"band": CAUSAL}, WHOLE | {"num_programs": 132}, 0),
    "head dim 128, programs that stay": ({"band": FULL}, WHOLE | {"num_programs": 132}, 16),
    "head dim 128, packed": ({"band": FULL} | PACKED, WHOLE | {"num_stages": 3}, 8),
    "head dim 128, packed, causal, no groups, programs that stay": (
        {"band": CAUSAL, "num_heads_kv": 8} | PACKED,
        WHOLE | {"num_programs": 132},
        8,
    ),
    "head dim 64": ({"band": FULL, "head_dim": 64}, WHOLE | {"block_m": 128}, 2),
    "head dim 64, packed, causal, a third warpgroup": ({"band": CAUSAL, "head_dim": 64} | PACKED, WHOLE | {"num_stages": 3}, 8),
    "head dim 64, a third warpgroup, programs that stay": (
        {"band": FULL, "head_dim": 64},
        WHOLE | {"num_stages": 3, "num_programs": 132},
        0,
    ),
}

EVERY = {
    **CASES,
    **{f"wide: {name}": case for name, case in WIDE_CASES.items()},
    **{f"one pass: {name}": case for name, case in IN_ONE_PASS.items()},
}
TELLING = (
    "head dim 128, causal", "head dim 128, packed, causal, no groups", "wide: head dim 256, causal", "one pass: head dim 128, causal",
    "one pass: head dim 128, programs that stay", "one pass: head dim 64, packed, causal, a third warpgroup",
)  # fmt: skip

COMPILE = """
import json, pathlib, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from flashtile.kernels.block import Kernel, sizes_of
from flashtile.kernels.cubin import parameter_sizes
from flashtile.kernels.gluon.backward_sm90 import specs
from flashtile.kernels.launch import compile_spec
from flashtile.planner.plans import BackwardPlan
from flashtile.problem import Problem
from flashtile.testing.unwritten import unwritten_reads

disassembler = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"

def loops_of(lines):
    # the innermost ones that multiply
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"\\s*(\\.L_x_\\d+):", line))}
    jumps = [(labels.get(found[1], i), i) for i, line in enumerate(lines) if (found := re.search(r"BRA.*\\((\\.L_x_\\d+)\\)", line))]
    loops = {(start, end) for start, end in jumps if any("HGMMA" in line for line in lines[start:end])}
    innermost = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    # what lies behind an end of the program is only waited in: jumps back from there are no loops
    return [lines[a:b] for a, b in innermost if not any("EXIT" in line for line in lines[a:b])]

def facts_of(spec):
    compiled = compile_spec(spec, GPUTarget("cuda", 90, 32))
    ptx, binary = compiled.asm["ptx"], compiled.asm["cubin"]
    counted = ("wgmma.mma_async", "wgmma.commit_group", "cp.async.bulk.tensor", "cp.reduce.async.bulk", "setmaxnreg")
    counted = (*counted, "red.global", "global.add.v4.f32")
    facts = {name: len(re.findall(name, ptx)) for name in counted}
    facts |= {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps, "takes": parameter_sizes(binary)}
    facts["passed"] = sizes_of(Kernel(1, 32, 0, False, False, spec.parameters(compiled.metadata.tensordesc_meta)))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run([disassembler, "-c", file.name], capture_output=True, text=True, check=True).stdout
    facts["groups"], facts["HGMMA"] = len(re.findall(r"HGMMA[^\\n]*gsb0", text)), text.count("HGMMA")
    counted = ("HGMMA", "MUFU.EX2", "STL", "LDL", "REDG.E.ADD.F32x4", "UTMAREDG")
    facts["unwritten"] = unwritten_reads(text)
    facts["loops"] = [{name: sum(name in line for line in loop) for name in counted} for loop in loops_of(text.splitlines())]
    return facts

problem, plan = json.load(sys.stdin)
problem, plan = Problem.from_json(problem), BackwardPlan.from_json(plan)
print(json.dumps([facts_of(spec) for spec in specs(problem, plan)[1:2 if plan.one_pass else 3]]))
"""


def planned(changes: dict[str, Any], tile: dict[str, Any]) -> tuple[Problem, BackwardPlan]:
    defaults: dict[str, Any] = {
        "operation": "backward",
        "seqlen_q": 4096,
        "seqlen_k": 4096,
        "num_heads_q": 8,
        "num_heads_kv": 2,
        "lse": True,
    }
    return Problem(**(defaults | changes)), BackwardPlan(**({"kernel": "gluon.backward_sm90", "num_programs": 132} | tile))


@functools.cache
def compiled(name: str) -> list[dict[str, Any]]:
    """What the kernels of a case became: the keys' pass, the queries' pass; or both in one. Compiled in a process without Triton's
    interpreter."""
    changes, tile, _ = EVERY[name]
    (found,) = answers(COMPILE, [value.to_json() for value in planned(changes, tile)])
    return found


def each(cases: Iterable[str]) -> list[Any]:
    """The cases as parameters: each takes the compiler ten seconds and more, so that usual runs have the telling ones alone."""
    return [name if name in TELLING else pytest.param(name, marks=pytest.mark.extensive) for name in cases]


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("name", each(CASES))
def test_products_overlap_and_main_loops_spill_nothing(name: str) -> None:
    """Packed queries may have a few numbers elsewhere while the edge of a window is masked, which few blocks need."""
    # of each of two consumers. Keys: scores, then in the loop and behind it gradients of probabilities, dV, dK, and in the loop
    # the next scores. Queries: both products of the first block, three in the loop, the last one. None is waited for by itself
    for facts, products in zip(compiled(name), (2 * (1 + 4 + 3), 2 * (2 + 3 + 1)), strict=True):
        assert facts["warps"] == 12
        assert facts["shared"] <= 227 * 1024
        assert facts["cp.async.bulk.tensor"] and facts["setmaxnreg"]
        assert facts["takes"] == facts["passed"]
        assert facts["groups"] == facts["wgmma.commit_group"] == products
        assert facts["HGMMA"] == facts["wgmma.mma_async"]
        assert facts["red.global"] == 0, "something is added in memory"
        assert not facts["unwritten"]
    problem, plan = planned(*CASES[name][:2])
    dim, dim_v = (64 if dim <= 64 else 128 for dim in (problem.head_dim, problem.head_dim_v))
    # a product of 64 rows is made in steps of 16: scores and gradients of probabilities over dims, the others over the block
    keys = (dim + dim_v) // 16 + 2 * plan.block_m // 16
    queries = (dim + dim_v) // 16 + plan.dq_block_n // 16
    for facts, products, step in zip(compiled(name), (keys, queries), (plan.block_m, plan.dq_block_n), strict=True):
        main = [loop for loop in facts["loops"] if loop["HGMMA"] == products and loop["MUFU.EX2"] == step // 2]
        assert len(main) == 2, facts["loops"]
        assert all(loop["STL"] + loop["LDL"] <= CASES[name][2] for loop in main)


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("name", each(f"wide: {name}" for name in WIDE_CASES))
def test_wide_heads_products_overlap_and_their_main_loops_spill_nothing(name: str) -> None:
    changes, tile, spilled = EVERY[name]
    problem, plan = planned(changes, tile)
    parts, parts_v = parts_of(problem.head_dim), parts_of(problem.head_dim_v)
    over, over_v = len(parts), len(parts_v)
    # of keys and values 128 dims are in registers
    held, held_v = (2 if sum(dims) > 128 else 1 for dims in (parts, parts_v))
    # of the keys' pass one consumer has scores and dV, the other gradients of probabilities and dK: the first block, two in the loop, the
    # last one. Of the queries' pass both have the first block's two, three in the loop, the last one
    groups = 2 * (held + over_v) + 2 * (held_v + over), 2 * ((over + over_v) + (2 * over + over_v) + over)
    # a product of 64 rows is made in steps of 16, over each part of a dim or, for each part, over the block
    steps, steps_v = sum(parts) // 16, sum(parts_v) // 16
    values, keys = steps + over_v * plan.block_m // 16, steps_v + over * plan.block_m // 16
    queries = steps + steps_v + over * plan.dq_block_n // 16
    for facts, products, loops in zip(compiled(name), groups, ([(keys, 0), (values, 32)], 2 * [(queries, 32)]), strict=True):
        assert facts["shared"] <= 227 * 1024 and facts["warps"] == 12
        assert facts["takes"] == facts["passed"]
        assert facts["groups"] == facts["wgmma.commit_group"] == products
        assert facts["HGMMA"] == facts["wgmma.mma_async"] and facts["red.global"] == 0 and not facts["unwritten"]
        main = [loop for loop in facts["loops"] if (loop["HGMMA"], loop["MUFU.EX2"]) in loops]
        assert sorted((loop["HGMMA"], loop["MUFU.EX2"]) for loop in main) == sorted(loops), facts["loops"]
        assert all(loop["STL"] + loop["LDL"] <= spilled for loop in main)


def parts_of(dim: int) -> tuple[int, ...]:
    """A head dim as products take it: 192 is 128 + 64, 160 is 128 + 32."""
    return {128: (128,), 160: (128, 32), 192: (128, 64), 256: (256,)}[dim]


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("name", each(f"one pass: {name}" for name in IN_ONE_PASS))
def test_one_pass_adds_sixteen_bytes_or_a_block_at_once_and_its_products_overlap(name: str) -> None:
    changes, tile, spilled = EVERY[name]
    problem, plan = planned(changes, tile)
    (facts,), dim = compiled(name), 64 if problem.head_dim <= 64 else 128
    adders = dim * plan.block_m < 64 * 128
    behind = not adders and problem.band.is_full and plan.block_m == 64
    assert facts["warps"] == (16 if adders else 12)
    assert facts["shared"] <= 227 * 1024
    assert facts["takes"] == facts["passed"]
    # as in the keys' pass; dQ is two more, in the loop and behind it (where it comes a block behind, twice), or in the loop of a third
    # warpgroup. None is waited for by itself
    assert facts["groups"] == facts["wgmma.commit_group"] == (2 * (1 + 4 + 3) + 2 if adders else 2 * (1 + 6 + 5 + 2 * behind))
    assert facts["HGMMA"] == facts["wgmma.mma_async"]
    assert not facts["unwritten"]
    # a thread holds 32 numbers of 64 x 64, and adds four at once; the copy engine adds them all
    assert facts["global.add.v4.f32"] == (0 if adders else 2 * (2 + behind) * 8)
    assert facts["cp.reduce.async.bulk"] == adders
    over_keys = 2 * 64 // 16  # both consumers' keys, in steps of 16
    products = 2 * dim // 16 + 2 * plan.block_m // 16 + (0 if adders else over_keys)
    consumers = [loop for loop in facts["loops"] if loop["HGMMA"] == products and loop["MUFU.EX2"] == plan.block_m // 2]
    adding = [loop for loop in facts["loops"] if loop["HGMMA"] == over_keys and loop["UTMAREDG"] == 1] if adders else consumers
    assert len(consumers) == 2 and len(adding) == (1 if adders else 2), facts["loops"]
    assert all(loop["REDG.E.ADD.F32x4"] == (0 if adders else 8) for loop in adding)
    assert all(loop["STL"] + loop["LDL"] <= spilled for loop in (*consumers, *adding))


def test_heads_are_taken_together_as_l2_holds_what_they_walk_or_as_programs_are_busy_with() -> None:
    problem = Problem(operation="backward", seqlen_q=1024, seqlen_k=4096, num_heads_q=16, num_heads_kv=4, head_dim=128)
    plan = BackwardPlan("gluon.backward_sm90", 64, 128, num_programs=0)
    # q and dout of a group take 2 MiB, k and v of a head as much
    assert heads_at_once(problem, plan) == (4, 4 * 4)
    assert heads_at_once(problem.with_(seqlen_q=2**20, seqlen_k=2**20), plan) == (1, 4)
    # a head has 32 tiles of 128 keys
    assert heads_at_once(problem.with_(seqlen_q=4096), plan) == (1, 4 * 4)
    assert heads_at_once(problem.with_(seqlen_q=4096), plan.with_(num_programs=132)) == (4, 4 * 4)
