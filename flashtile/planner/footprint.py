"""What one program of a decode kernel takes of an SM: matrix instruction, shared memory, registers, resident programs.

These are estimates of what the compiler allocates, meant to err on the high side: a plan that they allow must neither
spill nor exceed the device. The constants are named here and calibrated against compiled kernels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Protocol

from flashtile.planner.device import Device
from flashtile.planner.figures import Architecture, Mma
from flashtile.problem import DTYPE_BYTES, Problem

MIN_PADDED_DIM = 16
SHARED_SCRATCH = 1024  # bytes: reductions over warps, barriers
REGISTERS_BASE = 40  # addresses, loop counters, row statistics
REGISTERS_PER_SCORE = 2  # a score and its probability before packing
FRAGMENT_REGISTERS = 16  # fragments of K and V on their way into a matrix instruction
FMA_OPERANDS_LIVE = 0.5  # share of an FMA dot's operand rows that live in registers at a time
VECTOR_TILES_LIVE = 1.5  # float32 tiles of keys times dim that the vector kernel holds: K's, and half of V's while it sums
MAX_PROGRAMS_PER_SM = 32
REGISTER_GRANULE = 8


class TileShape(Protocol):
    """What a Tile and a DecodePlan share."""

    @property
    def block_m(self) -> int: ...
    @property
    def block_n(self) -> int: ...
    @property
    def swapped(self) -> bool: ...
    @property
    def num_warps(self) -> int: ...
    @property
    def num_stages(self) -> int: ...


def padded(dim: int) -> int:
    """A head dim as the kernel holds it: the next power of two, at least 16."""
    return max(MIN_PADDED_DIM, 1 << (dim - 1).bit_length())


def mma_of(problem: Problem, tile: TileShape, device: Device) -> Mma | None:
    """The matrix instruction of a tile's products; None where they run on the vector units (block_m 1) or as FMA."""
    if tile.block_m == 1 or not device.is_gpu:
        return None
    sides = (tile.block_n, tile.block_m) if tile.swapped else (tile.block_m, tile.block_n)
    return _mma(device.architecture, problem.dtype_k == "float32", problem.allow_tf32, *sides, tile.num_warps)


def mma_name(problem: Problem, tile: TileShape, device: Device) -> str:
    """The instruction as people write it ("wgmma m64n64k16"); the widest N side that a tile's scores give it."""
    if not device.is_gpu:
        return "torch's CPU kernels"
    if tile.block_m == 1:
        return "the vector units"
    mma = mma_of(problem, tile, device)
    if mma is None:
        return "FMA on the vector units"
    n = (tile.block_m if tile.swapped else tile.block_n) if mma.warps > 1 else mma.n
    return f"{mma.name} m{mma.m}n{n}k{mma.k}"


