"""Forward on Hopper: a copy engine that runs ahead, and two or three warpgroups that multiply while they exponentiate.

A program has one producer warp (forward_load.py) and a warpgroup for every 64 rows (forward_rows.py). The producer takes tiles
of rows one after another (forward_schedule.py) and has the copy engine (TMA) bring their q, keys and values into shared
memory (forward_memory.py); each warpgroup walks the blocks of keys (forward_scores.py: products, masks, softmax) and stores its
rows (forward_results.py). Barriers in shared memory say what has arrived and what is needed no longer, so that the ring of
blocks runs on from one tile into the next.

Source: FlashAttention-3 (Shah et al. 2024).
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.errors import UnsupportedError
from flashtile.kernels.call import ForwardCall, ForwardRunner
from flashtile.kernels.gluon.forward_counter import tile_counters
from flashtile.kernels.gluon.forward_load import load_tiles
from flashtile.kernels.gluon.forward_memory import (
    allocate_exchange,
    allocate_tiles,
    box_rows,
    bytes_of_tile,
    out_fits_q,
    rows_in_place,
)
from flashtile.kernels.gluon.forward_rows import attend_tiles
from flashtile.kernels.launch import TRITON_DTYPES, Arg, Descriptor, Launch, Spec, launcher, on_device
from flashtile.kernels.operands import lse_view, rows_spec, rows_view, scores_view, shared_specs
from flashtile.kernels.sections import heads_at_once
from flashtile.kernels.tile.views import RowsView, TokensView, band_view
from flashtile.planner.plans import ForwardPlan
from flashtile.problem import Problem

_ROWS = 64  # of a warpgroup
_PANEL = 64
_SHORT_HEAD = 64
_USUAL_HEAD = 128
_SHARED_MEMORY = 227 * 1024  # of a program
_FOR_BARRIERS = 1024
# registers of a thread, (consumers', producer's): rows of q of a long head take what the producer can do without
_REGISTERS = {2: (232, 40), 3: (160, 32)}
_REGISTERS_WITH_Q = {2: (240, 24), 3: (160, 32)}
# a block of several pages keeps its producer busier; long heads leave it no more
_REGISTERS_FOR_PAGES = {2: (224, 56), 3: (160, 32)}
_MAX_TILES = 2**30  # which the device counts in 32 bits, and some more


@gluon.jit
def forward_sm90_kernel(
    q, k, v, out_box, out, lse, tokens, pages, scores, band, sinks, counter, num_programs, num_heads, batch, heads_at_once,
    CONSUMERS: gl.constexpr, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    PAGE_SIZE: gl.constexpr, STAGES: gl.constexpr, RESCALE_LOG2: gl.constexpr, Q_IN_REGISTERS: gl.constexpr, OWN_OUT: gl.constexpr,
    ONE_EDGE: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid: programs, each of which takes tiles of 64 * CONSUMERS rows; where ``counter`` is None, the one of its number."""
    BOX_ROWS: gl.constexpr = box_rows(BLOCK_N, PAGE_SIZE)
    q_tiles = allocate_tiles(q, CONSUMERS, 64, 64, HEAD_DIM)
    k_ring = allocate_tiles(k, STAGES, BLOCK_N, BOX_ROWS, HEAD_DIM)
    v_ring = allocate_tiles(v, STAGES, BLOCK_N, BOX_ROWS, HEAD_DIM_V)
    if OWN_OUT:
        out_tiles = allocate_tiles(out_box, CONSUMERS, 64, 64, HEAD_DIM_V)
    else:
        out_tiles = rows_in_place(q_tiles, CONSUMERS, HEAD_DIM, HEAD_DIM_V)
    notes, known, q_full, q_empty, k_full, k_empty, v_full, v_empty = allocate_exchange(CONSUMERS, STAGES)
    memory = (q_tiles, k_ring, v_ring, notes, known, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    # constants stand in the calls: in a tuple that is bound to a name they would become numbers
    if CONSUMERS == 2:
        gl.warp_specialize([
            (attend_tiles, (out_box, out, lse, tokens, scores, band, sinks, batch, num_heads, memory, out_tiles, 0, CONSUMERS, BLOCK_N,
                            HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, BOX_ROWS, STAGES, RESCALE_LOG2, Q_IN_REGISTERS, OWN_OUT, ONE_EDGE)),
            (attend_tiles, (out_box, out, lse, tokens, scores, band, sinks, batch, num_heads, memory, out_tiles, 1, CONSUMERS, BLOCK_N,
                            HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, BOX_ROWS, STAGES, RESCALE_LOG2, Q_IN_REGISTERS, OWN_OUT, ONE_EDGE)),
            (load_tiles, (q, k, v, None, tokens, pages, scores, band, counter, num_programs, batch, num_heads, heads_at_once, memory,
                          None, CONSUMERS, GROUP, BLOCK_N, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, STAGES)),
        ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (attend_tiles, (out_box, out, lse, tokens, scores, band, sinks, batch, num_heads, memory, out_tiles, 0, CONSUMERS, BLOCK_N,
                            HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, BOX_ROWS, STAGES, RESCALE_LOG2, Q_IN_REGISTERS, OWN_OUT, ONE_EDGE)),
            (attend_tiles, (out_box, out, lse, tokens, scores, band, sinks, batch, num_heads, memory, out_tiles, 1, CONSUMERS, BLOCK_N,
                            HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, BOX_ROWS, STAGES, RESCALE_LOG2, Q_IN_REGISTERS, OWN_OUT, ONE_EDGE)),
            (attend_tiles, (out_box, out, lse, tokens, scores, band, sinks, batch, num_heads, memory, out_tiles, 2, CONSUMERS, BLOCK_N,
                            HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, BOX_ROWS, STAGES, RESCALE_LOG2, Q_IN_REGISTERS, OWN_OUT, ONE_EDGE)),
            (load_tiles, (q, k, v, None, tokens, pages, scores, band, counter, num_programs, batch, num_heads, heads_at_once, memory,
                          None, CONSUMERS, GROUP, BLOCK_N, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, STAGES)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


def own_out(problem: Problem, plan: ForwardPlan) -> bool:
    """Whether rows of out have memory of their own on their way out, so that the next tile's q need not wait for them."""
    dim, dim_v = problem.head_dim, problem.head_dim_v
    ring = plan.num_stages * (bytes_of_tile(plan.block_n, dim) + bytes_of_tile(plan.block_n, dim_v))
    rows = bytes_of_tile(plan.block_m, dim) + bytes_of_tile(plan.block_m, dim_v)
    return not out_fits_q(dim, dim_v) or plan.q_in_registers or ring + rows + _FOR_BARRIERS <= _SHARED_MEMORY


def one_edge(problem: Problem, block_n: int, seqlen_q: int, seqlen_k: int) -> bool:
    """Whether of each row's blocks only the first one is cut by an edge of the band, whatever the row.

    Of a warpgroup's 64 rows, from a multiple of 64 on, the edge cuts 63 keys: those that the last row sees and the first does not.
    They lie in one block of 64 keys or more where they begin at a multiple of 64 or behind it.
    """
    right = problem.band.right
    if right is None or not lengths_decide(problem, block_n):
        return problem.band.is_full
    return (seqlen_k - seqlen_q + right + 1) % _ROWS <= 1


def lengths_decide(problem: Problem, block_n: int) -> bool:
    """Whether ``one_edge`` depends on the lengths; those of packed sequences and of pages the host does not know."""
    known = not (problem.ragged_q or problem.ragged_k or problem.seqused_k)
    return known and problem.band.left is None and problem.band.right is not None and block_n % _ROWS == 0


def forward_spec(problem: Problem, plan: ForwardPlan, edge_is_one: bool) -> Spec:
    """The kernel's specialisation."""
    consumers = plan.block_m // _ROWS
    tight = plan.q_in_registers and problem.head_dim > _SHORT_HEAD
    keys = box_rows(plan.block_n, problem.page_size)
    many_boxes = keys < plan.block_n and problem.head_dim <= _USUAL_HEAD and problem.head_dim_v <= _USUAL_HEAD
    of_kind = _REGISTERS_WITH_Q if tight else _REGISTERS_FOR_PAGES if many_boxes else _REGISTERS
    registers, producer_registers = of_kind[consumers]
    i32 = Arg("i32")
    packed = problem.ragged_q

    def boxes(dtype: str, rows: int) -> Descriptor:
        return Descriptor(TRITON_DTYPES[dtype], (1, rows, 1, _PANEL))

    return Spec(
        forward_sm90_kernel,
        args={
            "q": boxes(problem.dtype_q, _ROWS),
            "k": boxes(problem.dtype_k, keys),
            "v": boxes(problem.dtype_v, keys),
            "out_box": boxes(problem.dtype_out, _ROWS),
            "out": rows_spec(problem, problem.dtype_out) if packed else RowsView(None, None, None, None),
            **shared_specs(problem),
            "tokens": TokensView(
                Arg("*i32") if packed else None,
                Arg("*i32") if problem.ragged_k else None,
                Arg("*i32") if problem.seqused_k else None,
                i32, i32, i32, i32,
            ),
            "counter": Arg("*i32") if plan.num_programs else None,
            "num_programs": i32,
            "num_heads": i32,
            "batch": i32,
            "heads_at_once": i32,
        },
        constants={
            "CONSUMERS": consumers,
            "GROUP": problem.group,
            "BLOCK_N": plan.block_n,
            "HEAD_DIM": problem.head_dim,
            "HEAD_DIM_V": problem.head_dim_v,
            "PAGE_SIZE": problem.page_size,
            "STAGES": plan.num_stages,
            "RESCALE_LOG2": plan.rescale_log2,
            "Q_IN_REGISTERS": plan.q_in_registers,
            "OWN_OUT": own_out(problem, plan),
            "ONE_EDGE": edge_is_one,
            "REGISTERS": registers,
            "PRODUCER_REGISTERS": producer_registers,
        },
        options={"num_warps": 4, "num_stages": 1},
    )  # fmt: skip


def specs(problem: Problem, plan: ForwardPlan) -> tuple[Spec, ...]:
    """What ``bind`` may launch: where the edges lie may depend on lengths."""
    edges = (True, False) if lengths_decide(problem, plan.block_n) else (problem.band.is_full,)
    return tuple(forward_spec(problem, plan, edge_is_one) for edge_is_one in edges)


def prepare(problem: Problem, plan: ForwardPlan, device: torch.device) -> None:
    """Compiles what ``bind`` will launch."""
    for spec in specs(problem, plan):
        launcher(spec, device)


def bind(problem: Problem, plan: ForwardPlan, device: torch.device) -> ForwardRunner:
    """What runs calls of ``problem`` as ``plan`` says."""
    launches: dict[bool, Launch] = {}
    heads, page_size, block_m, programs = problem.num_heads_q, problem.page_size, plan.block_m, plan.num_programs
    at_once, band = heads_at_once(problem, device, block_m), band_view(problem.band)
    counters = tile_counters(device) if programs else None
    pointer = torch.Tensor.data_ptr
    no_rows, no_pages = (None,) * 4, (None,) * 3

    def run(stream: int, call: ForwardCall) -> None:
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, page_table, max_seqlen_q, sinks, slopes, out, lse, scale, softcap, _ = call
        if not out.numel():
            return
        pages: tuple[Any, ...] = no_pages
        seqlen_k, total_k = k.shape[1], k.shape[0]
        if page_table is not None:
            seqlen_k, pages = page_table.shape[1] * page_size, (pointer(page_table), page_table.stride(0), k.shape[0])
        if not k.numel():
            k, v = _one_key(k), _one_key(v)
        out_view: tuple[Any, ...] = no_rows
        if cu_seqlens_q is not None:
            batch, total_q = len(cu_seqlens_q) - 1, q.shape[0]
            tiles, heads_in_line = (total_q // block_m + batch) * heads, heads
            out_view = rows_view(out, pointer)
            q, out = q[None], out[None]
        else:
            batch, max_seqlen_q = q.shape[:2]
            total_q = batch * max_seqlen_q
            tiles, heads_in_line = -(-max_seqlen_q // block_m) * batch * heads, batch * heads
        if cu_seqlens_k is not None:
            k, v = k[None], v[None]
        if tiles > _MAX_TILES:
            limit = f"{tiles} tiles of {block_m} rows: at most {_MAX_TILES}"
            raise UnsupportedError("The call does not fit a launch.", {plan.kernel: [limit]})
        tokens = (
            None if cu_seqlens_q is None else pointer(cu_seqlens_q),
            None if cu_seqlens_k is None else pointer(cu_seqlens_k),
            None if seqused_k is None else pointer(seqused_k),
            max_seqlen_q, seqlen_k, total_q, total_k,
        )  # fmt: skip
        edge_is_one = one_edge(problem, plan.block_n, max_seqlen_q, seqlen_k)
        launch = launches.get(edge_is_one)
        if launch is None:
            launch = launches[edge_is_one] = launcher(forward_spec(problem, plan, edge_is_one), device)
        grid = min(programs, tiles) if programs else tiles
        counter, _kept = (None, None) if counters is None else counters.address(stream)
        launch.run(
            grid, 1, stream, q, k, v, out, out_view, lse_view(lse, pointer), tokens, pages,
            scores_view(scale, softcap, slopes, pointer), band, None if sinks is None else pointer(sinks), counter,
            grid, heads, batch, min(at_once, heads_in_line), *launch.constants,
        )  # fmt: skip

    return on_device(run, device)


def _one_key(x: torch.Tensor) -> torch.Tensor:
    """In the place of k or v without keys, since a tensor map has no empty side: a key that no row sees."""
    return x.new_zeros((*(1 for _ in x.shape[:-2]), *x.shape[-2:]))
