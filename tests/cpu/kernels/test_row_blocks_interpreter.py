"""Which row block a program of a forward grid takes, and which key tiles need no mask, noted down by a small kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtile.band import Band

pytest.importorskip("triton")
import triton
import triton.language as tl

from flashtile.kernels.tile.band import keys_of, whole_tiles
from flashtile.kernels.tile.order import row_block_of
from flashtile.kernels.tile.views import BandView, band_view

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton 3.6 with NumPy 2

SIDES = st.none() | st.integers(0, 70)


@triton.jit
def note_order(notes, num_heads, batch, row_blocks, heads_at_once, LAST_FIRST: tl.constexpr):
    """notes (programs, 3) int32: sequence, head, row block."""
    program = tl.program_id(0)
    b, h, row_block = row_block_of(program, num_heads, batch, row_blocks, heads_at_once, LAST_FIRST)
    tl.store(notes + 3 * program, b)
    tl.store(notes + 3 * program + 1, h)
    tl.store(notes + 3 * program + 2, row_block)


@triton.jit
def note_tiles(notes, band, seqlen_q, seqlen_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """notes (row blocks, 4) int32: [first, last) keys, [start, end) tiles."""
    row_block = tl.program_id(0)
    offset = seqlen_k - seqlen_q
    first_position = row_block * BLOCK_M + offset
    last_position = tl.minimum(row_block * BLOCK_M + BLOCK_M, seqlen_q) - 1 + offset
    first, last = keys_of(band, first_position, last_position, seqlen_k)
    start, end = whole_tiles(band, first_position, last_position, first, last, BLOCK_N)
    tl.store(notes + 4 * row_block, first)
    tl.store(notes + 4 * row_block + 1, last)
    tl.store(notes + 4 * row_block + 2, start)
    tl.store(notes + 4 * row_block + 3, end)


def order(batch: int, heads: int, row_blocks: int, heads_at_once: int, last_first: bool) -> list[tuple[int, ...]]:
    notes = torch.full((batch * heads * row_blocks, 3), -1, dtype=torch.int32)
    note_order[(len(notes),)](notes, heads, batch, row_blocks, heads_at_once, LAST_FIRST=last_first)
    return [tuple(note) for note in notes.tolist()]


@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(1, 20), st.booleans())
def test_every_row_block_of_every_head_has_one_program(batch: int, heads: int, row_blocks: int, at_once: int, last_first: bool) -> None:
    taken = order(batch, heads, row_blocks, min(at_once, batch * heads), last_first)
    assert sorted(taken) == [(b, h, row_block) for b in range(batch) for h in range(heads) for row_block in range(row_blocks)]


def test_the_last_row_blocks_of_a_section_come_first_and_its_heads_stay_neighbours() -> None:
    assert order(1, 5, 2, 2, last_first=True) == [
        (0, 0, 1), (0, 1, 1), (0, 0, 0), (0, 1, 0),
        (0, 2, 1), (0, 3, 1), (0, 2, 0), (0, 3, 0),
        (0, 4, 1), (0, 4, 0),
    ]  # fmt: skip
    assert order(2, 2, 2, 4, last_first=False)[:4] == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]


def check_tiles(seqlen_q: int, seqlen_k: int, band: Band, block_m: int, block_n: int) -> None:
    """The tiles said to be whole are just those that every row of a block sees whole."""
    blocks = -(-seqlen_q // block_m)
    notes = torch.full((blocks, 4), -1, dtype=torch.int32)
    note_tiles[(blocks,)](notes, BandView(*band_view(band)), seqlen_q, seqlen_k, BLOCK_M=block_m, BLOCK_N=block_n)
    visible = band.dense(seqlen_q, seqlen_k)
    for block, (first, last, start, end) in enumerate(notes.tolist()):
        rows = visible[block * block_m : (block + 1) * block_m]
        seen = rows.any(0).nonzero().flatten().tolist()
        assert all(first <= key < last for key in seen)
        # walked are the tiles that [first, last) touches; whole ones among them
        assert first // block_n <= start <= end <= max(-(-last // block_n), first // block_n)
        whole = [t for t in range(seqlen_k // block_n) if rows[:, t * block_n : (t + 1) * block_n].all()]
        assert list(range(start, end)) == whole


@settings(max_examples=40)
@given(st.integers(1, 80), st.integers(0, 150), SIDES, SIDES, st.sampled_from([16, 32]), st.sampled_from([16, 32]))
def test_whole_tiles_are_those_that_every_row_sees(
    seqlen_q: int, seqlen_k: int, left: int | None, right: int | None, block_m: int, block_n: int
) -> None:
    check_tiles(seqlen_q, seqlen_k, Band(left, right), block_m, block_n)


@pytest.mark.parametrize("band", [Band(), Band(None, 0), Band(31, 0), Band(64, 5), Band(2**40, 2**40)])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(64, 64), (65, 63), (33, 129), (80, 5)])
def test_whole_tiles_at_tile_edges(seqlen_q: int, seqlen_k: int, band: Band) -> None:
    check_tiles(seqlen_q, seqlen_k, band, 32, 16)
