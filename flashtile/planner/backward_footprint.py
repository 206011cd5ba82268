"""What one program of a pass of a backward kernel takes of an SM: matrix instruction, shared memory, registers, resident programs.

Those of Triton's kernel stand here, with what both kernels share; ``backward_footprint_gluon.py`` knows Hopper's Gluon kernel.

These are estimates of what the compiler allocates, meant to err on the high side: a plan that they allow must neither
spill nor exceed the device. The constants are named here and calibrated against compiled kernels.
"""

from __future__ import annotations

from flashtile.planner.backward_footprint_gluon import CONSUMER_REGISTERS, gluon_pass_registers, gluon_pass_shared_memory
from flashtile.planner.backward_shapes import DROPPED, FMA, SHAPES, UNALIGNED, WIDE, WIDE_FMA, shapes_of
from flashtile.planner.backward_tiles import PassTile
from flashtile.planner.catalog import GLUON_BACKWARD_SM90
from flashtile.planner.device import Device
from flashtile.planner.figures import Mma
from flashtile.planner.forward_footprint import held_dim
from flashtile.planner.resources import (
    ITS_WARPS,
    TALL_TILE,
    Footprint,
    features_of,
    fma_operands,
    instruction_in_words,
    instruction_of,
    programs_that_fit,
    registers_limit,
)
from flashtile.problem import DTYPE_BYTES, Problem

SHARED_SCRATCH = 2048  # lse and delta of queries that are walked, barriers
WIDE_SCORES = 4  # four-byte scores, their gradients, and both in another order
# Of shapes that nobody has compiled:
FEATURE_REGISTERS = 15  # each of softcap, ALiBi and packed rows
REGISTERS_BASE = 75  # addresses, loop counters, row statistics, fragments on their way into an instruction
REGISTERS_PER_SCORE = 2.0  # of a score and its gradient
REGISTERS_PER_COPY = 2  # the address of one copy of a walked tile
FRAGMENTS_SHARE = 0.5  # of the owned rows' fragments, which instructions take from registers
WIDE_REGISTERS = 40  # four-byte operands
FMA_BASE = 50
FMA_OPERANDS_LIVE = 0.2  # share of all FMA dots' operand elements that live in registers at a time
MIN_COPY_BYTES = 4  # the least that one brings
COPY_BYTES = 16
FMA_BYTES = 4  # of an FMA dot's operand, whatever it was in memory


def pass_mma(problem: Problem, tile: PassTile, device: Device) -> Mma | None:
    """The matrix instruction of a pass's products; None where they run as FMA."""
    return instruction_of(problem, tile.owned, tile.step, tile.num_warps, device)


def pass_mma_name(problem: Problem, tile: PassTile, device: Device) -> str:
    """``instruction_in_words`` of a pass's products."""
    return instruction_in_words(pass_mma(problem, tile, device), tile.step, device)


