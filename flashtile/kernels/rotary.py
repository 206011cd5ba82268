"""Rotary position embeddings: pairs of a head's elements turned by an angle that grows with the token's position, in Triton.

Source: RoFormer (Su, Lu, Pan, Murtadha, Wen, Liu 2021).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from flashtile.kernels.launch import TRITON_DTYPES, Arg, Launch, Spec, launcher, on_device, pointer_of
from flashtile.kernels.operands import rows_view
from flashtile.kernels.tile.rotary import SequencesView, TablesView, angles_at, held, move_turned, tokens_of
from flashtile.kernels.tile.views import RowsView, row_offsets
from flashtile.rounding import alignment_of

_ELEMENTS = 4096  # of x that a program holds
_WARPS = 4


class RotaryCall(NamedTuple):
    """Tensors and numbers of one call, as `rotate` takes them."""

    x: torch.Tensor
    out: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    offsets: torch.Tensor | None
    offset: int
    cu_seqlens: torch.Tensor | None
    max_seqlen: int


class Kind(NamedTuple):
    """What a call's kernel is compiled for."""

    dtype: torch.dtype
    alignment: int
    dtype_table: torch.dtype
    aligned_tables: bool
    dtype_offsets: torch.dtype | None
    packed: bool
    head_dim: int
    pairs: int
    block_m: int
    interleaved: bool
    conjugate: bool
    in_place: bool


