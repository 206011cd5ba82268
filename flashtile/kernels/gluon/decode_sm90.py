"""Decode on Hopper: split-KV attention whose key tiles come through a ring that the copy engine fills.

Rows are packed, keys split and results combined as in the portable kernel (flashtile/kernels/decode.py), whose device
functions this one shares. What differs is how tiles come and who computes: the copy engine (TMA) reads K and V some tiles
ahead of the products (ring.py), and the warps share out either the keys of a tile (own_keys.py: 8 and 16 rows) or the
rows (own_rows.py: 64 and 128).

A program walks units (walk.py): a unit is a sequence, key head and block of rows. On a grid of splits that is one unit and its
share of the keys. With stream-K all tiles of the batch form a line, of which each program takes an even share, the ring
runs on from one unit into the next. Parts of a unit are merged by combine, or by the last program that has one (parts.py).
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_wait

from flashtile.kernels.call import DecodeRunner
from flashtile.kernels.combine import combine_spec, combines
from flashtile.kernels.gluon.asking import ask_for_split, ask_on_line
from flashtile.kernels.gluon.attend import held_dim
from flashtile.kernels.gluon.ring import gathers, tile_ring
from flashtile.kernels.gluon.walk import walk_line, walk_split
from flashtile.kernels.launch import TRITON_DTYPES, Arg, Descriptor, Launch, Spec, launcher
from flashtile.kernels.run import bind_split, split_args, split_constants, waits
from flashtile.kernels.tile.views import KeysView
from flashtile.planner.footprint_gluon import asks_by_page, merges_parts, registers_asked_for
from flashtile.planner.plans import DecodePlan
from flashtile.problem import DTYPE_BYTES, Problem
from flashtile.rounding import length_bucket

_PAIRS = {"float8_e4m3fn": "u16", "int8": "i16"}  # quantised tensors, as elements of two codes
ASKING_REGISTERS = gl.constexpr(40)  # of a thread that only asks for tiles


@gluon.jit
def decode_sm90_kernel(
    q, k, v, out, lse, partials, lengths, pages, scores, band, sinks, kv_scales, num_heads_kv, batch, row_blocks, min_keys_per_split,
    planned_keys,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    PAGE_SIZE: gl.constexpr, SPLIT: gl.constexpr, SEQUENCES: gl.constexpr, ONE_STEP: gl.constexpr, UNIT_COST: gl.constexpr,
    STAGES: gl.constexpr, NUM_WARPS: gl.constexpr, IN_TURN: gl.constexpr, MERGES: gl.constexpr, WAITS: gl.constexpr,
    PDL: gl.constexpr, ASKED_FOR: gl.constexpr,
):  # fmt: skip
    """Grid: (units, splits), the last splits first; with stream-K, where SEQUENCES > 0, programs."""
    D: gl.constexpr = held_dim(HEAD_DIM)
    DV: gl.constexpr = held_dim(HEAD_DIM_V)
    GATHERED: gl.constexpr = gathers(PAGE_SIZE, BLOCK_N) and not ASKED_FOR
    k_ring, k_tiles = tile_ring(k, STAGES, BLOCK_N, D, GATHERED)
    v_ring, v_tiles = tile_ring(v, STAGES, BLOCK_N, DV, GATHERED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty, known = full, full
    if not GATHERED:  # else nobody waits for them, and rows of q would come to lie where barriers have begun to count
        for stage in gl.static_range(STAGES):
            mbarrier.init(full.index(stage), count=2 if ASKED_FOR else 1)
    if ASKED_FOR:
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(empty.index(stage), count=1)
        known = gl.allocate_shared_memory(gl.int32, [STAGES, 1], mbarrier.MBarrierLayout())
    # the copy engine counts in these barriers, and has its own view of shared memory
    fence_async_shared()
    if WAITS:
        gdc_wait()
    ring = (k_ring, k_tiles, v_ring, v_tiles, full, empty, known)
    signs = (full, empty, known)
    # warps of their own ask for pages; constants are written inside the calls, for a tuple bound to a name makes numbers of them
    if SEQUENCES > 0 and ASKED_FOR:
        gl.warp_specialize([
            (walk_line, (
                q, k, v, out, lse, partials, ring, lengths, pages, scores, band, sinks, kv_scales, num_heads_kv, batch,
                GROUP, BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, SEQUENCES, ONE_STEP, UNIT_COST, STAGES, NUM_WARPS, MERGES, PDL,
                ASKED_FOR,
            )),
            (ask_on_line, (
                k, k_ring, signs, lengths, pages, band, num_heads_kv, batch, True,
                GROUP, BLOCK_M, BLOCK_N, PAGE_SIZE, SEQUENCES, ONE_STEP, UNIT_COST, STAGES,
            )),
            (ask_on_line, (
                v, v_ring, signs, lengths, pages, band, num_heads_kv, batch, False,
                GROUP, BLOCK_M, BLOCK_N, PAGE_SIZE, SEQUENCES, ONE_STEP, UNIT_COST, STAGES,
            )),
        ], [1, 1], [ASKING_REGISTERS, ASKING_REGISTERS])  # fmt: skip
    elif SEQUENCES > 0:
        walk_line(
            q, k, v, out, lse, partials, ring, lengths, pages, scores, band, sinks, kv_scales, num_heads_kv, batch,
            GROUP, BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, SEQUENCES, ONE_STEP, UNIT_COST, STAGES, NUM_WARPS, MERGES, PDL,
            ASKED_FOR,
        )  # fmt: skip
    elif ASKED_FOR:
        gl.warp_specialize([
            (walk_split, (
                q, k, v, out, lse, partials, ring, lengths, pages, scores, band, sinks, kv_scales, num_heads_kv, batch, row_blocks,
                min_keys_per_split, planned_keys,
                GROUP, BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, SPLIT, STAGES, NUM_WARPS, IN_TURN, PDL, ASKED_FOR,
            )),
            (ask_for_split, (
                k, k_ring, signs, lengths, pages, band, num_heads_kv, row_blocks, min_keys_per_split, True,
                GROUP, BLOCK_M, BLOCK_N, PAGE_SIZE, SPLIT, STAGES, IN_TURN,
            )),
            (ask_for_split, (
                v, v_ring, signs, lengths, pages, band, num_heads_kv, row_blocks, min_keys_per_split, False,
                GROUP, BLOCK_M, BLOCK_N, PAGE_SIZE, SPLIT, STAGES, IN_TURN,
            )),
        ], [1, 1], [ASKING_REGISTERS, ASKING_REGISTERS])  # fmt: skip
    else:
        walk_split(
            q, k, v, out, lse, partials, ring, lengths, pages, scores, band, sinks, kv_scales, num_heads_kv, batch, row_blocks,
            min_keys_per_split, planned_keys,
            GROUP, BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, SPLIT, STAGES, NUM_WARPS, IN_TURN, PDL, ASKED_FOR,
        )  # fmt: skip


def decode_spec(problem: Problem, plan: DecodePlan) -> Spec:
    """The split kernel's specialisation."""
    asked_for = asks_by_page(problem, plan)
    gathered = gathers(problem.page_size, plan.block_n) and not asked_for
    box_keys = problem.page_size if asked_for else plan.block_n

    def keys(dtype: str, dim: int) -> KeysView | Descriptor:
        stored = _PAIRS.get(dtype, TRITON_DTYPES[dtype])
        size = 2 if dtype in _PAIRS else DTYPE_BYTES[dtype]
        if gathered:
            stride = Arg("i64", max(1, problem.alignment // size))
            return KeysView(Arg("*" + stored, problem.alignment), stride, stride, stride)
        return Descriptor(stored, (1, box_keys, 1, held_dim(dim) // (2 if dtype in _PAIRS else 1)))

    return Spec(
        decode_sm90_kernel,
        args={
            **split_args(problem, plan),
            "planned_keys": Arg("i32"),
            "k": keys(problem.dtype_k, problem.head_dim),
            "v": keys(problem.dtype_v, problem.head_dim_v),
        },
        constants={
            **split_constants(problem, plan),
            "STAGES": plan.num_stages,
            "NUM_WARPS": plan.num_warps,
            "IN_TURN": plan.min_keys_per_split <= plan.block_n,
            "MERGES": _merges_parts(problem, plan),
            "ASKED_FOR": asked_for,
        },
        options={
            "num_warps": plan.num_warps,
            "num_stages": 1,
            **registers_asked_for(problem, plan),
            **({"launch_pdl": True} if waits(problem, plan) else {}),
        },
    )


def _merges_parts(problem: Problem, plan: DecodePlan) -> bool:
    return merges_parts(plan, max(problem.head_dim, problem.head_dim_v), plan.num_splits, plan.num_programs)


def specs(problem: Problem, plan: DecodePlan) -> tuple[Spec, ...]:
    """What ``bind`` will launch."""
    split = decode_spec(problem, plan)
    return (split, combine_spec(problem, plan)) if combines(plan) and not _merges_parts(problem, plan) else (split,)


def prepare(problem: Problem, plan: DecodePlan, device: torch.device) -> None:
    """Compiles what ``bind`` will launch."""
    for spec in specs(problem, plan):
        launcher(spec, device)


def bind(problem: Problem, plan: DecodePlan, device: torch.device) -> DecodeRunner:
    """What runs calls of ``problem`` as ``plan`` says: the split kernel and, where keys are split, combine."""
    launch = launcher(decode_spec(problem, plan), device)
    gathered = gathers(problem.page_size, plan.block_n) and not asks_by_page(problem, plan)

    codes_an_element = 2 if problem.quantised else 1

    def view(keys: torch.Tensor) -> tuple[int, ...]:
        return keys.data_ptr(), *(stride // codes_an_element for stride in keys.stride()[:3])

    def with_keys(k: torch.Tensor, v: torch.Tensor) -> tuple[Launch, Any, Any]:
        return (launch, view(k), view(v)) if gathered else (launch, k, v)

    return bind_split(
        problem, plan, device, torch.Tensor.data_ptr, with_keys, (length_bucket(problem.seqlen_k),), _merges_parts(problem, plan)
    )
