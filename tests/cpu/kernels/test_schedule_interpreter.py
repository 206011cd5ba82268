"""The line of key tiles that programs share, walked by a kernel that only notes down what it would do."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtile.band import Band

pytest.importorskip("triton")
import triton
import triton.language as tl

from flashtile.kernels.tile.schedule import holder, line_length, next_unit, sequences_at_once, share, slot_of, unit_at, unit_span
from flashtile.kernels.tile.views import BandView, LengthsView

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton 3.6 with NumPy 2

COLUMNS = 10
CAUSAL = Band(None, 0)


@triton.jit
def walk(
    notes, lengths, band, batch, num_heads_kv, most,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT_COST: tl.constexpr, BLOCK_B: tl.constexpr,
    ONE_STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """notes (programs, most, COLUMNS) int32: b, h, row block, key tile from, to, tiles, slot, program of the first tile, of
    the last, whether unit_span agrees.
    """
    program = tl.program_id(0)
    n = tl.arange(0, BLOCK_B)
    total = line_length(lengths, band, batch, num_heads_kv, n, GROUP, BLOCK_M, BLOCK_N, UNIT_COST, ONE_STEP)
    program_start, end = share(total, program, tl.num_programs(0))
    b, h, row_block, start, row_blocks, first_tile, tiles = unit_at(
        lengths, band, batch, num_heads_kv, n, program_start, GROUP, BLOCK_M, BLOCK_N, UNIT_COST, ONE_STEP
    )
    position = tl.maximum(program_start, start)
    at = notes + program * most * COLUMNS
    while position < end:
        until = tl.minimum(end, start + tiles)
        tl.store(at, b)
        tl.store(at + 1, h)
        tl.store(at + 2, row_block)
        tl.store(at + 3, first_tile + position - start)
        tl.store(at + 4, first_tile + until - start)
        tl.store(at + 5, tiles)
        tl.store(at + 6, slot_of(program, program_start, start))
        tl.store(at + 7, holder(total, start, tl.num_programs(0)))
        tl.store(at + 8, holder(total, start + tiles - 1, tl.num_programs(0)))
        at += COLUMNS
        from_span, to_span = unit_span(lengths, band, batch, num_heads_kv, n, b, h, row_block, GROUP, BLOCK_M, BLOCK_N, UNIT_COST, ONE_STEP)
        tl.store(at - 1, ((from_span == start) & (to_span == start + tiles)).to(tl.int32))
        b, h, row_block, start, row_blocks, first_tile, tiles = next_unit(
            lengths, band, batch, num_heads_kv, b, h, row_block, start, row_blocks, first_tile, tiles, GROUP, BLOCK_M, BLOCK_N, UNIT_COST
        )
        position = tl.maximum(until, start)


@dataclass(frozen=True)
class Batch:
    """Lengths of a batch; ``packed`` gives each sequence its own number of queries."""

    seqlens_k: tuple[int, ...]
    seqlens_q: tuple[int, ...]
    packed: bool = True
    num_heads_kv: int = 2
    group: int = 3
    block_m: int = 8
    block_n: int = 16
    band: Band = CAUSAL


def notes_of(batch: Batch, num_programs: int, at_once: int = 0, unit_cost: int = 0) -> list[list[list[int]]]:
    """What each program does in turn: rows of COLUMNS numbers."""
    size = len(batch.seqlens_k)
    starts = torch.tensor([0, *batch.seqlens_q], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    capacity = max(1, *batch.seqlens_k)
    lengths = LengthsView(
        torch.tensor(batch.seqlens_k, dtype=torch.int32), starts if batch.packed else None, capacity, batch.seqlens_q[0], int(starts[-1]),
        None,
    )  # fmt: skip
    most = 1 + sum(batch.num_heads_kv * -(-queries * batch.group // batch.block_m) for queries in batch.seqlens_q)
    notes = torch.full((num_programs, most, COLUMNS), -1, dtype=torch.int32)
    at_once = at_once or sequences_at_once(size)
    walk[(num_programs,)](
        notes, lengths, BandView(batch.band.left, batch.band.right), size, batch.num_heads_kv, most,
        GROUP=batch.group, BLOCK_M=batch.block_m, BLOCK_N=batch.block_n, UNIT_COST=unit_cost, BLOCK_B=at_once,
        ONE_STEP=at_once >= size, COLUMNS=COLUMNS,
    )  # fmt: skip
    return [[note for note in program if note[0] >= 0] for program in notes.tolist()]


def expected_tiles(batch: Batch) -> dict[tuple[int, int, int], range]:
    """The key tiles of each unit, in the order of the line."""
    tiles = {}
    for b, (keys, queries) in enumerate(zip(batch.seqlens_k, batch.seqlens_q, strict=True)):
        left, right, offset = batch.band.left, batch.band.right, keys - queries
        first = 0 if left is None else max(0, min(offset - left, keys))
        last = keys if right is None else max(first, min(keys, keys + right))
        first_tile = first // batch.block_n
        for h in range(batch.num_heads_kv):
            for row_block in range(-(-queries * batch.group // batch.block_m)):
                tiles[b, h, row_block] = range(first_tile, max(first_tile + 1, -(-last // batch.block_n)))
    return tiles


def check(batch: Batch, num_programs: int, at_once: int = 0, unit_cost: int = 0) -> None:
    programs = notes_of(batch, num_programs, at_once, unit_cost)
    expected = expected_tiles(batch)
    walked: dict[tuple[int, int, int], list[int]] = {}
    slots: dict[int, tuple[int, int, int]] = {}
    parts: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for program, notes in enumerate(programs):
        for b, h, row_block, begin, end, tiles, slot, first_program, last_program, agrees in notes:
            unit = (b, h, row_block)
            assert tiles == len(expected[unit])
            assert begin < end
            assert agrees
            walked.setdefault(unit, []).extend(range(begin, end))
            assert first_program <= program <= last_program
            assert (first_program == last_program) == (end - begin == tiles)
            parts.setdefault(unit, []).append((program, slot))
            if end - begin < tiles:
                assert slot not in slots
                assert 0 <= slot < 2 * num_programs
                slots[slot] = unit
                # where the reader looks for part k of a unit
                assert slot == 2 * program or program == first_program
    assert list(walked) == list(expected)
    assert {unit: list(tiles) for unit, tiles in expected.items()} == walked
    # a program's work: its tiles, and what beginning units costs; that of a unit may be borne by the program before
    counts = [sum(note[4] - note[3] for note in notes) for notes in programs]
    begun = [sum(note[3] == expected[note[0], note[1], note[2]][0] for note in notes) for notes in programs]
    work = [tiles + unit_cost * units for tiles, units in zip(counts, begun, strict=True)]
    assert max(work) - min(work) <= 1 + 2 * unit_cost
    for unit, of_unit in parts.items():
        # every program between the first and the last takes part, so that a reader can count them
        assert [program for program, _ in of_unit] == list(range(of_unit[0][0], of_unit[-1][0] + 1)), unit


LENGTHS = st.integers(0, 90)
SIDES = st.none() | st.integers(0, 60)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    size = draw(st.integers(1, 5))
    packed = draw(st.booleans())
    queries = st.integers(0, 7)
    one = draw(queries)
    return Batch(
        seqlens_k=tuple(draw(LENGTHS) for _ in range(size)),
        seqlens_q=tuple(draw(queries) for _ in range(size)) if packed else (one,) * size,
        packed=packed,
        num_heads_kv=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 3, 4])),
        block_m=draw(st.sampled_from([1, 8])),
        block_n=draw(st.sampled_from([16, 32])),
        band=Band(draw(SIDES), draw(st.none() | st.integers(0, 9))),
    )


@settings(max_examples=30)
@given(batches(), st.integers(1, 12))
def test_every_tile_of_every_unit_belongs_to_one_program(batch: Batch, num_programs: int) -> None:
    check(batch, num_programs)


@pytest.mark.parametrize("num_programs", [1, 7, 400])
def test_one_long_sequence_among_short_ones(num_programs: int) -> None:
    check(Batch((5, 800, 0, 17, 3), (1, 1, 1, 1, 1)), num_programs)


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_larger_than_one_vector(packed: bool) -> None:
    lengths = tuple((7 * i) % 50 for i in range(70))
    queries = tuple(i % 3 for i in range(70)) if packed else (1,) * 70
    for at_once in (32, 128):
        check(Batch(lengths, queries, packed, num_heads_kv=1), 9, at_once)


def test_a_batch_without_queries_has_no_line() -> None:
    assert notes_of(Batch((5, 9), (0, 0)), 3) == [[], [], []]


def test_few_vector_sizes() -> None:
    sizes = [sequences_at_once(batch) for batch in range(1, 2000)]
    assert len(set(sizes)) <= 3
    assert all(size >= batch for batch, size in zip(range(1, max(sizes) + 1), sizes, strict=False))
