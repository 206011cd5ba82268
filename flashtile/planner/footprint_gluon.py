"""What one program of Hopper's Gluon kernel takes of an SM: matrix instruction, shared memory, registers. Estimates on the high side.

Tiles are padded to powers of two of at least 64 columns. With 8 and 16 rows each warp owns keys of a tile and has an
accumulator of 16 rows, the matrix instruction's; with 64 and 128 rows each warp owns 16 rows.
"""

from __future__ import annotations

from flashtile.planner.catalog import GLUON_SM90
from flashtile.planner.figures import Architecture, Mma
from flashtile.planner.tiles import TileShape
from flashtile.problem import DTYPE_BYTES, Problem

MIN_BOX_DIM = 64  # 128 bytes of 16-bit values: the width that shared memory is swizzled in
INPUT_BYTES = 2  # of what is multiplied
INSTRUCTION_ROWS = 16  # of mma.sync, and of each warp of a wgmma
WARP = 32
LONG_HEAD = 128
DEEP_LONG_RING = 12  # registers for a ring of more than two stages beside a head dim beyond LONG_HEAD
SHARED_SCRATCH = 1024  # barriers and alignment of the ring
SHARED_SCRATCH_LONG_VALUES = 2304  # the same where values are longer than keys
LEAST_PAGE_BOX = 16  # keys
WARPGROUP = 4  # warps, of which a kernel with warps of their own for asking has whole ones
SM_SHARED_BYTES, RESERVED_BYTES = 228 * 1024, 1024  # of an SM, and what each program takes beside its own
HALF_AN_SM_REGISTERS = 128  # a thread, for two programs of two warpgroups: the one that asks gives most of its registers away
MERGE_KEPT_ROWS = 8  # rows of the warps' accumulators that stay in registers while they merge
REGISTERS_PER_GATHERED_ROW = 2  # page and place of a key that a thread copies a part of
ROWS_COPIED_AT_ONCE = 4  # by a warp
# Where warps own keys:
OWN_KEYS_BASE = 32  # addresses, barriers' phases, row statistics
REGISTERS_PER_OWN_KEY = 1.9  # scores, probabilities and fragments, a key that a warp owns
OWN_KEYS_SHARED_TILES = 36  # a batch's tiles shared by programs: the next unit while this one ends
REGISTERS_PER_LONG_KEY = 2.4  # head dims beyond LONG_HEAD: more for each own key beyond KEYS_A_STEP
KEYS_A_STEP = 16  # the second product's inner dimension
PAGED_REGISTERS_PER_KEY = 1.25  # the same where a batch's tiles are shared and lie in pages
OWN_KEYS_ALL_ROWS = 8  # all 16 rows of the instruction, with shared tiles
OWN_KEYS_FEATURE = {False: 2, True: 6}  # each of softcap, ALiBi, paging and packed queries, without and with shared tiles
# Where warps own rows:
OWN_ROWS_BASE = 48
REGISTERS_PER_SCORE = 1.5  # a score and its packed probability
OWN_ROWS_LONG_HEAD_PER_KEY = 3 / 8  # head dims beyond 128: tiles that span several swizzled columns
OWN_ROWS_SHARED_TILES = 16
OWN_ROWS_SHARED_TILES_PER_KEY = 3 / 8
OWN_ROWS_FEATURE_PER_KEY = {False: 3 / 32, True: 7 / 32}  # without and with shared tiles
OWN_ROWS_LONG_HEAD_SHARED_TILES = 16  # more of them beside long heads
PARTS_BASE = 100  # addresses of the parts that a program merges, beside one of them and what is merged so far; not of long heads
PARTS_FEATURE = 5  # and what stays alive meanwhile: for each feature,
PARTS_GATHERED = 8  # and where keys are gathered


def box_dim(dim: int) -> int:
    """A head dim as shared memory holds it: the next power of two, at least 64."""
    return max(MIN_BOX_DIM, 1 << (dim - 1).bit_length())


def owns_keys(tile: TileShape) -> bool:
    """Whether a tile's warps own keys (mma.sync) rather than rows (wgmma)."""
    return tile.block_m <= INSTRUCTION_ROWS


def gluon_mma(tile: TileShape, arch: Architecture) -> Mma | None:
    """mma.sync where warps own keys, else wgmma, whatever Triton would prefer."""
    return next((mma for mma in arch.mmas if (mma.warps == 1) == owns_keys(tile)), None)


def shares_tiles(problem: Problem) -> bool:
    """Whether programs may share the key tiles of a batch (stream-K), which takes registers and shared memory of its own."""
    return problem.batch > 1


def asks_by_page(problem: Problem, tile: TileShape) -> bool:
    """Whether a tile is a few whole pages, which warps of their own ask the copy engine for, each in a box."""
    page = problem.page_size
    pages = LEAST_PAGE_BOX <= page < tile.block_n and tile.block_n % page == 0
    return (
        pages
        and owns_keys(tile)
        and tile.num_warps % WARPGROUP == 0
        and max(box_dim(problem.head_dim), box_dim(problem.head_dim_v)) <= LONG_HEAD
    )


