"""What one program of Hopper's Gluon forward kernel takes of an SM: shared memory, registers. Estimates on the high side.

A program has consumers, warpgroups of 64 rows each, and a producer; setmaxnreg shares an SM's registers out among them. Tiles lie
in shared memory as panels of 64 columns.
"""

from __future__ import annotations

from flashtile.planner.forward_tiles import ForwardTileShape
from flashtile.problem import Problem

PANEL_BYTES = 128  # of a row of a panel: 64 columns of 16 bits
PANEL = 64
WARPGROUP = 128  # threads, which hold 64 rows
ROWS = 64
SHARED_SCRATCH = 1024  # barriers, and what the producer tells about a tile
SHARED_MEMORY = 227 * 1024  # of a program on sm_90
LEAST_PAGE = 8  # keys: rows of the pattern in which shared memory is swizzled
LONG_HEAD = 128
REGISTERS_BASE = 23  # addresses, barriers' phases, row statistics
REGISTERS_PER_SCORE = 1.5  # a score and its packed probability
REGISTERS_PER_FEATURE = 9  # each of softcap, ALiBi, paging and packed queries
LONG_HEAD_PER_KEY = 24 / 64  # head dims beyond LONG_HEAD: tiles that span several panels
SMALL_PAGES_PER_KEY = 36 / 128  # a bit for each of several pages that a tile lies on
CONSUMER_REGISTERS = {8: 240, 12: 160}  # what setmaxnreg leaves a consumer's threads, by the number of consumer warps


def panels_of(dim: int) -> int:
    """Panels of a head dim."""
    return sum(_parts(dim)) // PANEL


def gluon_forward_shared_memory(problem: Problem, tile: ForwardTileShape) -> int:
    """Bytes of shared memory: the ring of K and V tiles, q, and results on their way out: in the place of q where room is short."""
    q_bytes = tile.block_m * panels_of(problem.head_dim) * PANEL_BYTES
    out_bytes = tile.block_m * panels_of(problem.head_dim_v) * PANEL_BYTES
    ring = tile.num_stages * tile.block_n * (panels_of(problem.head_dim) + panels_of(problem.head_dim_v)) * PANEL_BYTES
    both = ring + q_bytes + out_bytes + SHARED_SCRATCH
    in_place = not tile.q_in_registers and _out_fits_q(problem.head_dim, problem.head_dim_v)
    return both if both <= SHARED_MEMORY or not in_place else both - out_bytes


def _out_fits_q(dim: int, dim_v: int) -> bool:
    """Whether rows of out can take the place of rows of q: each part of them in a part of q's."""
    (main, *rest), (main_v, *rest_v) = _parts(dim), _parts(dim_v)
    return main % main_v == 0 and len(rest_v) <= len(rest)


def _parts(dim: int) -> tuple[int, ...]:
    """Columns of a head dim as they are held: a power of two, and a panel for the rest, if there is one."""
    whole = max(PANEL, 1 << (dim - 1).bit_length())
    half = whole // 2
    return (half, PANEL) if half >= PANEL and dim - half <= half // 2 else (whole,)


def gluon_forward_registers(problem: Problem, tile: ForwardTileShape, features: int) -> int:
    """32-bit registers that one thread of a consumer would like to have, for a kernel with so many features."""
    dim, dim_v = panels_of(problem.head_dim) * PANEL, max(PANEL, problem.head_dim_v)
    need: float = REGISTERS_BASE + REGISTERS_PER_FEATURE * features
    need += ROWS * (dim_v + REGISTERS_PER_SCORE * tile.block_n) / WARPGROUP
    need += ROWS * dim / 2 / WARPGROUP if tile.q_in_registers else 0.0
    need += LONG_HEAD_PER_KEY * tile.block_n if max(dim, dim_v) > LONG_HEAD else 0.0
    need += SMALL_PAGES_PER_KEY * tile.block_n if 0 < problem.page_size < tile.block_n else 0.0
    return int(need)


def gluon_forward_registers_limit(tile: ForwardTileShape) -> int:
    """Registers that each thread of a consumer is given."""
    return CONSUMER_REGISTERS[tile.num_warps]


def gluon_page_reasons(problem: Problem, tile: ForwardTileShape) -> list[str]:
    """Why a tile's keys cannot lie on the problem's pages: one copy brings a part of one page, or the whole tile."""
    page = problem.page_size
    if not page or (page >= LEAST_PAGE and (page % tile.block_n == 0 or tile.block_n % page == 0)):
        return []
    return [f"pages of {page} keys neither divide tiles of {tile.block_n} keys nor are multiples of them, with {LEAST_PAGE} keys at least"]
