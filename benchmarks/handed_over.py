"""A number handed from one warp to four by a barrier, as our kernels do it, alone: the control of what racecheck makes of that.

Nothing else is in it, and its result is checked. So what racecheck reports here is not a race, and neither are such reports elsewhere.
Its name passes the filter for ours.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from flashtile.kernels.gluon.forward_memory import allocate_barriers
from flashtile.kernels.gluon.names import barrier

STEPS = 100
_STAGES = gl.constexpr(2)


@gluon.jit
def forward_handed_over_kernel(out, steps):
    """Adds up 0, 1, ... steps - 1, which a warp of its own writes to shared memory, one after another."""
    numbers = gl.allocate_shared_memory(gl.int32, [_STAGES, 1], mbarrier.MBarrierLayout())
    full = allocate_barriers(_STAGES, 1)
    empty = allocate_barriers(_STAGES, 1)
    fence_async_shared()
    gl.warp_specialize([(_add_up, (out, steps, numbers, full, empty)), (_hand_over, (steps, numbers, full, empty))], [1], [24])


@gluon.jit
def _hand_over(steps, numbers, full, empty):
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for step in range(steps):
        stage = step % _STAGES
        mbarrier.wait(empty.index(stage), ((step // _STAGES) & 1) ^ 1)
        numbers.index(stage).store(gl.full([1], step, gl.int32, LANES))
        barrier()
        mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def _add_up(out, steps, numbers, full, empty):
    found = steps * 0
    for step in range(steps):
        stage = step % _STAGES
        mbarrier.wait(full.index(stage), (step // _STAGES) & 1)
        found += gl.max(numbers.index(stage).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
        barrier()
        mbarrier.arrive(empty.index(stage), count=1)
    gl.store(out, found)


def hand_numbers_over() -> None:
    """One launch; raises RuntimeError where a number was lost."""
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    forward_handed_over_kernel[(1,)](out, STEPS, num_warps=4)
    if out.item() != STEPS * (STEPS - 1) // 2:
        raise RuntimeError(f"{STEPS} numbers add up to {out.item()}, not {STEPS * (STEPS - 1) // 2}")
