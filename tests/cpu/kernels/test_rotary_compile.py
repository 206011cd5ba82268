"""The rotary kernel compiled for GPUs that need not be here: no spills, and whole vectors loaded and stored."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cpu.kernels.uninterpreted import answers

pytest.importorskip("triton")

# architecture, whether packed, interleaved, in place; pairs and head dim; tokens of a program
POINTS: dict[str, tuple[str, bool, bool, bool, int, int, int]] = {
    "sm_75": ("sm_75", False, False, False, 64, 128, 32),
    "sm_80, packed and interleaved": ("sm_80", True, True, False, 64, 128, 32),
    "sm_90": ("sm_90", False, False, False, 64, 128, 32),
    "sm_90, interleaved": ("sm_90", False, True, True, 64, 128, 32),
    "sm_90, a part of the head": ("sm_90", False, False, False, 32, 96, 64),
    "sm_90, one token": ("sm_90", False, True, False, 64, 128, 1),
    "sm_90, wide heads": ("sm_90", True, False, False, 128, 256, 16),
    "gfx942": ("gfx942", True, False, True, 32, 64, 64),
}

COMPILE = """
import json, re, sys
from dataclasses import asdict
import torch
from flashtile.kernels.compiled import compile_facts, target_of
from flashtile.kernels.launch import compile_spec
from flashtile.kernels.rotary import Kind, rotary_spec

for arch, packed, interleaved, in_place, pairs, dim, tokens in json.load(sys.stdin):
    kind = Kind(torch.float16, 16, torch.float32, True, torch.int32, packed, dim, pairs, tokens, interleaved, False, in_place)
    facts = asdict(compile_facts(rotary_spec(kind), arch))
    asm = compile_spec(rotary_spec(kind), target_of(arch)).asm
    facts["vectors"] = [len(re.findall(rf"{way}\\.global(?:\\.\\w+)*\\.v4", asm.get("ptx", ""))) for way in ("ld", "st")]
    print(json.dumps(facts), flush=True)
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """What each point became, compiled in a process without Triton's interpreter."""
    return dict(zip(POINTS, answers(COMPILE, list(POINTS.values())), strict=True))


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("name", POINTS)
def test_nothing_spills(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    assert compiled[name]["spilled_bytes"] == 0


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("name", [name for name, point in POINTS.items() if point[0].startswith("sm_") and point[-1] > 1])
def test_whole_vectors_are_loaded_and_stored(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    loads, stores = compiled[name]["vectors"]
    assert loads >= 3 and stores >= 1
