"""What one program of a forward kernel takes of an SM: matrix instruction, shared memory, registers, resident programs.

These are estimates of what the compiler allocates, meant to err on the high side: a plan that they allow must neither
spill nor exceed the device. The constants are named here and calibrated against compiled kernels.
"""

from __future__ import annotations

from flashtile.planner.catalog import GLUON_FORWARD_SM90
from flashtile.planner.device import Device
from flashtile.planner.figures import Mma
from flashtile.planner.footprint import Footprint, instruction_for, padded, programs_that_fit
from flashtile.planner.footprint_gluon import box_dim
from flashtile.planner.forward_tiles import ForwardTileShape
from flashtile.problem import DTYPE_BYTES, Problem

LONG_HEAD = 128  # beyond, Hopper's kernel leaves its rows in the place of q on their way out
SMALLEST_REST = 32  # a second part of a head dim below this is padded instead
SHARED_SCRATCH = 1024  # reductions over warps, barriers
REGISTERS_BASE = 48  # addresses, loop counters, row statistics
REGISTERS_PER_SCORE = 1.5  # a score and its probability before packing
REGISTERS_PER_FEATURE = 7  # each of softcap, ALiBi, paging and packed queries
FRAGMENT_REGISTERS = 16  # fragments of K and V on their way into a matrix instruction
MAX_Q_REGISTERS = 64  # beyond, q's fragments are read again from shared memory
FMA_OPERANDS_LIVE = 0.25  # share of both FMA dots' operand elements that live in registers at a time
PRODUCER_WARPS = 4  # of Hopper's kernel, on top of a plan's consumers
CONSUMER_REGISTERS = {8: 240, 12: 160}  # what setmaxnreg leaves the consumers of Hopper's kernel, by their number of warps
WARP = 32


def held_dim(dim: int) -> int:
    """A head dim as the kernels hold it: a sum of two powers of two (96, 160, 192) as it is, others as the next power of two."""
    whole = 1 << dim.bit_length() - 1
    rest = dim - whole
    return dim if rest >= SMALLEST_REST and rest & rest - 1 == 0 else padded(dim)


def forward_mma(problem: Problem, tile: ForwardTileShape, device: Device) -> Mma | None:
    """The matrix instruction of a tile's products; None where they run as FMA."""
    if not device.is_gpu:
        return None
    float32 = problem.dtype_k == "float32"
    return instruction_for(device.architecture, float32, problem.allow_tf32, tile.block_m, tile.block_n, tile.num_warps)


def forward_mma_name(problem: Problem, tile: ForwardTileShape, device: Device) -> str:
    """The instruction as people write it ("wgmma m64n128k16")."""
    if not device.is_gpu:
        return "torch's CPU kernels"
    mma = forward_mma(problem, tile, device)
    if mma is None:
        return "FMA on the vector units"
    return f"{mma.name} m{mma.m}n{tile.block_n if mma.warps > 1 else mma.n}k{mma.k}"


def forward_shared_memory(problem: Problem, tile: ForwardTileShape, device: Device) -> int:
    """Bytes of shared memory that one program takes: the ring of K and V tiles, q, probabilities between layouts, a scratch."""
    size, size_v = DTYPE_BYTES[problem.dtype_k], DTYPE_BYTES[problem.dtype_v]
    if tile.kernel == GLUON_FORWARD_SM90:
        dim, dim_v = box_dim(problem.head_dim), box_dim(problem.head_dim_v)
        ring = tile.num_stages * tile.block_n * (dim * size + dim_v * size_v)
        q_bytes, out_bytes = tile.block_m * dim * size, tile.block_m * dim_v * size
        return ring + SHARED_SCRATCH + (max(q_bytes, out_bytes) if max(dim, dim_v) > LONG_HEAD else q_bytes + out_bytes)
    dim, dim_v = held_dim(problem.head_dim), held_dim(problem.head_dim_v)
    mma = forward_mma(problem, tile, device)
    wide = mma is not None and mma.warps > 1
    buffers = tile.num_stages if wide else max(1, tile.num_stages - 1)
    ring = buffers * tile.block_n * (dim * size + dim_v * size_v)
    probabilities = 0 if wide and size < 4 else tile.block_m * tile.block_n * size_v
    return max(ring + tile.block_m * dim * size + probabilities + SHARED_SCRATCH, tile.block_m * dim_v * 4)


def forward_registers(problem: Problem, tile: ForwardTileShape, device: Device) -> int:
    """32-bit registers that one thread would like to have; more than ``forward_registers_limit`` means spills."""
    features = problem.softcap + problem.alibi + problem.ragged_q + (problem.page_size > 0)
    base = REGISTERS_BASE + REGISTERS_PER_FEATURE * features
    threads = tile.num_warps * device.warp_size
    dim, dim_v = held_dim(problem.head_dim), held_dim(problem.head_dim_v)
    accumulator = tile.block_m * dim_v / threads
    scores = REGISTERS_PER_SCORE * tile.block_m * tile.block_n / threads
    mma = forward_mma(problem, tile, device)
    if tile.kernel == GLUON_FORWARD_SM90:
        q = tile.block_m * dim / 2 / threads if tile.q_in_registers else 0.0
        return int(base / 2 + accumulator + scores + (q if max(dim, dim_v) <= LONG_HEAD else 0.0))
    if mma is None:
        operands = _fma_operands(tile.block_m, tile.block_n, dim, threads) + _fma_operands(tile.block_m, dim_v, tile.block_n, threads)
        return int(base + accumulator + scores + FMA_OPERANDS_LIVE * operands)
    if tile.num_warps * 16 > tile.block_m and mma.warps == 1:
        accumulator = max(accumulator, tile.block_m * dim_v / (tile.block_m // 16 * device.warp_size) / 4)
    q = 0.0 if mma.warps > 1 else min(MAX_Q_REGISTERS, tile.block_m * dim * DTYPE_BYTES[problem.dtype_k] / 4 / threads)
    return int(base + accumulator + scores + q + FRAGMENT_REGISTERS)


def _fma_operands(rows: int, columns: int, inner: int, threads: int) -> int:
    outputs = max(1, rows * columns // threads)
    its_rows = min(rows, 1 << (outputs.bit_length() - 1) // 2)
    return (its_rows + outputs // its_rows) * inner


def forward_registers_limit(tile: ForwardTileShape, device: Device) -> int:
    """Registers that the device can give each thread of a program that computes."""
    if tile.kernel == GLUON_FORWARD_SM90:
        return CONSUMER_REGISTERS[tile.num_warps]
    return min(device.architecture.max_regs_per_thread, device.regs_per_sm // (tile.num_warps * device.warp_size))


def forward_footprint(problem: Problem, tile: ForwardTileShape, device: Device) -> Footprint:
    """The estimates of one tile together; a CPU holds one block of work a thread."""
    if not device.is_gpu:
        return Footprint(0, 0, 1, None)
    shared = forward_shared_memory(problem, tile, device)
    registers = forward_registers(problem, tile, device)
    mma = forward_mma(problem, tile, device)
    if tile.kernel == GLUON_FORWARD_SM90:  # its warps are given all registers of an SM
        return Footprint(shared, registers, 1, mma)
    return Footprint(shared, registers, programs_that_fit(shared, registers, tile.num_warps, device), mma)
