"""What one program of a decode kernel takes of an SM: matrix instruction, shared memory, registers, resident programs.

Those of Triton's kernel stand here; ``footprint_gluon.py`` knows Hopper's Gluon kernel, ``resources.py`` has what all operations share.

These are estimates of what the compiler allocates, meant to err on the high side: a plan that they allow must neither
spill nor exceed the device. The constants are named here and calibrated against compiled kernels.
"""

from __future__ import annotations

from flashtile.planner.catalog import GLUON_SM90
from flashtile.planner.device import Device
from flashtile.planner.figures import Mma
from flashtile.planner.footprint_gluon import asks_by_page, gluon_mma, gluon_registers, gluon_shared_memory, registers_asked_for
from flashtile.planner.resources import Footprint, features_of, fma_operands, instruction_for, instruction_in_words, programs_that_fit
from flashtile.planner.tiles import TileShape
from flashtile.problem import DTYPE_BYTES, Problem

MIN_PADDED_DIM = 16
SHARED_SCRATCH = 1024  # bytes: reductions over warps, barriers
TENSOR_MEMORY_SCRATCH = 512  # bytes beside it: barriers of tcgen05 and the address of its memory
REGISTERS_BASE = 40  # addresses, loop counters, row statistics
REGISTERS_PER_SCORE = 2  # a score and its probability before packing
REGISTERS_PER_FEATURE = {"cuda": 7, "hip": 20}  # each of softcap, ALiBi, paging and packed queries
REGISTERS_PER_COPY = 2  # the address of one 16-byte copy of a key tile, kept over the loop
FRAGMENT_REGISTERS = 24  # fragments of K and V on their way into a matrix instruction
TENSOR_MEMORY_REGISTERS = 80  # tcgen05: what passes between tensor memory and registers, a whole result at a time
WGMMA_ACCUMULATOR_SHARE = 0.2  # copies of the accumulator while it is scaled
WGMMA_LONG_HEAD_REGISTERS = 28  # descriptors of tiles that span several swizzled columns
MAX_Q_REGISTERS = 64  # beyond, q's fragments are read again from shared memory
IDLE_WARPS_SHARE = 0.75  # what a warp beyond one for 16 rows still holds of the accumulator that it repeats
FMA_OPERANDS_LIVE = 0.25  # share of both FMA dots' operand elements that live in registers at a time
FMA_SWAPPED_FACTOR = {"cuda": 1.45, "hip": 3.2}  # more of them when operands are swapped for 16 rows, or for AMD's 4-row mfma
VECTOR_TILES_LIVE = {"cuda": 1.5, "hip": 13.5}  # float32 tiles of keys times dim that the vector kernel holds at a time
VECTOR_WARPS_PER_32_DIMS = 2  # with fewer warps than this for 32 value dims, a thread holds whole columns of keys,
VECTOR_COLUMN_SHARE = 6 / 128  # this many registers a key and value dim
VECTOR_UNLIKE_FACTOR = 6  # more of them where keys and values have unlike head dims, and so unlike layouts
VECTOR_SLACK = 1.3  # the vector kernel's registers scatter more than the others'
WIDE_REGISTERS = 25  # four-byte inputs of a matrix instruction
WIDE_WGMMA_REGISTERS = 100  # wgmma takes four-byte values in one order only: they are turned around on the way
GATHERED_REGISTERS = 60  # places of gathered keys, kept over the loop,
GATHERED_FEW_REGISTERS = 20  # fewer of them beside 16-bit fragments,
GATHERED_LONG_HEAD_REGISTERS = 24  # but more of them beside head dims beyond 128,
GATHERED_LOADED_REGISTERS = {"cuda": 0, "hip": 100}  # and where no asynchronous copy brings the keys
LOADED_REGISTERS = {"cuda": 1.9, "hip": 3.6}  # an element of a key tile that no asynchronous copy can bring
SMALL_COPY_REGISTERS = 0.7  # a copy of less than 16 bytes
FMA_FEATURE_REGISTERS = 5  # what a feature takes beside for 32 keys of an FMA dot, which fills the registers by itself
FMA_LOADED_SHARE = 0.4  # FMA operands pass through registers anyway
VECTOR_WIDE_LONG_HEAD_REGISTERS = 20  # more of WIDE_REGISTERS in the vector kernel, beyond 128 dims
VECTOR_LOADED_REGISTERS = 90  # what such loads cost the vector kernel beside
QUANTISED_LOADED_FACTOR = 1.5  # more of LOADED_REGISTERS for bytes, which become two registers each on their way
HALF_BYTES = 2  # of what quantised keys and values are multiplied as
QUANTISED_REGISTERS = 0.7  # an element of a quantised key tile, on its way to float16,
QUANTISED_SHARED_REGISTERS = 0.4  # and by way of shared memory,
QUANTISED_SWAPPED_REGISTERS = 2.0  # or as the first operand of swapped products, which is held whole
MIN_COPY_BYTES = 4  # the least that an asynchronous copy brings
COPY_BYTES = 16


