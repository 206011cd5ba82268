"""A kernel that writes past the end of its allocation, for the sanitizer's control. Its name passes the filter for ours."""

import torch
import triton
import triton.language as tl

HELD, WRITTEN = 16, 4096  # float32 elements


@triton.jit
def decode_control(OUT, COUNT: tl.constexpr):
    tl.store(OUT + tl.arange(0, COUNT), tl.zeros([COUNT], tl.float32))


def write_out_of_bounds() -> None:
    decode_control[(1,)](torch.empty(HELD, device="cuda"), COUNT=WRITTEN)
    torch.cuda.synchronize()
