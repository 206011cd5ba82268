"""What one program of a pass of a backward kernel takes of an SM: matrix instruction, shared memory, registers, resident programs.

These are estimates of what the compiler allocates, meant to err on the high side: a plan that they allow must neither
spill nor exceed the device. The constants are named here and calibrated against compiled kernels.
"""

from __future__ import annotations

from flashtile.planner.backward_tiles import PassTile
from flashtile.planner.device import Device
from flashtile.planner.figures import Mma
from flashtile.planner.forward_footprint import held_dim
from flashtile.planner.resources import Footprint, instruction_for, instruction_in_words, programs_that_fit
from flashtile.problem import DTYPE_BYTES, Problem

SHARED_SCRATCH = 1024  # barriers, layouts that change
REGISTERS_BASE = {"cuda": 75, "hip": 60}  # addresses, loop counters, row statistics, fragments on their way into an instruction
REGISTERS_PER_SCORE = 3.0  # a score, its gradient, and both packed
REGISTERS_PER_FEATURE = {"cuda": 8, "hip": 14}  # each of softcap, ALiBi and packed rows
FRAGMENTS_SHARE = 0.5  # of the owned rows' fragments, which instructions take from registers
FMA_REGISTERS = 60  # an FMA dot's operands
LOADED_REGISTERS = 4.0  # an element of a walked tile that no asynchronous copy can bring
MIN_COPY_BYTES = 4  # the least that one brings
COPY_BYTES = 16
FMA_BYTES = 4  # of an FMA dot's operand, whatever it was in memory


def pass_mma(problem: Problem, tile: PassTile, device: Device) -> Mma | None:
    """The matrix instruction of a pass's products; None where they run as FMA."""
    if not device.is_gpu:
        return None
    float32 = problem.dtype_k == "float32"
    return instruction_for(device.architecture, float32, problem.allow_tf32, tile.owned, tile.step, tile.num_warps)


def pass_mma_name(problem: Problem, tile: PassTile, device: Device) -> str:
    """``instruction_in_words`` of a pass's products."""
    return instruction_in_words(pass_mma(problem, tile, device), tile.step, device)


def pass_shared_memory(problem: Problem, tile: PassTile, device: Device) -> int:
    """Bytes of shared memory that one program takes: the owned rows' two operands, a ring of the walked ones, and scores on their
    way from one product to the next."""
    mma = pass_mma(problem, tile, device)
    size = DTYPE_BYTES[problem.dtype_k] if mma is not None else FMA_BYTES
    dims = held_dim(problem.head_dim) + held_dim(problem.head_dim_v)
    buffers = tile.num_stages if mma is not None and mma.warps > 1 else max(1, tile.num_stages - 1)
    scores = 2 if tile.owner == "keys" else 1
    return size * (tile.owned * dims + buffers * tile.step * dims + scores * tile.owned * tile.step) + SHARED_SCRATCH


def pass_registers(problem: Problem, tile: PassTile, device: Device) -> int:
    """32-bit registers that one thread would like to have; more than ``registers_limit`` means spills.

    A base and the features, the accumulators, the scores and their gradients, spread over the threads; then operands where
    instructions take them from registers.
    """
    threads = tile.num_warps * device.warp_size
    dim, dim_v = held_dim(problem.head_dim), held_dim(problem.head_dim_v)
    need: float = REGISTERS_BASE[device.backend] + REGISTERS_PER_FEATURE[device.backend] * _features(problem)
    need += tile.owned * (dim + dim_v if tile.owner == "keys" else dim) / threads
    need += REGISTERS_PER_SCORE * tile.owned * tile.step / threads
    if problem.alignment < (MIN_COPY_BYTES if device.architecture.async_copies else COPY_BYTES):
        need += LOADED_REGISTERS * tile.step * (dim + dim_v) / threads
    mma = pass_mma(problem, tile, device)
    if mma is None:
        need += FMA_REGISTERS
    elif mma.warps == 1:
        need += FRAGMENTS_SHARE * tile.owned * (dim + dim_v) * DTYPE_BYTES[problem.dtype_k] / 4 / threads
    return int(need)


def _features(problem: Problem) -> int:
    """How many features a kernel carries that take registers of their own."""
    return problem.softcap + problem.alibi + problem.ragged_q


def pass_footprint(problem: Problem, tile: PassTile, device: Device) -> Footprint:
    """The estimates of one tile together; a CPU holds one block of work a thread."""
    if not device.is_gpu:
        return Footprint(0, 0, 1, None)
    shared, registers = pass_shared_memory(problem, tile, device), pass_registers(problem, tile, device)
    return Footprint(shared, registers, programs_that_fit(shared, registers, tile.num_warps, device), pass_mma(problem, tile, device))
