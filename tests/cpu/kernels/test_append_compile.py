"""The append kernel compiled for GPUs that need not be here: no spills, whole vectors, and the waits of dependent launches."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pytest

from tests.cpu.kernels.uninterpreted import answers

pytest.importorskip("triton")


@dataclass(frozen=True)
class Point:
    """What differs from a step over a contiguous cache with tables: an architecture, and a few fields of the kernel's Kind."""

    arch: str
    page_size: int = 0
    packed: bool = False
    pairs: int = 64
    interleaved: bool = False
    stored: str = "bfloat16"


POINTS = {
    "sm_75": Point("sm_75"),
    "sm_80, interleaved": Point("sm_80", interleaved=True),
    "sm_90": Point("sm_90"),
    "sm_90, pages": Point("sm_90", page_size=16, interleaved=True),
    "sm_90, packed": Point("sm_90", packed=True, pairs=32),
    "sm_90, nothing turned": Point("sm_90", pairs=0, page_size=1),
    "sm_90, codes of float8": Point("sm_90", stored="float8_e4m3fn"),
    "sm_80, codes of int8, nothing turned": Point("sm_80", stored="int8", pairs=0),
    "gfx942, codes of float8": Point("gfx942", stored="float8_e4m3fn"),
}

COMPILE = """
import json, re, sys
from dataclasses import asdict
import torch
from flashtile.kernels.append import Kind, append_spec
from flashtile.kernels.compiled import compile_facts, target_of
from flashtile.kernels.launch import compile_spec

for point in json.load(sys.stdin):
    turns, codes = point["pairs"] > 0, point["stored"] != "bfloat16"
    kind = Kind(
        torch.bfloat16, getattr(torch, point["stored"]), (codes, codes), 16, point["packed"], point["packed"] and turns,
        point["page_size"], 128, 128, torch.float32 if turns else None, True, False, point["pairs"], point["interleaved"], turns, turns,
        point["arch"] == "sm_90",
    )
    facts = asdict(compile_facts(append_spec(kind), point["arch"]))
    ptx = compile_spec(append_spec(kind), target_of(point["arch"])).asm.get("ptx", "")
    facts["vectors"] = [len(re.findall(rf"{way}\\.global(?:\\.\\w+)*\\.v4", ptx)) for way in ("ld", "st")]
    facts["dependent"] = [ptx.count("griddepcontrol.wait"), ptx.count("griddepcontrol.launch_dependents")]
    print(json.dumps(facts), flush=True)
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """What each point became, compiled in a process without Triton's interpreter."""
    return dict(zip(POINTS, answers(COMPILE, [asdict(point) for point in POINTS.values()]), strict=True))


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("name", POINTS)
def test_nothing_spills(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    assert compiled[name]["spilled_bytes"] == 0


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("name", [name for name, point in POINTS.items() if point.arch != "gfx942"])
def test_whole_vectors_are_loaded_and_stored(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    loads, stores = compiled[name]["vectors"]
    assert loads >= 2 and (stores >= 2 or POINTS[name].stored != "bfloat16")


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("name", [name for name, point in POINTS.items() if point.arch != "gfx942"])
def test_only_hopper_launches_dependents(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    assert compiled[name]["dependent"] == ([1, 1] if POINTS[name].arch == "sm_90" else [0, 0])
