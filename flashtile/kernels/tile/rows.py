"""Rows of q and its kin: [rows, dim] tiles that a program loads once."""

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, rows, real, D: tl.constexpr, DIM: tl.constexpr):
    """[rows, D] at element offsets ``rows``, zero where a row is not ``real`` or a dim is DIM or beyond."""
    d = tl.arange(0, D)
    return tl.load(ptr + rows[:, None] + d[None, :], mask=real[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def clear_rows(ptr, stride_m, stride_h, begin, end, step, first_head, num_heads, DIM: tl.constexpr):
    """Zeros in every step-th packed row of [begin, end), in some heads."""
    d = tl.arange(0, triton.next_power_of_2(DIM))
    for row in range(begin, end, step):
        for head in range(first_head, first_head + num_heads):
            at = row * stride_m + head * stride_h  # strides are int64
            tl.store(ptr + at + d, tl.zeros_like(d).to(ptr.dtype.element_ty), mask=d < DIM)
