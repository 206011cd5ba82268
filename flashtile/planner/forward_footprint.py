"""What one program of a forward kernel takes of an SM: matrix instruction, shared memory, registers, resident programs.

Those of Triton's kernel stand here, with what both kernels share; ``forward_footprint_gluon.py`` knows Hopper's Gluon kernel.

These are estimates of what the compiler allocates, meant to err on the high side: a plan that they allow must neither
spill nor exceed the device. The constants are named here and calibrated against compiled kernels.
"""

from __future__ import annotations

from flashtile.planner.catalog import GLUON_FORWARD_SM90
from flashtile.planner.device import Device
from flashtile.planner.figures import Mma
from flashtile.planner.forward_footprint_gluon import gluon_forward_registers, gluon_forward_registers_limit, gluon_forward_shared_memory
from flashtile.planner.forward_tiles import ForwardTileShape
from flashtile.planner.resources import (
    Footprint,
    features_of,
    fma_operands,
    instruction_in_words,
    instruction_of,
    programs_that_fit,
    registers_limit,
)
from flashtile.problem import DTYPE_BYTES, Problem

SMALLEST_PART = 16  # of a head dim: a matrix instruction's operand
SMALLEST_REST = 32  # of a head dim's second part
TENSOR_MEMORY_SCRATCH = 1024  # bytes: barriers of tcgen05 and the address of its memory
PAGE_ID_BYTES = 8  # of a key that is looked up by itself,
GATHERED_SCRATCH = 1024  # and for them together
SHARED_SCRATCH = 1024  # row statistics where warps share rows
REGISTERS_BASE = {"cuda": 75, "hip": 60}  # addresses, loop counters, row statistics, fragments on their way into an instruction
DROPOUT_REGISTERS = {"cuda": 22, "hip": 30}  # words of Philox
REGISTERS_PER_SCORE = 1.5  # a score and its packed probability
REGISTERS_PER_FEATURE = {"cuda": 5, "hip": 12}  # each of softcap, ALiBi, paging and packed queries
# Where the matrix instruction reads shared memory:
TENSOR_MEMORY_ROWS = 128  # of tcgen05: with fewer, half of the lanes hold all scores
TENSOR_MEMORY_FEATURE = 8  # what a feature takes beyond, beside values that pass between tensor memory and registers
WGMMA_GATHERED_REGISTERS = {16: 0, 32: 7, 64: 28, 128: 56}  # places of keys that are looked up one by one, by keys a step
WIDE_WGMMA_REGISTERS = 100  # wgmma takes four-byte values in one order only: they are turned around on the way
TWO_PARTS_PER_ROW = {1: 30 / 128, 4: 22 / 64}  # a second part of the key dim beside the first, by the warps of an instruction,
MOST_TWO_PARTS_REGISTERS = 30  # and a row of the tile
# Where fragments go through registers:
ONE_STEP_REGISTERS = -20  # where the second product is one step, q is read again from shared memory
REGISTERS_PER_COPY = 2  # the address of one copy of a key tile, for each tile that is on its way (of four-byte values, small copies alone),
MOST_COPY_REGISTERS = 64  # of which the compiler keeps so many
FEATURE_REGISTERS = 2  # what a feature takes beyond,
PAGED_REGISTERS = 9  # paging beyond that,
GATHERED_REGISTERS = 20  # and places of keys that are looked up one by one
SHARED_ROW_REGISTERS = 0.5  # warps that share rows hold fragments of all of them: a row
WIDE_REGISTERS = {"cuda": 25, "hip": 45}  # four-byte inputs,
WIDE_Q_SHARE = 0.5  # of which q is held in part
FRAGMENTS_SHARE = 1.75  # of a whole tile's K and V fragments, which AMD's compiler asks for early
LOADED_REGISTERS = {"cuda": 0.7, "hip": 5.0}  # an element of a key tile that no asynchronous copy can bring,
LOADED_REGISTERS_PER_STAGE = {"cuda": 1.3, "hip": 0.0}  # and more of them the earlier it is asked for,
LOADED_PARTS_PER_ROW = 3 / 128  # and beside a tall tile of a head dim in two parts
COPY_BYTES = 16  # of one asynchronous copy
MIN_COPY_BYTES = 4  # the least that one brings
# Where there is no matrix instruction:
FMA_OPERANDS_LIVE = 0.12  # share of both FMA dots' operand elements that live in registers at a time
FMA_TWO_PARTS_REGISTERS = 30
FMA_FEATURE_PER_ROW = 10 / 64  # what a feature takes beside dots that fill the registers by themselves
FMA_DROPOUT_PER_ROW = 30 / 64
FMA_LOADED_SHARE = 0.4  # operands pass through registers anyway
FMA_BYTES = 4  # of an operand, whatever it was in memory


