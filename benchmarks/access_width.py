"""How wide the portable decode kernel reads memory, by query tile: ``python -m benchmarks.access_width``. Needs no GPU.

Each tile is compiled in the shape that the planner gives it, and the instructions that read global memory are counted by their bytes
a thread. Of head dim 128, contiguous, aligned bfloat16 keys and values, 3 sequences with groups of 4.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.record import heading
from flashtile.kernels.compiled import target_of
from flashtile.kernels.decode import decode_spec
from flashtile.kernels.launch import compile_spec
from flashtile.planner.catalog import TRITON
from flashtile.planner.plans import DecodePlan
from flashtile.planner.tiles import CANDIDATES
from flashtile.testing.matrix_points import Point

OUT = Path(__file__).parent / "results" / "access_width.json"
_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global[^;]*?\], (0x[0-9a-f]+|\d+)")
_LOAD = re.compile(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)")


def widths(ptx: str) -> dict[str, dict[int, int]]:
    """Instructions by bytes a thread: ``copies`` to shared memory, and ``loads`` into registers."""
    copies = Counter(int(width, 0) for width in _COPY.findall(ptx))
    loads = Counter(int(lanes or 1) * int(bits) // 8 for lanes, bits in _LOAD.findall(ptx))
    return {"copies": dict(copies), "loads": dict(loads)}


def measured(arch: str, tile: tuple[int, bool]) -> dict[str, Any] | None:
    """One tile's plan and widths; None where the planner has no shape for it."""
    point = Point(
        kernel=TRITON, arch=arch, tile=tile, head_dims=(128, 128), dtype="bfloat16", page_size=0, features="plain", batch=3, splits=1,
        group=4, aligned=True,
    )  # fmt: skip
    plan = point.plan()
    if not isinstance(plan, DecodePlan):
        return None
    ptx = compile_spec(decode_spec(point.problem, plan), target_of(arch)).asm["ptx"]
    return {
        "arch": arch,
        "tile": f"{tile[0]}{'s' if tile[1] else ''}",
        "plan": [plan.block_n, plan.num_warps, plan.num_stages],
        **widths(ptx),
    }


def main(
    out: Annotated[Path, typer.Option(help="The result file.")] = OUT,
    commit: Annotated[str, typer.Option(help="The commit compiled; by default the checkout's.")] = "",
) -> None:
    """Compiles every query tile for sm_80 and sm_90 and stores how it reads."""
    points = [point for arch in ("sm_80", "sm_90") for tile in CANDIDATES[TRITON] if (point := measured(arch, tile)) is not None]
    protocol = " ".join((__doc__ or "").split("\n\n")[1].split())
    head = heading("access_width", torch.device("cpu"), commit, protocol, {})
    out.write_text(json.dumps({"schema": 1, **head, "points": points}, indent=1) + "\n")
    print(f"{out} written: {len(points)} tiles")


if __name__ == "__main__":
    typer.run(main)
