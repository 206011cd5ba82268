"""dQ while programs add to it: float32 in memory, in the order in which a warpgroup holds a product, and its conversion at the end.

A block is 64 dims of 64 queries, dims as rows. Each thread of a warpgroup holds 2 x 2 of its numbers side by side in registers, and
adds these four at once; a warp's 512 bytes lie in a row. Or it leaves them in shared memory in the same order, and the copy engine
adds the whole block. Who reads a block undoes that order (backward_sums_kernel).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.language.extra.cuda import gdc_wait

from flashtile.kernels.gluon.backward_results import padded_dim
from flashtile.kernels.gluon.copy_add import async_add_shared_to_global
from flashtile.kernels.gluon.names import barrier
from flashtile.kernels.launch import Arg, Descriptor, Spec
from flashtile.kernels.operands import rows_spec, tokens_spec
from flashtile.kernels.tile.results import store_rows
from flashtile.kernels.tile.rows import clear_rows
from flashtile.kernels.tile.schedule import owned_rows, sequence_rows
from flashtile.kernels.tile.views import row_offsets
from flashtile.problem import Problem

SUMS_SIDE = tl.constexpr(64)  # queries of a block, and dims
SUMS_BLOCK = tl.constexpr(4096)  # numbers of a block
SUMS_TILE = tl.constexpr(128)  # a sequence has memory for whole tiles of so many queries
_BOX_ROWS = tl.constexpr(128)  # of a block, as the copy engine sees it: rows of 32 numbers
_BOX_COLUMNS = tl.constexpr(32)
_WARPS = 4


class SumsView(NamedTuple):
    """dQ as it is added up: float32 [sequence, query head, block of 64 queries, panel of 64 dims, 4096], and the blocks of a head.

    A sequence has whole tiles of 128 queries. Packed ones stand in one row: sequence b begins at tile cu_seqlens_q[b] // 128 + b.
    """

    ptr: Any
    blocks: Any


def sums_spec() -> SumsView:
    """SumsView for the compiler."""
    return SumsView(Arg("*fp32", 16), Arg("i32"))


def sums_box() -> Descriptor:
    """A block for the copy engine: of the sums as [blocks x 128, 32]."""
    return Descriptor("fp32", (_BOX_ROWS.value, _BOX_COLUMNS.value))


def as_boxes(sums: torch.Tensor) -> torch.Tensor:
    """The sums as ``sums_box`` sees them."""
    return sums.view(-1, _BOX_COLUMNS.value)


def sums_blocks(batch: int, seqlen_q: int, total_q: int, packed: bool) -> int:
    """Blocks of a head: of one sequence, or of all packed ones."""
    tile, side = SUMS_TILE.value, SUMS_SIDE.value
    tiles = total_q // tile + batch if packed else -(-seqlen_q // tile)
    return int(tiles * (tile // side))


@triton.jit
def sums_of_head(sums, tokens, b, h, num_heads, PANELS: tl.constexpr):
    """Where the blocks of a sequence's query head begin."""
    return sums.ptr + first_block(sums, tokens, b, h, num_heads) * (PANELS * SUMS_BLOCK)