def merges_parts(tile: TileShape, head_dim: int, num_splits: int, num_programs: int) -> bool:
    """Whether programs that share units merge their parts themselves, at the end of each unit's last part, without a combine.

    So they do where only unlike lengths make them share units at all: then most have nothing to merge, and a combine would
    cost its launch. Where every unit is shared, a combine has more programs to merge with. Many rows of long heads fill
    the registers by themselves, and are left to combine too; ``head_dim`` is the longer one of keys and values.
    """
    fits = owns_keys(tile) or head_dim <= LONG_HEAD
    return tile.kernel == GLUON_SM90 and fits and num_programs > 0 and num_splits == 1


def registers_asked_for(problem: Problem, tile: TileShape) -> dict[str, int]:
    """The compiler's limit of registers a thread, where warps of their own ask: two programs share an SM if memory lets them."""
    two_fit = 2 * (gluon_shared_memory(problem, tile) + RESERVED_BYTES) <= SM_SHARED_BYTES
    return {"maxnreg": HALF_AN_SM_REGISTERS} if asks_by_page(problem, tile) and tile.num_warps == WARPGROUP and two_fit else {}


def gluon_shared_memory(problem: Problem, tile: TileShape) -> int:
    """Bytes of shared memory: the ring, the query tile, barriers, and where the warps' accumulators meet.

    They meet in the ring, unless it is being filled for the next unit by then, or warps of their own fill it.
    """
    dim, dim_v = box_dim(problem.head_dim), box_dim(problem.head_dim_v)
    ring = tile.num_stages * tile.block_n * (dim + dim_v) * DTYPE_BYTES[problem.dtype_k]
    merge = max(0, tile.num_warps * tile.block_m - MERGE_KEPT_ROWS) * dim_v * 4 if owns_keys(tile) else 0
    q_bytes = max(INSTRUCTION_ROWS, tile.block_m) * dim * INPUT_BYTES
    apart = shares_tiles(problem) or asks_by_page(problem, tile)
    scratch = SHARED_SCRATCH if dim >= dim_v else SHARED_SCRATCH_LONG_VALUES
    return (ring + merge if apart else max(ring, merge)) + q_bytes + scratch


def gluon_registers(problem: Problem, tile: TileShape, features: int) -> int:
    """32-bit registers that one thread would like to have, for a kernel with so many features.

    An accumulator of 16 rows a warp; then q's fragments and what each of a warp's own keys takes, or the scores of all keys.
    """
    dim, dim_v = box_dim(problem.head_dim), box_dim(problem.head_dim_v)
    accumulator = INSTRUCTION_ROWS * dim_v / WARP
    by_threads = problem.page_size % tile.block_n != 0 and not asks_by_page(problem, tile) if problem.page_size else False
    gathered = tile.block_n / (ROWS_COPIED_AT_ONCE * tile.num_warps) if by_threads else 0.0
    shares, long_head = shares_tiles(problem), max(dim, dim_v) > LONG_HEAD
    if owns_keys(tile):
        q = INSTRUCTION_ROWS * dim * INPUT_BYTES / 4 / WARP
        work = OWN_KEYS_BASE + q + REGISTERS_PER_OWN_KEY * tile.block_n / tile.num_warps + OWN_KEYS_FEATURE[shares] * features
        more_keys = max(0.0, tile.block_n / tile.num_warps - KEYS_A_STEP)
        work += REGISTERS_PER_LONG_KEY * more_keys if long_head else 0.0
        shared_tiles, parts = float(OWN_KEYS_SHARED_TILES), 0.0
        shared_tiles += OWN_KEYS_ALL_ROWS if tile.block_m == INSTRUCTION_ROWS else 0.0
        shared_tiles += PAGED_REGISTERS_PER_KEY * more_keys if problem.page_size else 0.0
    else:
        scores = REGISTERS_PER_SCORE * INSTRUCTION_ROWS * tile.block_n / WARP
        work = OWN_ROWS_BASE + scores + OWN_ROWS_FEATURE_PER_KEY[shares] * tile.block_n * features
        work += OWN_ROWS_LONG_HEAD_PER_KEY * tile.block_n if long_head else 0.0
        shared_tiles = OWN_ROWS_SHARED_TILES + OWN_ROWS_SHARED_TILES_PER_KEY * tile.block_n
        shared_tiles += OWN_ROWS_LONG_HEAD_SHARED_TILES if long_head else 0.0
        parts = PARTS_BASE + 2 * accumulator + PARTS_FEATURE * features + (PARTS_GATHERED if gathered else 0)
        parts = 0.0 if long_head else parts
    work += DEEP_LONG_RING if long_head and tile.num_stages > 2 else 0
    alone = accumulator + work + REGISTERS_PER_GATHERED_ROW * gathered
    return int(max(alone + shared_tiles, parts) if shares else alone)
