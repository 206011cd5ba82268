"""What programs of any operation take of an SM: the matrix instruction of a product, registers, how many programs fit."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from flashtile.planner.device import Device
from flashtile.planner.figures import Architecture, Mma
from flashtile.problem import Problem

MAX_PROGRAMS_PER_SM = 32
REGISTER_GRANULE = 8
TALL_TILE, ITS_WARPS = 128, 8  # which any matrix instruction takes


class Footprint(NamedTuple):
    """What one program takes of an SM, and how many programs an SM holds at a time.

    ``gathers``: the threads that multiply also copy a tile's keys one by one.
    """

    shared_memory: int
    registers: int
    resident: int
    mma: Mma | None
    gathers: bool = False


def programs_that_fit(shared_memory: int, registers: int, num_warps: int, device: Device) -> int:
    """Programs that an SM holds: the least of what shared memory, registers and warps allow, at least 1."""
    granules = -(-registers // REGISTER_GRANULE) * REGISTER_GRANULE
    by_shared = device.smem_per_sm // max(1, shared_memory)
    by_registers = device.regs_per_sm // max(1, granules * num_warps * device.warp_size)
    by_warps = device.max_warps_per_sm // num_warps
    return max(1, min(by_shared, by_registers, by_warps, MAX_PROGRAMS_PER_SM))


def registers_limit(num_warps: int, device: Device) -> int:
    """Registers that the device can give each thread of a program of so many warps."""
    return min(device.architecture.max_regs_per_thread, device.regs_per_sm // (num_warps * device.warp_size))


@lru_cache(maxsize=4096)
def instruction_for(arch: Architecture, float32: bool, allow_tf32: bool, m: int, n: int, num_warps: int) -> Mma | None:
    """The matrix instruction that Triton emits for a product with sides m and n on so many warps; None where it takes FMA."""
    if float32 and not (allow_tf32 or arch.ieee_float32_mma):
        return None
    for mma in arch.mmas:
        if m >= mma.m and n >= mma.n and num_warps % mma.warps == 0:
            return mma._replace(k=mma.k // 2, rate=mma.rate / 2 if allow_tf32 else mma.rate / 8) if float32 else mma
    return None


def instruction_of(problem: Problem, rows: int, columns: int, num_warps: int, device: Device) -> Mma | None:
    """That of the products with the problem's keys; None on a CPU too."""
    if not device.is_gpu:
        return None
    return instruction_for(device.architecture, problem.dtype_k == "float32", problem.allow_tf32, rows, columns, num_warps)


def instruction_in_words(mma: Mma | None, columns: int, device: Device) -> str:
    """The instruction as people write it ("wgmma m64n64k16"): its N side is as wide as the ``columns`` of the scores, where it can be."""
    if not device.is_gpu:
        return "torch's CPU kernels"
    if mma is None:
        return "FMA on the vector units"
    return f"{mma.name} m{mma.m}n{columns if mma.warps > 1 else mma.n}k{mma.k}"


def product_rate(problem: Problem, device: Device) -> float:
    """FLOP a second that the products may reach: those of the vector units where no instruction takes the dtype (float32 without TF32)."""
    if not device.is_gpu:
        return device.matrix_rate
    mma = instruction_of(problem, TALL_TILE, TALL_TILE, ITS_WARPS, device)
    return device.vector_rate if mma is None else device.matrix_rate * mma.rate


def fma_operands(rows: int, columns: int, inner: int, threads: int) -> int:
    """Elements of both operands that one thread of an FMA dot touches: its share of the result, as square as it gets."""
    outputs = max(1, rows * columns // threads)
    its_rows = min(rows, 1 << (outputs.bit_length() - 1) // 2)
    return (its_rows + outputs // its_rows) * inner


def features_of(problem: Problem) -> int:
    """How many features a kernel carries that take registers of their own."""
    return problem.softcap + problem.alibi + problem.ragged_q + (problem.page_size > 0)
