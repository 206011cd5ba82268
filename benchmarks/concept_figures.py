"""The pictures of docs/concepts.md: ``python -m benchmarks.concept_figures``. Masks and dropped entries are the program's own."""

from __future__ import annotations

from collections.abc import Callable
from math import exp
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.pictures import DARK, EMPTY, LIGHT, MIDDLE, Picture
from flashtile.band import Band
from flashtile.distributed import SequenceShards
from flashtile.dropout import keep_mask

FOLDER = Path(__file__).parent.parent / "docs" / "figures"


def packed_rows() -> Picture:
    picture = Picture(620, 176, "Queries and the query heads that share a key head become the rows of one tile")
    for left, queries in ((20, 1), (230, 2)):
        picture.words(left, 24, f"{queries} quer{'y' if queries == 1 else 'ies'}, 4 heads of a group", bold=True)
        for query in range(queries):
            for head in range(4):
                row = query * 4 + head
                picture.labelled(left, 36 + 16 * row, 150, 14, "", (DARK, MIDDLE)[query])
                picture.words(left + 6, 47 + 16 * row, f"row {row}: query {query}, head {head}", 10, color=(EMPTY, "#222222")[query])
    picture.arrow(385, 68, 445, 68)
    picture.words(415, 60, "read", 11, "middle")
    picture.labelled(450, 40, 150, 56, "keys of one key head", LIGHT)
    picture.words(450, 116, "read once for all rows", 11)
    return picture


def query_tile() -> Picture:
    picture = Picture(620, 172, "Four rows in tiles of 64, 16 and 8 rows")
    x = 20
    for rows, note in ((64, "60 rows wasted"), (16, "12 rows wasted"), (8, "4 rows wasted")):
        picture.words(x, 20, f"block_m {rows}", bold=True)
        for row in range(rows):
            picture.box(x, 30 + 2 * row, 90, 2, DARK if row < 4 else LIGHT, edge=EMPTY, thick=0.3)
        picture.words(x + 98, 40, "4 rows used", 11)
        picture.words(x + 98, 56, note, 11)
        x += 205
    return picture


def forward_tiles() -> Picture:
    picture = Picture(620, 214, "Scores of a tile of queries and a tile of keys, walked tile by tile and never stored")
    picture.words(150, 18, "keys", anchor="middle", bold=True)
    picture.words(20, 122, "queries", bold=True)
    for query in range(4):
        picture.box(76, 50 + 36 * query, 10, 34, MIDDLE if query == 2 else LIGHT)
    for key in range(4):
        picture.box(94 + 36 * key, 28, 34, 10, MIDDLE if key == 1 else LIGHT)
        for query in range(4):
            fill = EMPTY if key > query else DARK if (query, key) == (2, 1) else LIGHT
            picture.box(94 + 36 * key, 50 + 36 * query, 34, 34, fill, edge="#888888")
    picture.arrow(98, 149, 200, 149)
    for y, line in (
        (70, "One program holds a tile of queries,"), (86, "and walks the keys that they see."),
        (112, "Only the dark tile of scores exists,"), (128, "in registers, and makes way for the next."),
        (154, "White tiles, which a causal mask hides,"), (170, "are not computed."),
    ):  # fmt: skip
        picture.words(270, y, line)
    return picture


def online_softmax() -> Picture:
    picture = Picture(620, 190, "Online softmax: three tiles of keys, one after the other, and what is kept of them")
    tiles = ((1.0, 0.5), (3.0, 2.0), (0.0, 2.5))
    largest, total = float("-inf"), 0.0
    for i, scores in enumerate(tiles):
        x = 20 + 200 * i
        picture.words(x, 22, f"keys {2 * i} and {2 * i + 1}", bold=True)
        picture.labelled(x, 32, 160, 26, "scores " + ", ".join(f"{score:g}" for score in scores), LIGHT)
        before, largest = largest, max(largest, *scores)
        scale = exp(before - largest) if i else 0.0
        total = total * scale + sum(exp(score - largest) for score in scores)
        picture.arrow(x + 80, 60, x + 80, 84)
        picture.labelled(x, 88, 160, 44, f"m = {largest:g}, l = {total:.2f}", DARK if largest != before else MIDDLE)
        picture.words(x, 150, "start" if not i else f"rescaled by exp(m_old - m) = {scale:.2f}", 11)
        if i:
            picture.arrow(x - 38, 110, x - 4, 110)
    picture.words(20, 176, "m is the largest score so far, l the sum of exp(s - m); the weighted values are rescaled with l.", 11)
    return picture


def splits() -> Picture:
    picture = Picture(620, 190, "The keys of one sequence, cut among four programs, and their results combined")
    picture.words(20, 20, "keys of one sequence", bold=True)
    for i in range(4):
        x = 20 + 148 * i
        picture.labelled(x, 30, 136, 28, f"split {i}", (LIGHT, MIDDLE)[i % 2])
        picture.arrow(x + 68, 60, x + 68, 80)
        picture.labelled(x + 18, 84, 100, 26, "out, lse", DARK)
        picture.arrow(x + 68, 112, 310 + 30 * (i - 1.5), 140)
    picture.labelled(240, 144, 140, 30, "combine", LIGHT)
    picture.arrow(382, 159, 430, 159)
    picture.words(436, 163, "out, lse over all keys")
    return picture


def bands() -> Picture:
    picture = Picture(620, 150, "Masks as bands: causal, a window, and the window seen from the keys")
    shown = (
        ("causal: Band(None, 0)", Band(None, 0), 4, 9), ("window (3, 0): Band(3, 0)", Band(3, 0), 4, 9),
        ("from the keys: Band(0, 3)", Band(3, 0).transposed(), 9, 4),
    )  # fmt: skip
    for i, (name, band, queries, keys) in enumerate(shown):
        seen = band.dense(queries, keys).tolist()
        picture.words(20 + 210 * i, 20, name, bold=True)
        picture.grid(20 + 210 * i, 30, 12 if queries > keys else 18, [[DARK if key else LIGHT for key in row] for row in seen])
    picture.words(20, 124, "a row is a query, a column a key", 11)
    return picture