def padded(dim: int) -> int:
    """A head dim as the kernel holds it: the next power of two, at least 16."""
    return max(MIN_PADDED_DIM, 1 << (dim - 1).bit_length())


def mma_of(problem: Problem, tile: TileShape, device: Device) -> Mma | None:
    """The matrix instruction of a tile's products; None where they run on the vector units (block_m 1) or as FMA."""
    if tile.block_m == 1 or not device.is_gpu:
        return None
    if tile.kernel == GLUON_SM90:
        return gluon_mma(tile, device.architecture)
    sides = (tile.block_n, tile.block_m) if tile.swapped else (tile.block_m, tile.block_n)
    return instruction_for(device.architecture, problem.dtype_k == "float32", problem.allow_tf32, *sides, tile.num_warps)


def mma_name(problem: Problem, tile: TileShape, device: Device) -> str:
    """``instruction_in_words`` of a tile's products."""
    if device.is_gpu and tile.block_m == 1:
        return "the vector units"
    return instruction_in_words(mma_of(problem, tile, device), tile.block_m if tile.swapped else tile.block_n, device)


def shared_memory_bytes(problem: Problem, tile: TileShape, device: Device) -> int:
    """Bytes of shared memory that one program takes.

    Of Triton's kernel: buffers * (K tile + V tile). There are num_stages buffers where the matrix instruction itself reads
    shared memory, for a tile must stay until the instruction is done, and num_stages - 1 (at least 1) where fragments go
    through registers; the vector kernel has none unless copies are asynchronous, and twice as many for gathered keys. Beside
    the ring lie the page ids of gathered keys, q and the probabilities on their way between layouts (float32 results too,
    for FMA), and a scratch for reductions. FMA masks the padding of a head dim in a second copy of a tile, and with few keys
    and operands swapped the second product alone may read shared memory, so that V takes one more. At the end the float32
    accumulator may change its layout in the same memory.
    """
    if tile.kernel == GLUON_SM90:
        return gluon_shared_memory(problem, tile)
    k_bytes, v_bytes = DTYPE_BYTES[problem.dtype_k], DTYPE_BYTES[problem.dtype_v]
    dim, dim_v = padded(problem.head_dim), padded(problem.head_dim_v)
    tile_bytes = tile.block_n * (dim * k_bytes + dim_v * v_bytes)
    gathered = gathers(problem, tile)
    ids_bytes = 8 * tile.num_stages * tile.block_n if gathered else 0
    buffers = max(1, tile.num_stages - 1)
    if tile.block_m == 1:
        ring = buffers * (2 if gathered else 1) * tile_bytes if device.architecture.async_copies else 0
        return ring + ids_bytes + tile.num_warps * dim_v * 4 + SHARED_SCRATCH
    mma = mma_of(problem, tile, device)
    reads_shared = mma is not None and mma.warps > 1
    if reads_shared or (gathered and device.backend == "hip"):
        buffers = tile.num_stages
    converted = 0
    if problem.quantised:
        # float16 from here on: q, the probabilities, and what an instruction reads of K or of V from shared memory
        k_bytes = v_bytes = HALF_BYTES
        converted = tile.block_n * max(dim, dim_v) * HALF_BYTES if reads_shared or mma is None else 0
    q_bytes = tile.block_m * dim * k_bytes
    own_rows = tile.num_warps * 16 <= tile.block_m
    in_registers = reads_shared and own_rows and not tile.swapped and not gathered and v_bytes < 4
    p_bytes = 0 if in_registers else tile.block_m * tile.block_n * v_bytes
    result_bytes = tile.block_m * dim_v * 4 if mma is None else 0
    scratch = SHARED_SCRATCH + (TENSOR_MEMORY_SCRATCH if mma is not None and mma.name.startswith("tcgen05") else 0)
    total = buffers * tile_bytes + converted + ids_bytes + q_bytes + p_bytes + result_bytes + scratch
    if mma is None:
        padding = (dim, dim_v) != (problem.head_dim, problem.head_dim_v)
        return max(total, 2 * tile_bytes + q_bytes + scratch) if padding else total
    if tile.swapped and not reads_shared:
        second = instruction_for(device.architecture, v_bytes == 4, problem.allow_tf32, dim_v, tile.block_m, tile.num_warps)
        total += tile.block_n * dim_v * v_bytes if second is not None and second.warps > 1 else 0
    return max(total, tile.block_m * dim_v * 4)


