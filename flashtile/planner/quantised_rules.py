"""The rule of quantised caches alone: how many rows Hopper's kernel takes of them before it leaves them to the portable one."""

from __future__ import annotations

from flashtile.planner.catalog import GLUON_SM90, TRITON
from flashtile.planner.cost import row_blocks_of, work_of
from flashtile.problem import Problem

BLOCK_ROWS = 16  # of Hopper's largest tile for quantised keys
MOST_ROW_BLOCKS = 4  # of a sequence and key head, on average


def leaves_quantised(problem: Problem, kernel: str) -> list[str]:
    """Why Hopper's kernel leaves quantised keys that it can read to the portable one; empty where it does not.

    Each block of BLOCK_ROWS rows reads the keys, all but the first from L2, and makes them float16. Compiled for head dim 128 that
    takes some 25 instructions of a warp a key, and a tile of 64 rows of the portable kernel some 115: MOST_ROW_BLOCKS blocks cost
    what that tile does (83 us each over 16 x 4096 keys on an H200), and where there are more, reading them as often tips the scale.
    """
    if kernel != GLUON_SM90 or not problem.quantised:
        return []
    blocks = row_blocks_of(work_of(problem), BLOCK_ROWS)
    if blocks <= MOST_ROW_BLOCKS * problem.batch:
        return []
    a_sequence = f"{blocks / problem.batch:.1f}".removesuffix(".0")
    return [
        f"quantised keys become float16 for {BLOCK_ROWS} rows at a time, and beyond {MOST_ROW_BLOCKS} blocks of rows a sequence, "
        f"here {a_sequence}, {TRITON} converts them for more rows at once"
    ]