@lru_cache(maxsize=4096)
def _mma(arch: Architecture, float32: bool, allow_tf32: bool, m: int, n: int, num_warps: int) -> Mma | None:
    if float32 and not (allow_tf32 or arch.ieee_float32_mma):
        return None
    for mma in arch.mmas:
        if m >= mma.m and n >= mma.n and num_warps % mma.warps == 0:
            return mma._replace(k=mma.k // 2, rate=mma.rate / 2 if allow_tf32 else mma.rate / 8) if float32 else mma
    return None


def shared_memory_bytes(problem: Problem, tile: TileShape, device: Device) -> int:
    """Bytes of shared memory that one program takes.

    buffers * (K tile + V tile): buffers is num_stages where copies are asynchronous, num_stages - 1 (at least 1) where
    loads pass through registers, for one tile is then on its way in those. Beside the ring lie q (for a matrix
    instruction that reads it from shared memory, and for FMA), the probabilities where they change layout between the
    products (swapped tiles and FMA), and a scratch for reductions. The vector kernel holds K and V in registers.
    """
    k_bytes, v_bytes = DTYPE_BYTES[problem.dtype_k], DTYPE_BYTES[problem.dtype_v]
    dim, dim_v = padded(problem.head_dim), padded(problem.head_dim_v)
    arch = device.architecture
    if arch.async_copies:
        buffers = tile.num_stages
    else:
        buffers = 0 if tile.block_m == 1 else max(1, tile.num_stages - 1)
    ring = buffers * tile.block_n * (dim * k_bytes + dim_v * v_bytes)
    if tile.block_m == 1:
        return ring + SHARED_SCRATCH + tile.num_warps * dim_v * 4
    mma = mma_of(problem, tile, device)
    in_shared = mma is None or mma.m >= 64 or tile.swapped
    q_bytes = tile.block_m * dim * k_bytes if in_shared else 0
    p_bytes = tile.block_m * tile.block_n * v_bytes if mma is None or tile.swapped else 0
    return ring + q_bytes + p_bytes + SHARED_SCRATCH


def registers_per_thread(problem: Problem, tile: TileShape, device: Device) -> int:
    """32-bit registers that one thread would like to have; more than the device gives means spills.

    Matrix tiles: accumulator block_m x dim_v and scores block_m x block_n, spread over all threads (but a matrix
    instruction's rows cannot be halved: each group of its warps holds at least one instruction's worth), plus q where
    the instruction takes it from registers, plus fragments. Vector units: K and V tiles as float32, and the
    accumulator in each warp. FMA: each thread holds rows of q and columns of k over the whole head dim.
    """
    threads = tile.num_warps * device.warp_size
    dim, dim_v = padded(problem.head_dim), padded(problem.head_dim_v)
    if tile.block_m == 1:
        tiles = VECTOR_TILES_LIVE * tile.block_n * max(dim, dim_v) / threads
        return int(REGISTERS_BASE + tiles + dim_v / device.warp_size + dim / device.warp_size)
    accumulator = tile.block_m * dim_v / threads
    scores = REGISTERS_PER_SCORE * tile.block_m * tile.block_n / threads
    mma = mma_of(problem, tile, device)
    if mma is None:
        rows, columns = _fma_share(tile.block_m, tile.block_n, threads)
        operands = FMA_OPERANDS_LIVE * (rows + columns) * max(dim, tile.block_n)
        return int(REGISTERS_BASE + accumulator + scores + operands)
    q = 0.0
    if mma.m < 64 and not tile.swapped:
        threads_of_a_row_set = min(threads, max(1, tile.block_m // mma.m) * device.warp_size)
        q = tile.block_m * dim * DTYPE_BYTES[problem.dtype_q] / 4 / threads_of_a_row_set
    return int(REGISTERS_BASE + accumulator + scores + q + FRAGMENT_REGISTERS)


def _fma_share(block_m: int, block_n: int, threads: int) -> tuple[int, int]:
    """Rows and columns of the scores that one thread of an FMA dot computes: as square as they get."""
    outputs = max(1, block_m * block_n // threads)
    rows = 1 << (outputs.bit_length() - 1) // 2
    return rows, outputs // rows


def registers_limit(tile: TileShape, device: Device) -> int:
    """Registers that the device can give each thread of a program."""
    return min(device.architecture.max_regs_per_thread, device.regs_per_sm // (tile.num_warps * device.warp_size))


class Footprint(NamedTuple):
    """What one program takes of an SM, and how many programs an SM holds at a time."""

    shared_memory: int
    registers: int
    resident: int
    mma: Mma | None


def footprint_of(problem: Problem, tile: TileShape, device: Device) -> Footprint:
    """The estimates of one tile together; a CPU holds one block of work a thread."""
    if not device.is_gpu:
        return Footprint(0, 0, 1, None)
    shared = shared_memory_bytes(problem, tile, device)
    registers = registers_per_thread(problem, tile, device)
    return Footprint(shared, registers, programs_that_fit(shared, registers, tile.num_warps, device), mma_of(problem, tile, device))


def programs_that_fit(shared_memory: int, registers: int, num_warps: int, device: Device) -> int:
    """Programs that an SM holds: the least of what shared memory, registers and warps allow, at least 1."""
    granules = -(-registers // REGISTER_GRANULE) * REGISTER_GRANULE
    by_shared = device.smem_per_sm // max(1, shared_memory)
    by_registers = device.regs_per_sm // max(1, granules * num_warps * device.warp_size)
    by_warps = device.max_warps_per_sm // num_warps
    return max(1, min(by_shared, by_registers, by_warps, MAX_PROGRAMS_PER_SM))