@triton.jit
def first_block(sums, tokens, b, h, num_heads):
    """Blocks of queries ahead of those of a sequence's query head; of each there are as many as panels of dims."""
    if tokens.cu_seqlens_q is not None:
        row_start, _ = sequence_rows(tokens, b)
        return h.to(tl.int64) * sums.blocks + (row_start // SUMS_TILE + b) * (SUMS_TILE // SUMS_SIDE)
    else:
        return (b.to(tl.int64) * num_heads + h) * sums.blocks


@triton.jit
def place_in_block(d, n):
    """Where the four numbers begin that stand with that of dim d and query n of a block."""
    return n // 8 * 512 + d // 16 * 128 + d % 8 * 16 + n // 2 % 4 * 4


@gluon.jit
def add_to_sums(ptr, x):
    """Adds a product x [64 dims, queries] to a block, or to as many queries of it as x has."""
    L: gl.constexpr = x.type.layout
    d = gl.expand_dims(gl.arange(0, x.shape[0], gl.SliceLayout(1, L)), 1)
    n = gl.expand_dims(gl.arange(0, x.shape[1], gl.SliceLayout(0, L)), 0)
    # addresses as numbers: the compiler adds once for each four
    at = (ptr + place_in_block(d, n)).to(gl.int64, bitcast=True)
    gl.inline_asm_elementwise(
        "red.relaxed.gpu.global.add.v4.f32 [$1], {$5, $6, $7, $8}; mov.u32 $0, 0;", "=r,l,l,l,l,f,f,f,f",
        [at, x], dtype=gl.int8, is_pure=False, pack=4,
    )  # fmt: skip


@gluon.jit
def allocate_outgoing(box, COUNT: gl.constexpr):
    """Shared memory for COUNT blocks on their way to the sums."""
    return gl.allocate_shared_memory(box.dtype, [COUNT, _BOX_ROWS, _BOX_COLUMNS], box.layout)


@gluon.jit
def send_to_sums(box, block, outgoing, x):
    """Has the copy engine add a product x [64 dims, 64 queries] to block ``block`` of all, by way of the memory ``outgoing``."""
    # [warp, 8 dims apart, dim of 8, 8 queries apart, 2 queries apart, query of 2], in the order of place_in_block
    x = gl.permute(gl.reshape(x, [4, 2, 8, 8, 4, 2]), (3, 0, 2, 4, 1, 5))
    outgoing.store(gl.reshape(x, [_BOX_ROWS, _BOX_COLUMNS]))
    fence_async_shared()
    barrier()
    async_add_shared_to_global(box, [block * _BOX_ROWS, 0], outgoing)


@triton.jit
def backward_sums_kernel(
    sums, dq, tokens, scale, num_heads, batch, row_blocks, HEAD_DIM: tl.constexpr, PANELS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """dq from its sums. Grid: (batch * row blocks of 64 * query heads), heads of the same rows side by side."""
    if PDL:
        gdc_wait()
    program = tl.program_id(0)
    h = program % num_heads
    b = program // num_heads // row_blocks
    row_block = program // num_heads % row_blocks
    row_start, seqlen_q = sequence_rows(tokens, b)
    # the last sequence's programs share the rows of nobody
    if tokens.cu_seqlens_q is not None:
        if b == batch - 1:
            begin = owned_rows(tokens, batch) + row_block
            clear_rows(dq.ptr, dq.stride_m, dq.stride_h, begin, tokens.total_q, row_blocks, h, 1, HEAD_DIM)
    if row_block * SUMS_SIDE >= seqlen_q:
        return
    b_rows = b * 0 if tokens.cu_seqlens_q is not None else b
    # (64,)
    row = row_block * SUMS_SIDE + tl.arange(0, SUMS_SIDE)
    rows = row_offsets(dq, b_rows, row_start + row, h)
    blocks = sums_of_head(sums, tokens, b, h, num_heads, PANELS) + row_block.to(tl.int64) * (PANELS * SUMS_BLOCK)
    for panel in tl.static_range(PANELS):
        x = tl.load(blocks + panel * SUMS_BLOCK + tl.arange(0, SUMS_BLOCK))
        # [8 queries apart, warp, dim of 8, 2 queries apart, 8 dims apart, query of 2]
        x = tl.reshape(x, [8, 4, 8, 4, 2, 2])
        x = tl.reshape(tl.permute(x, (0, 3, 5, 1, 4, 2)), [SUMS_SIDE, SUMS_SIDE])
        store_rows(dq.ptr + panel * SUMS_SIDE, rows, row < seqlen_q, x * scale, False, HEAD_DIM - panel * SUMS_SIDE)


def conversion_spec(problem: Problem, *, dependent: bool) -> Spec:
    """The kernel that makes dq of its sums. ``dependent``: it is launched while what adds to them still runs."""
    i32 = Arg("i32")
    return Spec(
        backward_sums_kernel,
        args={
            "sums": sums_spec(),
            "dq": rows_spec(problem, problem.dtype_q),
            "tokens": tokens_spec(problem),
            "scale": Arg("fp32"),
            "num_heads": i32,
            "batch": i32,
            "row_blocks": i32,
        },
        constants={"HEAD_DIM": problem.head_dim, "PANELS": padded_dim(problem.head_dim) // SUMS_SIDE.value, "PDL": dependent},
        options={"num_warps": _WARPS, "num_stages": 1, "launch_pdl": dependent},
    )