def pass_shared_memory(problem: Problem, tile: PassTile, device: Device) -> int:
    """Bytes of shared memory that one program takes.

    Of Triton's kernel: both operands of what it owns beside a ring of what it walks, num_stages of them where the matrix instruction
    itself reads shared memory, else one less (at least 1). Probabilities and gradients of scores pass through it where warps share
    rows; tcgen05 wants operands in the other order too. AMD holds what a program owns in registers; FMA wants operands four bytes wide.
    """
    if tile.kernel == GLUON_BACKWARD_SM90:
        return gluon_pass_shared_memory(problem, tile)
    mma, size = pass_mma(problem, tile, device), DTYPE_BYTES[problem.dtype_k]
    dim, dim_v = held_dim(problem.head_dim), held_dim(problem.head_dim_v)
    dims, widest = dim + dim_v, max(dim, dim_v)
    scores = tile.owned * tile.step
    if device.backend == "hip":
        ring = (tile.num_stages - 1) * tile.step * dims * size
        return max(tile.owned * widest * size, ring + tile.step * widest * size + scores * size)
    if mma is None:
        owned = tile.owned * dims * FMA_BYTES
        if not device.architecture.async_copies:
            return owned + max(tile.step * widest * size, scores * FMA_BYTES) + (3 * SHARED_SCRATCH if size == FMA_BYTES else 0)
        return owned + max(1, tile.num_stages - 1) * tile.step * dims * FMA_BYTES + scores * FMA_BYTES + SHARED_SCRATCH
    buffers = tile.num_stages if mma.warps > 1 else max(1, tile.num_stages - 1)
    need = (tile.owned + buffers * tile.step) * dims * size + SHARED_SCRATCH
    if mma.name.startswith("tcgen05"):
        return need + tile.owned * dims * size
    if size == FMA_BYTES:
        return need + max(WIDE_SCORES * scores * size, tile.step * widest * size // 2)
    return need + (scores * size if mma.warps == 1 and tile.owned < max(widest, mma.m * tile.num_warps) else 0)


def pass_registers(problem: Problem, tile: PassTile, device: Device) -> int:
    """32-bit registers that one thread would like to have; more than ``pass_registers_limit`` means spills.

    Of Triton's kernel: what the shape took when it was compiled; of other shapes an estimate: a base, the accumulators, scores and
    their gradients, spread over the threads, then operands where instructions take them from registers.
    """
    if tile.kernel == GLUON_BACKWARD_SM90:
        return gluon_pass_registers(problem, tile)
    mma, family = pass_mma(problem, tile, device), family_of(problem, device)
    known = [
        shape
        for shape in shapes_of(family, tile.owner, max(problem.head_dim, problem.head_dim_v))
        if (shape.owned, shape.step, shape.num_warps) == (tile.owned, tile.step, tile.num_warps) and shape.num_stages >= tile.num_stages
    ]
    if known:
        shape = min(known, key=lambda shape: shape.num_stages)
        small_copies = problem.alignment < COPY_BYTES and family != UNALIGNED
        return shape.shaped if _has_features(problem) or small_copies else shape.registers
    return _estimated_registers(problem, tile, mma, device)


def _has_features(problem: Problem) -> bool:
    """Whether kernels carry more than full and causal masks over whole sequences."""
    return problem.dropout or _has_features_but_dropout(problem)


def _has_features_but_dropout(problem: Problem) -> bool:
    return problem.softcap or problem.alibi or problem.ragged_q or problem.band.left is not None


def family_of(problem: Problem, device: Device) -> str:
    """Which of ``SHAPES`` are for the problem's products and copies; features beside copies of less than 16 bytes are too much."""
    mma = pass_mma(problem, PassTile("", "keys", TALL_TILE, TALL_TILE, ITS_WARPS, 1), device)
    wide = DTYPE_BYTES[problem.dtype_k] == FMA_BYTES
    if mma is None:
        return WIDE_FMA if wide and device.architecture.async_copies else FMA
    copies = device.architecture.async_copies and not _has_features(problem)
    if problem.alignment < (MIN_COPY_BYTES if copies else COPY_BYTES):
        return UNALIGNED
    family = f"{WIDE} {mma.name}" if wide else mma.name
    beside = f"{DROPPED} {family}"
    return beside if problem.dropout and _has_features_but_dropout(problem) and beside in SHAPES else family


def _estimated_registers(problem: Problem, tile: PassTile, mma: Mma | None, device: Device) -> int:
    threads = tile.num_warps * device.warp_size
    dim, dim_v, size = held_dim(problem.head_dim), held_dim(problem.head_dim_v), DTYPE_BYTES[problem.dtype_k]
    accumulators = tile.owned * (dim + dim_v if tile.owner == "keys" else dim) / threads
    if mma is None:
        scores = fma_operands(tile.owned, tile.step, dim, threads) + fma_operands(tile.owned, tile.step, dim_v, threads)
        sums = fma_operands(tile.owned, dim, tile.step, threads)
        sums += fma_operands(tile.owned, dim_v, tile.step, threads) if tile.owner == "keys" else 0
        return int(FMA_BASE + FEATURE_REGISTERS * features_of(problem) + accumulators + FMA_OPERANDS_LIVE * (scores + sums))
    features = FEATURE_REGISTERS * features_of(problem)
    copies = tile.step * (dim + dim_v) * size / COPY_BYTES / threads
    need = REGISTERS_BASE + features + accumulators + REGISTERS_PER_SCORE * tile.owned * tile.step / threads + REGISTERS_PER_COPY * copies
    need += FRAGMENTS_SHARE * tile.owned * (dim + dim_v) * size / 4 / threads if mma.warps == 1 else 0.0
    return int(need + (WIDE_REGISTERS if size == FMA_BYTES else 0))


def pass_registers_limit(tile: PassTile, device: Device) -> int:
    """Registers that the device can give each thread that computes."""
    return CONSUMER_REGISTERS if tile.kernel == GLUON_BACKWARD_SM90 else registers_limit(tile.num_warps, device)


def pass_footprint(problem: Problem, tile: PassTile, device: Device) -> Footprint:
    """The estimates of one tile together; a CPU holds one block of work a thread."""
    if not device.is_gpu:
        return Footprint(0, 0, 1, None)
    shared, registers = pass_shared_memory(problem, tile, device), pass_registers(problem, tile, device)
    mma = pass_mma(problem, tile, device)
    if tile.kernel == GLUON_BACKWARD_SM90:  # its warps are given all registers of an SM
        return Footprint(shared, registers, 1, mma)
    return Footprint(shared, registers, programs_that_fit(shared, registers, tile.num_warps, device), mma)
