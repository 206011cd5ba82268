"""Figures of architectures and devices, with their sources: the tables that ``Device`` is filled from, and no code.

Datasheet rates stand here as published, so that anyone can check them; ``REACHED`` says what share of them kernels
reach, and ``MEASURED`` replaces a device's rates where somebody has measured them.
"""

from __future__ import annotations

from typing import NamedTuple

KIB = 1024
MIB = 1024 * KIB


class Mma(NamedTuple):
    """One matrix instruction that Triton emits, for 16-bit inputs: the least rows and columns that it takes.

    ``warps`` issue one together; ``rate`` is the share of the device's matrix rate that it can reach.
    """

    name: str
    m: int
    n: int
    k: int
    warps: int
    rate: float


class Architecture(NamedTuple):
    """What every device of one architecture shares; ``mmas`` in the order in which Triton prefers them."""

    smem_per_block: int
    smem_per_sm: int
    regs_per_sm: int
    max_regs_per_thread: int
    max_warps_per_sm: int
    warp_size: int
    mmas: tuple[Mma, ...]
    ieee_float32_mma: bool  # a matrix instruction with full float32 inputs
    async_copies: bool  # loads that bypass registers, so that a ring of stages lies in shared memory
    launch_us: float


_MMA_SYNC = Mma("mma.sync", 16, 8, 16, 1, 1.0)
_MMA_SYNC_HOPPER = _MMA_SYNC._replace(rate=0.6)  # below wgmma: operands pass through registers
_MMA_SYNC_BLACKWELL = _MMA_SYNC._replace(rate=0.3)
_WGMMA = Mma("wgmma", 64, 16, 16, 4, 1.0)
_TCGEN05 = Mma("tcgen05.mma", 64, 16, 16, 4, 1.0)
_MFMA = (Mma("mfma", 32, 32, 8, 1, 1.0), Mma("mfma", 16, 16, 16, 1, 0.9))
_WMMA = (Mma("wmma", 16, 16, 16, 1, 1.0),)

# NVIDIA: CUDA programming guide, appendix "Compute Capabilities", technical specifications: shared memory a block (opt-in)
# and an SM, registers an SM and a thread, resident warps an SM. Shared memory a block is 1 KB below an SM's from 8.0 on.
# Which MMA Triton emits: seen in compiled kernels (3.6, 3.7); none at all on sm_75.
# AMD: CDNA 2, CDNA 3, CDNA 4 and RDNA 3 instruction-set guides: LDS 64 KB (160 KB from CDNA 4), 512 VGPRs of a lane with
# the accumulation file (256 on RDNA), 4 SIMDs of 8 waves (16 on RDNA 3).
# launch_us: GPU time that one more dependent kernel adds in a graph; below 1.5 where programmatic dependent launch hides it.
ARCHITECTURES: dict[str, Architecture] = {
    "sm_75": Architecture(64 * KIB, 64 * KIB, 65536, 255, 32, 32, (), False, False, 2.0),
    "sm_80": Architecture(163 * KIB, 164 * KIB, 65536, 255, 64, 32, (_MMA_SYNC,), False, True, 1.6),
    "sm_86": Architecture(99 * KIB, 100 * KIB, 65536, 255, 48, 32, (_MMA_SYNC,), False, True, 1.6),
    "sm_87": Architecture(163 * KIB, 164 * KIB, 65536, 255, 48, 32, (_MMA_SYNC,), False, True, 1.6),
    "sm_89": Architecture(99 * KIB, 100 * KIB, 65536, 255, 48, 32, (_MMA_SYNC,), False, True, 1.6),
    "sm_90": Architecture(227 * KIB, 228 * KIB, 65536, 255, 64, 32, (_WGMMA, _MMA_SYNC_HOPPER), False, True, 1.0),
    "sm_100": Architecture(227 * KIB, 228 * KIB, 65536, 255, 64, 32, (_TCGEN05, _MMA_SYNC_BLACKWELL), False, True, 1.0),
    "sm_120": Architecture(99 * KIB, 100 * KIB, 65536, 255, 48, 32, (_MMA_SYNC,), False, True, 1.0),
    "gfx90a": Architecture(64 * KIB, 64 * KIB, 131072, 512, 32, 64, _MFMA, True, False, 3.0),
    "gfx942": Architecture(64 * KIB, 64 * KIB, 131072, 512, 32, 64, _MFMA, True, False, 3.0),
    "gfx950": Architecture(160 * KIB, 160 * KIB, 131072, 512, 32, 64, _MFMA, True, True, 3.0),
    "gfx1100": Architecture(64 * KIB, 64 * KIB, 98304, 256, 32, 32, _WMMA, False, False, 3.0),
}