def held_dim(dim: int) -> int:
    """A head dim as the kernels hold it: the sum of ``parts_of``."""
    return sum(parts_of(dim))


def parts_of(dim: int) -> tuple[int, int]:
    """The powers of two that a head dim is held in, the second 0 where one will do: 96 is 64 + 32, 80 too, and 40 is padded to 64."""
    whole = 1 << dim.bit_length() - 1
    rest = max(SMALLEST_REST, 1 << (dim - whole - 1).bit_length()) if dim > whole else 0
    if 0 < rest < whole:
        return whole, rest
    return max(SMALLEST_PART, 2 * whole if rest else whole), 0


def forward_mma(problem: Problem, tile: ForwardTileShape, device: Device) -> Mma | None:
    """The matrix instruction of a tile's products; None where they run as FMA."""
    return instruction_of(problem, tile.block_m, tile.block_n, tile.num_warps, device)


def forward_mma_name(problem: Problem, tile: ForwardTileShape, device: Device) -> str:
    """``instruction_in_words`` of a tile's products."""
    return instruction_in_words(forward_mma(problem, tile, device), tile.block_n, device)


def forward_shared_memory(problem: Problem, tile: ForwardTileShape, device: Device) -> int:
    """Bytes of shared memory that one program takes.

    Of Triton's kernel: q beside a ring of K and V tiles, num_stages of them where the matrix instruction itself reads shared
    memory, else one less (at least 1). Probabilities pass through it where warps share rows, and on AMD, where q leaves before
    the ring is there. An FMA dot's operands are four bytes wide; where no copy is asynchronous, K leaves before V comes.
    """
    if tile.kernel == GLUON_FORWARD_SM90:
        return gluon_forward_shared_memory(problem, tile)
    size, size_v = DTYPE_BYTES[problem.dtype_k], DTYPE_BYTES[problem.dtype_v]
    dim, dim_v = held_dim(problem.head_dim), held_dim(problem.head_dim_v)
    mma = forward_mma(problem, tile, device)
    if mma is None:
        tiles = [tile.block_n * dim * FMA_BYTES, tile.block_n * dim_v * FMA_BYTES]
        ring = max(1, tile.num_stages - 1) * sum(tiles) if device.architecture.async_copies else max(tiles)
        return ring + tile.block_m * (dim + tile.block_n) * FMA_BYTES + SHARED_SCRATCH
    reads_shared = mma.warps > 1
    gathered = problem.page_size % tile.block_n != 0
    buffers = tile.num_stages if reads_shared or (gathered and device.backend == "hip") else max(1, tile.num_stages - 1)
    ring = buffers * tile.block_n * (dim * size + dim_v * size_v)
    ring += PAGE_ID_BYTES * tile.num_stages * tile.block_n + GATHERED_SCRATCH if gathered else 0
    q_bytes = tile.block_m * dim * size
    probabilities = tile.block_m * tile.block_n * size_v
    if device.backend == "hip":
        return max(q_bytes, ring + probabilities)
    if reads_shared and size == 2:
        return q_bytes + ring + (TENSOR_MEMORY_SCRATCH if mma.name.startswith("tcgen05") else 0)
    shares = reads_shared or size == 4 or _shares_rows(problem, tile, mma)
    return q_bytes + ring + (probabilities + SHARED_SCRATCH if shares else 0)


