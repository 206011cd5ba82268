"""Where results go: rows of out and lse, and rows that nobody owns."""

import triton
import triton.language as tl

from flashtile.kernels.tile.schedule import owned_rows
from flashtile.kernels.tile.softmax import by_key, by_row, natural_lse


@triton.jit
def store_rows(ptr, offsets, real, values, KEYS_FIRST: tl.constexpr, DIM: tl.constexpr):
    """Values of a row block, [rows, dim] or where KEYS_FIRST [dim, rows]: each row that is ``real``, from its offset on."""
    dv = tl.arange(0, values.shape[0] if KEYS_FIRST else values.shape[1])
    ptrs = ptr + by_row(offsets, KEYS_FIRST) + by_key(dv, KEYS_FIRST)
    tl.store(ptrs, values.to(ptr.dtype.element_ty), mask=by_row(real, KEYS_FIRST) & by_key(dv < DIM, KEYS_FIRST))


@triton.jit
def store_lse(lse, b_rows, token, head, real, m, l):
    """The natural log of each row's denominator, if it is wanted. ``head`` is a scalar or (rows,)."""
    if lse.ptr is not None:
        at = b_rows.to(tl.int64) * lse.stride_b + head.to(tl.int64) * lse.stride_h + token.to(tl.int64) * lse.stride_m
        tl.store(lse.ptr + at, natural_lse(m, l), mask=real)


@triton.jit
def clear_unowned(out, lse, lengths, batch, first, step, first_head, num_heads, HEAD_DIM_V: tl.constexpr):
    """Packed queries past the last sequence's end see no key: out 0, lse -inf. Every step-th of them, of some heads."""
    if lengths.cu_seqlens_q is not None:
        dv = tl.arange(0, triton.next_power_of_2(HEAD_DIM_V))
        for token in range(owned_rows(lengths, batch) + first, lengths.total_q, step):
            for head in range(first_head, first_head + num_heads):
                at = token * out.stride_m + head * out.stride_h
                tl.store(out.ptr + at + dv, tl.zeros_like(dv).to(out.ptr.dtype.element_ty), mask=dv < HEAD_DIM_V)
                if lse.ptr is not None:
                    tl.store(lse.ptr + head * lse.stride_h + token * lse.stride_m, float("-inf"))
