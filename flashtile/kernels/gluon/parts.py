"""Units that several programs of the line share: each leaves its part in memory, and the last one may merge them.

A part's flag says that it is there. Flags lie in scratch memory that nobody has cleared, so the sign is a number that
memory does not hold by chance; who has seen it takes it away, and the memory's next user finds none. A program waits
at its end, and only for programs before it, which the hardware starts first: so all of them end.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.kernels.gluon.names import barrier
from flashtile.kernels.gluon.results import row_numbers, store_partial
from flashtile.kernels.tile.schedule import holder, share, slot_of
from flashtile.kernels.tile.softmax import LOG2E, finite

_THERE = gl.constexpr(0x5D1C_83F6_A94E_27B7)
_ELEMENTS_A_THREAD = gl.constexpr(64)  # of partial results that are read at a time


@gluon.constexpr_function
def parts_layout(dim, num_warps):
    """Of partial results [parts, rows, dim]: all parts of a row in the same threads."""
    across = min(32, dim // 4)
    return gl.BlockedLayout([1, 1, 4], [1, 32 // across, across], [1, num_warps, 1], [2, 1, 0])


@gluon.constexpr_function
def parts_at_once(rows, dim, num_warps):
    return max(1, _ELEMENTS_A_THREAD.value * 32 * num_warps // (rows * dim))


@gluon.jit
def flags_of(partials, num_programs, BLOCK_M: gl.constexpr):
    """One flag for each slot, behind the partial results."""
    start = partials.ptr + partials.lse_start + 2 * num_programs.to(gl.int64) * BLOCK_M
    return start.to(gl.pointer_type(gl.int64), bitcast=True)


@gluon.jit
def leave_part(m, l, acc, partials, slot, num_programs, real, BLOCK_M: gl.constexpr, HEAD_DIM_V: gl.constexpr, MERGES: gl.constexpr):
    """Stores a part, normalised, with its lse; raises its flag where a program waits for it."""
    store_partial(m, l, acc, partials, slot.to(gl.int64) * BLOCK_M + row_numbers(acc), real, HEAD_DIM_V)
    if MERGES:
        barrier()
        gl.atomic_xchg(flags_of(partials, num_programs, BLOCK_M) + slot, _THERE, sem="release", scope="gpu")


@gluon.jit
def merged_parts(
    partials, total, program, num_programs, start, num_rows,
    BLOCK_M: gl.constexpr, HEAD_DIM_V: gl.constexpr, DV: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """(m, l, acc), base 2, of a unit that begins at ``start`` on the line and ends with ``program``'s part."""
    PARTS: gl.constexpr = parts_at_once(BLOCK_M, DV, NUM_WARPS)
    L: gl.constexpr = parts_layout(DV, NUM_WARPS)
    flags = flags_of(partials, num_programs, BLOCK_M)
    begun_by = holder(total, start, num_programs)
    its_start, _ = share(total, begun_by, num_programs)
    first_slot = slot_of(begun_by, its_start, start)
    num_parts = program - begun_by + 1
    part = gl.arange(0, PARTS, gl.SliceLayout(1, gl.SliceLayout(2, L)))
    row = gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(2, L))), 0)
    d = gl.arange(0, DV, gl.SliceLayout(0, gl.SliceLayout(1, L)))
    column = gl.expand_dims(gl.expand_dims(d, 0), 1)
    m = gl.full([BLOCK_M], float("-inf"), gl.float32, gl.SliceLayout(0, gl.SliceLayout(2, L)))
    l = gl.full([BLOCK_M], 0.0, gl.float32, gl.SliceLayout(0, gl.SliceLayout(2, L)))
    acc = gl.full([BLOCK_M, DV], 0.0, gl.float32, gl.SliceLayout(0, L))
    for done in range(0, num_parts, PARTS):
        _wait_for(flags, first_slot, begun_by, done, num_parts, PARTS, NUM_WARPS)
        slot = gl.where(done + part == 0, first_slot, 2 * (begun_by + done + part))
        known = done + part < num_parts
        at = gl.expand_dims(slot.to(gl.int64) * BLOCK_M, 1) + row
        real = gl.expand_dims(known, 1) & (row < num_rows)
        weight = gl.load(partials.ptr + partials.lse_start + at, mask=real, other=float("-inf")) * LOG2E
        values = gl.load(
            partials.ptr + gl.expand_dims(at * HEAD_DIM_V, 2) + column, mask=gl.expand_dims(real, 2) & (column < HEAD_DIM_V), other=0.0
        )
        m_new = gl.maximum(m, gl.max(weight, 0))
        shift = finite(m_new)
        p = gl.exp2(weight - gl.expand_dims(shift, 0))
        alpha = gl.exp2(m - shift)
        l = l * alpha + gl.sum(p, 0)
        alpha_rows = gl.convert_layout(alpha, gl.SliceLayout(1, gl.SliceLayout(0, L)))
        acc = acc * gl.expand_dims(alpha_rows, 1) + gl.sum(values * gl.expand_dims(p, 2), 0)
        m = m_new
    return m, l, acc


@gluon.jit
def _wait_for(flags, first_slot, begun_by, done, num_parts, PARTS: gl.constexpr, NUM_WARPS: gl.constexpr):
    """Returns when PARTS parts from number ``done`` on are there; takes their flags away."""
    # a layout in which every warp has all of it
    part = done + gl.arange(0, PARTS, gl.BlockedLayout([1], [32], [NUM_WARPS], [0]))
    slot = gl.where(part == 0, first_slot, 2 * (begun_by + part))
    known = part < num_parts
    missing = num_parts
    while missing > 0:
        flag = gl.load(flags + slot, mask=known, other=_THERE, volatile=True)
        missing = gl.sum((flag != _THERE).to(gl.int32), 0)
    # what the flags' writers wrote before them is seen from here on
    gl.inline_asm_elementwise("fence.acq_rel.gpu; mov.u32 $0, $1;", "=r,r", [part], dtype=gl.int32, is_pure=False, pack=1)
    barrier()
    gl.store(flags + slot, (slot * 0).to(gl.int64), mask=known)