@triton.jit
def rotary_kernel(
    x, out, tables, sequences, num_heads, batch, row_blocks,
    BLOCK_M: tl.constexpr, PAIRS: tl.constexpr, PAIRS_HELD: tl.constexpr, HEAD_DIM: tl.constexpr, REST_HELD: tl.constexpr,
    INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Grid: (sequences * row blocks * heads), heads of the same rows side by side, since they read the same rows of the tables.

    ``out`` may be ``x``. Packed tokens that belong to no sequence are copied, by the programs of one sequence more.
    """
    program = tl.program_id(0)
    h = program % num_heads
    b = program // num_heads // row_blocks
    row_block = program // num_heads % row_blocks
    # (BLOCK_M,)
    position = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    if b < batch:
        start, end = tokens_of(sequences, b)
        b_rows = b if sequences.cu_seqlens is None else b * 0
        real = start + position < end
        at = tables.offset + position
        if tables.offsets is not None:
            at += tl.load(tables.offsets + b).to(tl.int32)
        # [BLOCK_M, PAIRS_HELD]
        cos, sin = angles_at(tables, at, real, PAIRS, PAIRS_HELD)
        if CONJUGATE:
            sin = -sin
        source = x.ptr + row_offsets(x, b_rows, start + position, h)
        target = out.ptr + row_offsets(out, b_rows, start + position, h)
        move_turned(source, target, real, cos, sin, None, PAIRS, PAIRS_HELD, HEAD_DIM, REST_HELD, INTERLEAVED, IN_PLACE)
    elif sequences.cu_seqlens is not None:
        start = tl.minimum(tl.maximum(tl.load(sequences.cu_seqlens + b), 0), sequences.tokens)
        all_d = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
        for block in tl.range(start + row_block * BLOCK_M, sequences.tokens, row_blocks * BLOCK_M, num_stages=1):
            for m in range(block, tl.minimum(block + BLOCK_M, sequences.tokens)):
                from_x = m * x.stride_m + h * x.stride_h + all_d  # strides are int64
                to_out = m * out.stride_m + h * out.stride_h + all_d
                tl.store(out.ptr + to_out, tl.load(x.ptr + from_x, mask=all_d < HEAD_DIM), mask=all_d < HEAD_DIM)


def rotate(
    x: torch.Tensor,
    out: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    offsets: torch.Tensor | None,
    offset: int,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    interleaved: bool,
    conjugate: bool,
) -> None:
    """Writes the rotated ``x`` to ``out``, which may be ``x`` itself; arguments are checked.

    x           (b, seqlen, heads, dim), or (tokens, heads, dim) where cu_seqlens is given; the last dimension contiguous
    out         of x's shape and dtype
    cos, sin    (rows, pairs), contiguous; tokens whose position is no row of theirs are not turned
    offsets     (b,) int32 or int64, or None: added to each token's position, as ``offset`` is
    max_seqlen  the most tokens of one sequence
    interleaved pairs are neighbours, elements 2 i and 2 i + 1; else i and i + pairs
    conjugate   turns the other way
    """
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if x.numel() == 0 or (sequences == 0 and out is x):
        return
    pairs = cos.shape[1]
    kind = Kind(
        x.dtype, alignment_of(x, x, x, out), cos.dtype, (cos.data_ptr() | sin.data_ptr()) % 16 == 0,
        None if offsets is None else offsets.dtype, cu_seqlens is not None, x.shape[-1], pairs, _block_m(pairs, max_seqlen),
        interleaved, conjugate, out is x,
    )  # fmt: skip
    _runner(kind, x.device)(RotaryCall(x, out, cos, sin, offsets, offset, cu_seqlens, max_seqlen))


def rotary_spec(kind: Kind) -> Spec:
    """The kernel for calls of a kind."""
    i32, stride = Arg("i32"), Arg("i64", max(1, kind.alignment // kind.dtype.itemsize))
    rows = RowsView(Arg("*" + _name_of(kind.dtype), kind.alignment), stride, stride, stride)
    table = Arg("*" + _name_of(kind.dtype_table), 16 if kind.aligned_tables else 1)
    offsets = None if kind.dtype_offsets is None else Arg("*i64" if kind.dtype_offsets == torch.int64 else "*i32")
    rest = kind.head_dim - 2 * kind.pairs
    return Spec(
        rotary_kernel,
        args={
            "x": rows, "out": rows, "tables": TablesView(table, table, i32, offsets, i32),
            "sequences": SequencesView(Arg("*i32") if kind.packed else None, i32), "num_heads": i32, "batch": i32, "row_blocks": i32,
        },
        constants={
            "BLOCK_M": kind.block_m, "PAIRS": kind.pairs, "PAIRS_HELD": held(kind.pairs), "HEAD_DIM": kind.head_dim,
            "REST_HELD": held(rest), "INTERLEAVED": kind.interleaved, "CONJUGATE": kind.conjugate, "IN_PLACE": kind.in_place,
        },
        options={"num_warps": _WARPS, "num_stages": 1},
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _runner(kind: Kind, device: torch.device) -> Any:
    """What runs calls of a kind on a device's current stream."""
    launch: Launch = launcher(rotary_spec(kind), device)
    pointer = pointer_of(rotary_kernel)

    def run(stream: int, call: RotaryCall) -> None:
        x, cu_seqlens = call.x, call.cu_seqlens
        batch, tokens, heads = (x.shape[0], x.shape[1], x.shape[2])
        copied = 0
        if cu_seqlens is not None:
            batch, tokens, heads = cu_seqlens.shape[0] - 1, x.shape[0], x.shape[1]
            copied = 0 if call.out is x else 1
        row_blocks = max(1, -(-call.max_seqlen // kind.block_m))
        launch.run(
            (batch + copied) * row_blocks * heads, 1, stream, rows_view(x, pointer), rows_view(call.out, pointer),
            (pointer(call.cos), pointer(call.sin), call.cos.shape[0], None if call.offsets is None else pointer(call.offsets), call.offset),
            (None if cu_seqlens is None else pointer(cu_seqlens), tokens), heads, batch, row_blocks, *launch.constants,
        )  # fmt: skip

    return on_device(run, device)


def _block_m(pairs: int, max_seqlen: int) -> int:
    """Tokens of a program: one where there is one, else as many as it holds."""
    return 1 if max_seqlen <= 1 else max(1, _ELEMENTS // (2 * held(pairs)))


def _name_of(dtype: torch.dtype) -> str:
    return TRITON_DTYPES[str(dtype).removeprefix("torch.")]
