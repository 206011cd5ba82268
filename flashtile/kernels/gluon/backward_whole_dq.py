"""A consumer's half of dQ where the backward runs in one pass and two warpgroups share dQ: the product, and where it is added.

Of dQ, as of dS, dims or keys are the rows: dQ^T = K^T dS^T, [64 dims, queries]. A half is one of the dims, or of the queries where a
head has 64 dims.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from flashtile.kernels.gluon.backward_sums import SUMS_BLOCK, SUMS_SIDE, sums_of_head
from flashtile.kernels.gluon.forward_memory import PANEL
from flashtile.kernels.gluon.forward_scores import products_layout


@gluon.jit
def start_own_dq(k_tiles, ds_ring, slot, stage, C: gl.constexpr, BLOCK_M: gl.constexpr, D: gl.constexpr):
    """Consumer C's half of dQ^T [64 dims, 64 queries] of a block, on its way: a panel of dims, or half of the queries."""
    gl.static_assert(D * BLOCK_M == 2 * SUMS_BLOCK)
    dq = gl.zeros([PANEL, SUMS_SIDE], gl.float32, products_layout(SUMS_SIDE))
    for c in gl.static_range(2):
        keys = k_tiles[1].index(2 * slot + c)
        ds = ds_ring.index(2 * stage + c)
        if D > PANEL:
            keys = keys.slice(C * PANEL, PANEL, dim=1)
        else:
            ds = ds.slice(C * SUMS_SIDE, SUMS_SIDE, dim=1)
        dq = warpgroup_mma(keys.permute((1, 0)), ds, dq, use_acc=c > 0, is_async=True)
    return dq


@gluon.jit
def own_sums_of_head(sums, tokens, b, h, num_heads_kv, C: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr):
    """Where this consumer's blocks of the group's first query head begin: every second one, or all if there is one."""
    return sums_of_head(sums, tokens, b, h * GROUP, num_heads_kv * GROUP, D // PANEL) + C * SUMS_BLOCK


@gluon.jit
def next_block(block, begin, low, high, own_sums, sums, GROUP: gl.constexpr, D: gl.constexpr):
    """The next block of queries, and where its head's sums begin: behind the last block the first, behind all the next head's."""
    block += 1
    if block == high:
        block = low
    if GROUP > 1:
        if block == begin:
            own_sums += sums.blocks.to(gl.int64) * (D * SUMS_SIDE)
    return block, own_sums


@gluon.jit
def turned_back(stage, phase, STAGES: gl.constexpr):
    """The stage of a ring before this one, and the parity of its barriers there."""
    if STAGES == 2:
        return stage ^ 1, phase ^ stage ^ 1
    else:
        first = stage == 0
        return gl.where(first, STAGES - 1, stage - 1), gl.where(first, phase ^ 1, phase)


@gluon.jit
def unhoisted(slot, block):
    """``slot``, which no compiler knows to be the same in the next turn of a loop: what is computed from it takes no registers there."""
    return slot + (block >> 30)


@gluon.jit
def meet():
    """Waits for the other consumer: a barrier of 256 threads, by a number that the compiler does not use."""
    lane = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    gl.inline_asm_elementwise("bar.sync 8, 256; mov.u32 $0, $1;", "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1)