def forward_registers(problem: Problem, tile: ForwardTileShape, device: Device) -> int:
    """32-bit registers that one thread would like to have; more than ``forward_registers_limit`` means spills.

    Of Triton's kernel: a base and the features, the accumulator block_m x dim_v and the scores block_m x block_n, spread over
    the threads; then q's fragments where instructions take them from registers, or an FMA dot's operands.
    """
    if tile.kernel == GLUON_FORWARD_SM90:
        return gluon_forward_registers(problem, tile, features_of(problem))
    threads = tile.num_warps * device.warp_size
    dims, mma = held_dim(problem.head_dim) + held_dim(problem.head_dim_v), forward_mma(problem, tile, device)
    need: float = REGISTERS_BASE[device.backend] + REGISTERS_PER_FEATURE[device.backend] * features_of(problem)
    if problem.dropout:
        need += FMA_DROPOUT_PER_ROW * tile.block_m if mma is None else DROPOUT_REGISTERS[device.backend]
    need += tile.block_m * held_dim(problem.head_dim_v) / threads
    scores = REGISTERS_PER_SCORE * tile.block_m * tile.block_n / threads
    loaded = 0.0
    if _misaligned(problem, device):
        each = LOADED_REGISTERS[device.backend] + LOADED_REGISTERS_PER_STAGE[device.backend] * tile.num_stages
        each += LOADED_PARTS_PER_ROW * tile.block_m if parts_of(problem.head_dim)[1] else 0.0
        loaded = each * tile.block_n * dims / threads
    if mma is None:
        return int(need + scores + FMA_LOADED_SHARE * loaded + _fma_registers(problem, tile, threads))
    if device.backend == "cuda" and parts_of(problem.head_dim)[1]:
        need += min(MOST_TWO_PARTS_REGISTERS, TWO_PARTS_PER_ROW[mma.warps] * tile.block_m)
    if mma.warps == 1:
        return int(need + scores + loaded + _fragment_registers(problem, tile, device, mma))
    if mma.name.startswith("tcgen05"):
        need += TENSOR_MEMORY_FEATURE * features_of(problem)
        scores *= 2 if tile.block_m < TENSOR_MEMORY_ROWS else 1
    elif problem.dtype_k == "float32":
        need += WIDE_WGMMA_REGISTERS
    if problem.page_size % tile.block_n:
        need += WGMMA_GATHERED_REGISTERS.get(tile.block_n, 0)
    return int(need + scores + loaded)


def _misaligned(problem: Problem, device: Device) -> bool:
    """Whether no asynchronous copy can bring keys and values."""
    return problem.alignment < (MIN_COPY_BYTES if device.architecture.async_copies else COPY_BYTES)


def _shares_rows(problem: Problem, tile: ForwardTileShape, mma: Mma) -> bool:
    """Whether warps share rows: a result wider than high, fewer rows than warps can own."""
    part = min(parts_of(problem.head_dim_v)[0], max(SMALLEST_PART, tile.block_m))
    widest = held_dim(problem.head_dim_v) // 2 if part < parts_of(problem.head_dim_v)[0] else part
    return tile.block_m < max(tile.num_warps * mma.m, tile.block_n, widest)


def _fragment_registers(problem: Problem, tile: ForwardTileShape, device: Device, mma: Mma) -> float:
    """What instructions take that read their operands from registers: fragments of q, addresses of copies."""
    threads = tile.num_warps * device.warp_size
    size, dim = DTYPE_BYTES[problem.dtype_k], held_dim(problem.head_dim)
    dims = dim + held_dim(problem.head_dim_v)
    wide = WIDE_REGISTERS[device.backend] if size == 4 else 0.0
    if device.backend == "hip":
        return wide + FRAGMENTS_SHARE * tile.block_n * dims * size / 8 / device.warp_size
    q = tile.block_m * dim * size / 4 / threads
    need = (
        wide
        + FEATURE_REGISTERS * features_of(problem)
        + (PAGED_REGISTERS if problem.page_size else 0)
        + (GATHERED_REGISTERS if problem.page_size % tile.block_n else 0)
    )
    need += SHARED_ROW_REGISTERS * tile.block_m if tile.num_warps > 1 and _shares_rows(problem, tile, mma) else 0
    if (size == 2 or problem.alignment < COPY_BYTES) and not _misaligned(problem, device):
        copies = tile.block_n * dims * size / min(COPY_BYTES, problem.alignment) / threads * max(1, tile.num_stages - 1)
        need += min(MOST_COPY_REGISTERS, REGISTERS_PER_COPY * copies)
    if size == 4:
        return need + WIDE_Q_SHARE * q
    return need + (q if tile.block_n > mma.k else ONE_STEP_REGISTERS)


def _fma_registers(problem: Problem, tile: ForwardTileShape, threads: int) -> float:
    """What both FMA dots hold of their operands, each over its whole inner dimension."""
    first = fma_operands(tile.block_m, tile.block_n, held_dim(problem.head_dim), threads)
    second = fma_operands(tile.block_m, held_dim(problem.head_dim_v), tile.block_n, threads)
    features = FMA_FEATURE_PER_ROW * tile.block_m * features_of(problem)
    return features + FMA_OPERANDS_LIVE * (first + second) + (FMA_TWO_PARTS_REGISTERS if parts_of(problem.head_dim)[1] else 0)


def forward_registers_limit(tile: ForwardTileShape, device: Device) -> int:
    """Registers that the device can give each thread that computes."""
    if tile.kernel == GLUON_FORWARD_SM90:
        return gluon_forward_registers_limit(tile)
    return registers_limit(tile.num_warps, device)


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