class Datasheet(NamedTuple):
    """One device as its vendor publishes it: bytes, bytes/s, FLOP/s (dense; 16-bit inputs, float32 sums), hertz."""

    arch: str
    num_sms: int
    l2_bytes: int
    bandwidth: float
    matrix_rate: float
    vector_rate: float
    clock: float


# The order is the order of Device.names().
DATASHEETS: dict[str, Datasheet] = {
    # NVIDIA T4 datasheet (320 GB/s, 8.1 TFLOPS float32) and Turing architecture whitepaper (TU104: 4 MB L2, 1.59 GHz).
    # The tensor cores' 65 TFLOPS do not count, for Triton emits no MMA there: the matrix rate is the FMA rate.
    "T4": Datasheet("sm_75", 40, 4 * MIB, 320e9, 8.1e12, 8.1e12, 1.590e9),
    # NVIDIA A100 datasheet, 80 GB SXM (2,039 GB/s, 312 and 19.5 TFLOPS); Ampere whitepaper (108 SMs, 40 MB L2, 1.41 GHz).
    "A100": Datasheet("sm_80", 108, 40 * MIB, 2039e9, 312e12, 19.5e12, 1.410e9),
    # NVIDIA A10 datasheet (600 GB/s, 125 and 31.2 TFLOPS); GA102 whitepaper (6 MB L2).
    "A10": Datasheet("sm_86", 72, 6 * MIB, 600e9, 125e12, 31.2e12, 1.695e9),
    # NVIDIA L40S datasheet (864 GB/s, 362 dense and 91.6 TFLOPS); Ada whitepaper (AD102: 96 MB L2).
    "L40S": Datasheet("sm_89", 142, 96 * MIB, 864e9, 362e12, 91.6e12, 2.520e9),
    # NVIDIA Ada architecture whitepaper, RTX 4090 (1,008 GB/s, 165.2 TFLOPS with float32 sums, 82.6 TFLOPS, 72 MB L2).
    "RTX 4090": Datasheet("sm_89", 128, 72 * MIB, 1008e9, 165.2e12, 82.6e12, 2.520e9),
    # NVIDIA RTX Blackwell whitepaper, RTX 5090 (1,792 GB/s, 209.5 TFLOPS with float32 sums, 104.8 TFLOPS, 96 MB L2).
    "RTX 5090": Datasheet("sm_120", 170, 96 * MIB, 1792e9, 209.5e12, 104.8e12, 2.407e9),
    # NVIDIA H100 datasheet, SXM (3.35 TB/s, 989 and 67 TFLOPS); Hopper whitepaper (132 SMs, 50 MB L2).
    "H100": Datasheet("sm_90", 132, 50 * MIB, 3350e9, 989e12, 67e12, 1.755e9),
    # NVIDIA H200 datasheet, SXM (4.8 TB/s, 989 and 67 TFLOPS); L2 as the driver reports it.
    "H200": Datasheet("sm_90", 132, 60 * MIB, 4800e9, 989e12, 67e12, 1.755e9),
    # NVIDIA Blackwell datasheet, HGX B200 (8 TB/s, 2,250 and 80 TFLOPS a GPU); SMs and L2 as the driver reports them
    # (148 SMs, 126 MB; Chips and Cheese, "Nvidia's B200: Keeping the CUDA Juggernaut Rolling").
    "B200": Datasheet("sm_100", 148, 126 * MIB, 8000e9, 2250e12, 80e12, 1.850e9),
    # AMD Instinct MI300X data sheet (304 CUs, 5.3 TB/s, 1,307 and 163.4 TFLOPS, 2.1 GHz); CDNA 3 whitepaper: 4 MB of L2
    # for each of 8 dies. A second reader of the same keys mostly sits on another die, so one die's L2 is what counts.
    "MI300X": Datasheet("gfx942", 304, 4 * MIB, 5300e9, 1307e12, 163.4e12, 2.100e9),
}

# What kernels reach of a datasheet's figure: long reads 0.92 (H200: 0.95), dense 16-bit products 0.75 (H200: 0.78, at the
# power cap), float32 arithmetic 0.8, for a kernel is never all FMA.
REACHED = {"bandwidth": 0.92, "matrix_rate": 0.75, "vector_rate": 0.8}

# CUDA programming guide, "Arithmetic Instructions": 16 results of exp2 a clock and SM for every capability from 7.5 on.
# CDNA 3 instruction-set guide: transcendentals run at a quarter of 64 lanes, 16 too.
EXP_PER_CLOCK = 16

# Measured with long reads and an 8192^3 bfloat16 matrix product.
MEASURED: dict[str, dict[str, float]] = {
    "H200": {"bandwidth": 4.56e12, "matrix_rate": 775e12},
}
