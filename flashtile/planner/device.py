"""Device: the figures of one GPU (or CPU) that the planner weighs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Figures of one device; rates are what kernels reach, not what a datasheet promises.

    bandwidth in bytes/s; matrix_rate (16-bit inputs, float32 accumulation) and vector_rate (float32) in FLOP/s;
    exp_rate in exp2/s; launch_us in microseconds of GPU time for one more dependent kernel; sizes in bytes.
    """

    name: str
    backend: str  # "cuda", "hip" or "cpu"
    arch: str  # "sm_90", "gfx942", "cpu"
    num_sms: int
    smem_per_block: int
    smem_per_sm: int
    regs_per_sm: int
    max_warps_per_sm: int
    warp_size: int
    l2_bytes: int
    bandwidth: float
    matrix_rate: float
    vector_rate: float
    exp_rate: float
    launch_us: float