def registers_per_thread(problem: Problem, tile: TileShape, device: Device) -> int:
    """32-bit registers that one thread would like to have; more than the device gives means spills.

    Of Triton's kernel: a base and the features; the addresses of the copies of a key tile; the accumulator block_m x dim_v and the scores
    block_m x block_n, spread over the threads. Then by how the products run: a matrix instruction holds fragments, and
    q or (swapped) the keys where it takes them from registers; an FMA dot holds rows and columns over the whole inner
    dimension; the vector kernel holds float32 tiles of keys.
    """
    if tile.kernel == GLUON_SM90:
        return gluon_registers(problem, tile, features_of(problem))
    threads = tile.num_warps * device.warp_size
    dim, dim_v = padded(problem.head_dim), padded(problem.head_dim_v)
    k_bytes, v_bytes = DTYPE_BYTES[problem.dtype_k], DTYPE_BYTES[problem.dtype_v]
    base = REGISTERS_BASE + REGISTERS_PER_FEATURE[device.backend] * features_of(problem)
    misaligned = _misaligned(problem, tile.block_n * (dim + dim_v) / threads, device)
    gathered = gathers(problem, tile)
    if tile.block_m == 1:
        few_warps = device.backend == "cuda" and tile.num_warps * 32 < VECTOR_WARPS_PER_32_DIMS * dim_v
        columns = VECTOR_COLUMN_SHARE * tile.block_n * dim_v if few_warps else 0.0
        live = VECTOR_TILES_LIVE[device.backend] * (1 if dim == dim_v else VECTOR_UNLIKE_FACTOR)
        tiles = (live * tile.block_n * max(dim, dim_v) + 2 * (dim + dim_v)) / threads
        loads = VECTOR_LOADED_REGISTERS if misaligned else 0
        if k_bytes == 4 and device.architecture.async_copies:
            loads += WIDE_REGISTERS + (VECTOR_WIDE_LONG_HEAD_REGISTERS if max(dim, dim_v) > 128 else 0)
        if gathered:
            places = GATHERED_REGISTERS if device.architecture.async_copies else GATHERED_FEW_REGISTERS
            loads += places
        return int(VECTOR_SLACK * (base + misaligned + columns + tiles) + loads)
    copies = REGISTERS_PER_COPY * tile.block_n * (dim * k_bytes + dim_v * v_bytes) / COPY_BYTES / threads
    scores = REGISTERS_PER_SCORE * tile.block_m * tile.block_n / threads
    accumulator = tile.block_m * dim_v / threads
    mma = mma_of(problem, tile, device)
    if mma is None:
        base += FMA_FEATURE_REGISTERS * features_of(problem) * (tile.block_n // 32)
        first = fma_operands(tile.block_m, tile.block_n, dim, threads)
        second = fma_operands(tile.block_m, dim_v, tile.block_n, threads)
        more = tile.swapped and (tile.block_m >= 16 or device.backend == "hip")
        live = FMA_OPERANDS_LIVE * (FMA_SWAPPED_FACTOR[device.backend] if more else 1.0)
        return int(base + FMA_LOADED_SHARE * misaligned + accumulator + scores + live * (first + second))
    fragments = FRAGMENT_REGISTERS
    if k_bytes == 4:
        fragments += WIDE_WGMMA_REGISTERS if mma.name == "wgmma" else WIDE_REGISTERS
    if gathered:
        few = k_bytes == 2 and mma.warps == 1 and device.backend == "cuda" and not (tile.swapped and tile.block_m >= 16)
        fragments += GATHERED_FEW_REGISTERS if few else GATHERED_REGISTERS
        fragments += GATHERED_LONG_HEAD_REGISTERS if few and max(dim, dim_v) > 128 else 0
        fragments += GATHERED_LOADED_REGISTERS[device.backend] if misaligned else 0
    if mma.warps > 1:
        if mma.name.startswith("tcgen05"):
            fragments += TENSOR_MEMORY_REGISTERS
        else:
            fragments += int(WGMMA_ACCUMULATOR_SHARE * accumulator) + (WGMMA_LONG_HEAD_REGISTERS if max(dim, dim_v) > 128 else 0)
        if not tile.swapped and tile.num_warps * 16 > tile.block_m:
            accumulator = IDLE_WARPS_SHARE * tile.block_m * dim_v / (tile.block_m // 16 * device.warp_size)
        operands = tile.block_n * dim_v * v_bytes / 4 / threads if tile.swapped else 0.0
    elif tile.swapped:
        operands = tile.block_n * (dim * k_bytes + dim_v * v_bytes) / 4 / threads
    else:
        operands = min(MAX_Q_REGISTERS, tile.block_m * dim * k_bytes / 4 / device.warp_size)
    if problem.quantised:
        share = QUANTISED_SHARED_REGISTERS if mma.warps > 1 else QUANTISED_REGISTERS
        share = QUANTISED_SWAPPED_REGISTERS if tile.swapped else share
        fragments += int(share * tile.block_n * max(dim, dim_v) / threads)
    return int(base + misaligned + copies + accumulator + scores + operands + fragments)


def gathers(problem: Problem, tile: TileShape) -> bool:
    """Whether each key of a tile is looked up by itself: a page holds no whole number of tiles."""
    return bool(problem.page_size and problem.page_size % tile.block_n)


def _misaligned(problem: Problem, elements: float, device: Device) -> float:
    """Registers for the elements of a key tile that one thread loads, where 16 bytes at a time are too many."""
    if problem.alignment >= COPY_BYTES:
        return 0.0
    if problem.alignment < MIN_COPY_BYTES or not device.architecture.async_copies:
        return LOADED_REGISTERS[device.backend] * elements * (QUANTISED_LOADED_FACTOR if problem.quantised else 1.0)
    return SMALL_COPY_REGISTERS * elements * DTYPE_BYTES[problem.dtype_k] / problem.alignment


def footprint_of(problem: Problem, tile: TileShape, device: Device) -> Footprint:
    """The estimates of one tile together; a CPU holds one block of work a thread."""
    if not device.is_gpu:
        return Footprint(0, 0, 1, None)
    shared = shared_memory_bytes(problem, tile, device)
    registers = registers_per_thread(problem, tile, device)
    resident = programs_that_fit(shared, registers, tile.num_warps, device)
    asks = tile.kernel == GLUON_SM90 and asks_by_page(problem, tile)
    if asks:
        resident = 2 if registers_asked_for(problem, tile) else 1
    return Footprint(shared, registers, resident, mma_of(problem, tile, device), gathers(problem, tile) and not asks)