def dropout() -> Picture:
    picture = Picture(620, 200, "The same entries are dropped whatever the tile")
    kept = keep_mask(0.3, torch.tensor([7, 0]), torch.tensor(0), range(16), range(16)).tolist()
    fills = [[DARK if entry else LIGHT for entry in row] for row in kept]
    for i, (name, tall, wide) in enumerate((("forward: tiles of 8 x 4", 8, 4), ("backward: tiles of 4 x 8", 4, 8))):
        x = 20 + 200 * i
        picture.words(x, 20, name, bold=True)
        picture.grid(x, 30, 10, fills)
        for top in range(0, 16, tall):
            for left in range(0, 16, wide):
                picture.box(x + 10 * left, 30 + 10 * top, 10 * wide, 10 * tall, "none", thick=1.4)
    for y, line in (
        (60, "Light entries are dropped."),
        (86, "Which ones follows from seed and"),
        (102, "position alone, so nobody has to"),
        (118, "store a mask."),
    ):
        picture.words(400, y, line, 11)
    return picture


def backward() -> Picture:
    picture = Picture(620, 196, "The two passes of the backward: owners of keys walk queries, owners of queries walk keys")
    for i, name in enumerate(("pass over keys: dK, dV", "pass over queries: dQ")):
        x = 20 + 310 * i
        picture.words(x, 20, name, bold=True)
        for query in range(4):
            for key in range(4):
                own = key == 1 if i == 0 else query == 2
                fill = EMPTY if key > query else DARK if own else LIGHT
                picture.box(x + 34 * key, 30 + 34 * query, 32, 32, fill, edge="#888888")
    picture.arrow(70, 70, 70, 160)
    picture.arrow(334, 114, 426, 114)
    for x, lines in (
        (170, ("A program owns a tile", "of keys and walks the", "queries that see it.")),
        (478, ("A program owns a tile", "of queries and walks", "the keys they see.")),
    ):
        for i, line in enumerate(lines):
            picture.words(x, 80 + 16 * i, line, 11)
    picture.words(20, 186, "Each sum has one owner: nothing is added in memory, and the order of additions is fixed.", 11)
    return picture


def quantised() -> Picture:
    picture = Picture(620, 150, "A cache of one byte an element: converted in registers, scaled where scores and results are")
    boxes = (("cache: 1 byte", LIGHT), ("float16, exact", MIDDLE), ("scores", DARK), ("softmax", LIGHT), ("result", DARK))
    for i, (text, fill) in enumerate(boxes):
        picture.labelled(20 + 120 * i, 44, 100, 34, text, fill)
        if i:
            picture.arrow(20 + 120 * i - 18, 61, 20 + 120 * i - 2, 61)
    for x, text in ((70, "half the bytes to read"), (190, "in registers"), (310, "x k_scale"), (550, "x v_scale")):
        picture.words(x, 98, text, 11, "middle")
    picture.words(20, 24, "one key, on its way", bold=True)
    picture.words(20, 130, "A scale meets a score or a result, never an element; values go the same way, behind the softmax.", 11)
    return picture


def several_gpus() -> Picture:
    """Keys travel round the ring; and of a causal mask, whose chunks of queries each rank has in zig-zag order."""
    shades = (DARK, MIDDLE, LIGHT, "#009E73")
    picture = Picture(620, 236, "Keys and values travel round a ring of four ranks; zig-zag order shares a causal mask evenly")
    picture.words(20, 22, "queries stay, keys travel", bold=True)
    for rank, (x, y) in enumerate(((20, 40), (170, 40), (170, 140), (20, 140))):
        picture.labelled(x, y, 110, 52, f"rank {rank}", shades[rank])
    for x, y, to_x, to_y in ((130, 66, 168, 66), (225, 92, 225, 138), (170, 166, 132, 166), (75, 140, 75, 94)):
        picture.arrow(x, y, to_x, to_y)
    picture.words(149, 58, "k, v", 11, "middle")
    picture.words(20, 214, "each step: attend to the keys that are here, while the next arrive", 10)
    for left, title, zigzag in ((360, "in order", False), (494, "zig-zag", True)):
        picture.words(left, 22, title, bold=True)
        shards = SequenceShards.dense(8, 4, zigzag=zigzag)
        holder = {row: rank for rank in range(4) for row in shards.rows(rank)}
        picture.grid(left, 34, 14, [[shades[holder[query]] if key <= query else EMPTY for key in range(8)] for query in range(8)])
        for rank in range(4):
            tiles = sum(query + 1 for query in shards.rows(rank))
            picture.box(left, 156 + 16 * rank, 12, 12, shades[rank])
            picture.words(left + 18, 166 + 16 * rank, f"rank {rank}: {tiles} tiles", 11)
    return picture


PICTURES: dict[str, Callable[[], Picture]] = {
    "packed_rows": packed_rows, "query_tile": query_tile, "forward_tiles": forward_tiles, "online_softmax": online_softmax,
    "splits": splits, "bands": bands, "dropout": dropout, "backward": backward, "quantised": quantised,
    "several_gpus": several_gpus,
}  # fmt: skip


def main(out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = FOLDER) -> None:
    """Draws every picture."""
    for name, draw in PICTURES.items():
        draw().save(out / f"{name}.svg")
    print(f"{len(PICTURES)} pictures written to {out}")


if __name__ == "__main__":
    typer.run(main)
