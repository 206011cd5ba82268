"""Backward on Hopper: two passes over the scores, in both of which the copy engine runs ahead of two warpgroups that multiply.

In the first a program owns 128 keys and sums their dK and dV over the queries that see them (backward_keys.py); in the second it
owns 128 queries and sums their dQ (backward_queries.py). Of heads wider than 128, a program of the first owns 64 keys
(backward_wide_keys.py, backward_wide_queries.py). Nothing is added in memory, so that results never vary. Before them the
portable backward's small kernel makes what they need of each query.

Source: FlashAttention-2 and -3 (Dao 2023, Shah et al. 2024).
"""

from __future__ import annotations

from typing import Any

import torch

from flashtile.errors import UnsupportedError
from flashtile.kernels.backward import CallViews, clear_gradients, delta_pass
from flashtile.kernels.backward_delta import delta_spec, sinks_spec
from flashtile.kernels.call import BackwardCall, BackwardRunner
from flashtile.kernels.gluon.backward_keys import backward_keys_kernel
from flashtile.kernels.gluon.backward_queries import backward_queries_kernel
from flashtile.kernels.gluon.backward_wide_keys import backward_wide_keys_kernel
from flashtile.kernels.gluon.backward_wide_queries import backward_wide_queries_kernel
from flashtile.kernels.gluon.forward_counter import tile_counters
from flashtile.kernels.launch import TRITON_DTYPES, Arg, Descriptor, Spec, launcher, on_device, workspace
from flashtile.kernels.operands import band_spec, rows_spec, rows_view, scores_spec, scores_view, statistics_spec, tokens_spec
from flashtile.kernels.tile.views import PagesView, RowsView, TokensView, band_view
from flashtile.planner.plans import BackwardPlan
from flashtile.problem import DTYPE_BYTES, Problem

_ROWS = 64  # of a warpgroup
_TILE = 128  # queries of a tile of the second pass
_PANEL = 64
_WIDE_HEAD = 128  # heads wider than this have kernels of their own
_REGISTERS, _PRODUCER_REGISTERS = 240, 24  # of a thread
_MAX_TILES = 2**30  # which the device counts in 32 bits, and some more
_L2_BYTES = 8 << 20  # of what a head's tiles read again and again, for heads that are taken together
_NO_ROWS = RowsView(None, None, None, None)
_NO_PAGES = PagesView(None, None, None)


def keys_spec(problem: Problem, plan: BackwardPlan) -> Spec:
    """The keys' pass."""
    boxes, tokens = _boxes_of_calls(problem, plan.block_m, _ROWS), tokens_spec(problem)
    return Spec(
        backward_wide_keys_kernel if _is_wide(problem) else backward_keys_kernel,
        args={
            **boxes,
            "dk_box": boxes["k"],
            "dv_box": boxes["v"],
            "dk": rows_spec(problem, problem.dtype_k) if problem.ragged_k else _NO_ROWS,
            "dv": rows_spec(problem, problem.dtype_v) if problem.ragged_k else _NO_ROWS,
            **_numbers_spec(problem, plan),
            "keys": TokensView(tokens.cu_seqlens_k, tokens.cu_seqlens_q, None, *tokens[3:]),
            "band": band_spec(problem.band.transposed()),
            "num_heads_kv": Arg("i32"),
            "scale_log2": Arg("fp32"),
        },
        constants={
            "GROUP": problem.group,
            "BLOCK_M": plan.block_m,
            "HEAD_DIM": problem.head_dim,
            "HEAD_DIM_V": problem.head_dim_v,
            "STAGES": plan.num_stages,
            "REGISTERS": _REGISTERS,
            "PRODUCER_REGISTERS": _PRODUCER_REGISTERS,
        },
        options={"num_warps": 4, "num_stages": 1},
    )


def queries_spec(problem: Problem, plan: BackwardPlan) -> Spec:
    """The queries' pass."""
    boxes = _boxes_of_calls(problem, _ROWS, plan.dq_block_n)
    # short heads have no registers to spare beside blocks of 128 keys
    q_in_registers = {} if _is_wide(problem) else {"Q_IN_REGISTERS": plan.dq_block_n <= _PANEL}
    return Spec(
        backward_wide_queries_kernel if _is_wide(problem) else backward_queries_kernel,
        args={
            **boxes,
            "dq_box": boxes["q"],
            "dq": rows_spec(problem, problem.dtype_q) if problem.ragged_q else _NO_ROWS,
            **_numbers_spec(problem, plan),
            "pages": _NO_PAGES,
            "scores": scores_spec(problem),
            "band": band_spec(problem.band),
            "num_heads": Arg("i32"),
        },
        constants={
            "GROUP": problem.group,
            "BLOCK_N": plan.dq_block_n,
            "HEAD_DIM": problem.head_dim,
            "HEAD_DIM_V": problem.head_dim_v,
            "STAGES": plan.dq_num_stages,
            **q_in_registers,
            "REGISTERS": _REGISTERS,
            "PRODUCER_REGISTERS": _PRODUCER_REGISTERS,
        },
        options={"num_warps": 4, "num_stages": 1},
    )


def _is_wide(problem: Problem) -> bool:
    """Whether a warpgroup's registers do not hold dK and dV of 64 keys at once."""
    return max(problem.head_dim, problem.head_dim_v) > _WIDE_HEAD


def _boxes_of_calls(problem: Problem, query_rows: int, key_rows: int) -> dict[str, Descriptor]:
    """What the copy engine brings, in boxes of so many rows."""

    def boxes(dtype: str, rows: int) -> Descriptor:
        return Descriptor(TRITON_DTYPES[dtype], (1, rows, 1, _PANEL))

    return {
        "q": boxes(problem.dtype_q, query_rows),
        "k": boxes(problem.dtype_k, key_rows),
        "v": boxes(problem.dtype_v, key_rows),
        "dout": boxes(problem.dtype_out, query_rows),
    }


def _numbers_spec(problem: Problem, plan: BackwardPlan) -> dict[str, Any]:
    """What both passes are told."""
    i32 = Arg("i32")
    return {
        "statistics": statistics_spec(),
        "tokens": tokens_spec(problem),
        "counter": Arg("*i32") if plan.num_programs else None,
        "num_programs": i32,
        "batch": i32,
        "heads_at_once": i32,
        "scale": Arg("fp32"),
    }


def specs(problem: Problem, plan: BackwardPlan) -> tuple[Spec, ...]:
    """What ``bind`` will launch, where no gradient flows through lse."""
    usual = delta_spec(problem, dlse=False, dsinks=problem.sinks), keys_spec(problem, plan), queries_spec(problem, plan)
    return (*usual, sinks_spec()) if problem.sinks else usual


def prepare(problem: Problem, plan: BackwardPlan, device: torch.device) -> None:
    """Compiles what ``bind`` will launch."""
    for spec in specs(problem, plan):
        launcher(spec, device)


def bind(problem: Problem, plan: BackwardPlan, device: torch.device) -> BackwardRunner:
    """What runs calls of ``problem`` as ``plan`` says."""
    pointer = torch.Tensor.data_ptr
    heads, heads_kv, programs, keys_a_tile = problem.num_heads_q, problem.num_heads_kv, plan.num_programs, plan.block_n
    write_delta = delta_pass(problem, device)
    over_queries, over_keys = launcher(keys_spec(problem, plan), device), launcher(queries_spec(problem, plan), device)
    band, transposed = band_view(problem.band), band_view(problem.band.transposed())
    keys_at_once, queries_at_once = heads_at_once(problem)
    counters = tile_counters(device) if programs else None

    def run(stream: int, call: BackwardCall) -> None:
        q, k, v, dout, dq, dk, dv = call.q, call.k, call.v, call.dout, call.dq, call.dk, call.dv
        cu_seqlens_q, cu_seqlens_k = call.cu_seqlens_q, call.cu_seqlens_k
        batch, seqlen_q, total_q = q.shape[0], q.shape[1], q.shape[0] * q.shape[1]
        if cu_seqlens_q is not None:
            batch, seqlen_q, total_q = len(cu_seqlens_q) - 1, call.max_seqlen_q, q.shape[0]
        if batch == 0:
            clear_gradients(call)
            return
        seqlen_k, total_k = k.shape[1], k.shape[0]
        row_tiles = total_q // _TILE + batch if cu_seqlens_q is not None else batch * -(-seqlen_q // _TILE)
        key_tiles = total_k // keys_a_tile + batch if cu_seqlens_k is not None else batch * -(-seqlen_k // keys_a_tile)
        if max(row_tiles * heads, key_tiles * heads_kv) > _MAX_TILES:
            limit = f"{max(row_tiles * heads, key_tiles * heads_kv)} tiles: at most {_MAX_TILES}"
            raise UnsupportedError("The call does not fit a launch.", {plan.kernel: [limit]})
        lse_log2, delta = workspace(heads * total_q, q.device), workspace(heads * total_q, q.device)
        strides = (0, total_q) if cu_seqlens_q is not None else (heads * seqlen_q, seqlen_q)
        statistics = (pointer(lse_log2), pointer(delta), *strides)
        lengths = [None if tensor is None else pointer(tensor) for tensor in (cu_seqlens_q, cu_seqlens_k, call.seqused_k)]
        tokens = (*lengths, seqlen_q, seqlen_k, total_q, total_k)
        keys = (lengths[1], lengths[0], None, seqlen_k, seqlen_q, total_k, total_q)
        scale = call.scale
        write_delta(stream, call, CallViews(batch, rows_view(dout, pointer), statistics, tokens))
        if not q.numel() or not k.numel():
            clear_gradients(call._replace(dsinks=None))
            return
        dq_view, dk_view, dv_view = _NO_ROWS, _NO_ROWS, _NO_ROWS
        if cu_seqlens_q is not None:
            dq_view = rows_view(dq, pointer)
            q, dout, dq = q[None], dout[None], dq[None]
        if cu_seqlens_k is not None:
            dk_view, dv_view = rows_view(dk, pointer), rows_view(dv, pointer)
            k, v, dk, dv = k[None], v[None], dk[None], dv[None]
        scores = scores_view(scale, call.softcap, call.alibi_slopes, pointer)
        counter, _kept = (None, None) if counters is None else counters.address(stream)
        grid = min(programs, key_tiles * heads_kv) if programs else key_tiles * heads_kv
        in_line = heads_kv if cu_seqlens_k is not None else batch * heads_kv
        over_queries.run(
            grid, 1, stream, q, k, v, dout, dk, dv, dk_view, dv_view, statistics, tokens, keys, transposed, counter, grid, heads_kv, batch,
            min(keys_at_once, in_line), scale, scores[0], *over_queries.constants,
        )  # fmt: skip
        grid = min(programs, row_tiles * heads) if programs else row_tiles * heads
        in_line = heads if cu_seqlens_q is not None else batch * heads
        over_keys.run(
            grid, 1, stream, q, k, v, dout, dq, dq_view, statistics, tokens, _NO_PAGES, scores, band, counter, grid, heads, batch,
            min(queries_at_once, in_line), scale, *over_keys.constants,
        )  # fmt: skip

    return on_device(run, device)


def heads_at_once(problem: Problem) -> tuple[int, int]:
    """Heads whose tiles take turns (tile/order.py): key heads in the keys' pass, query heads in the queries' pass.

    As many as L2 keeps of what their tiles walk: q and dout of all heads of a group, or k and v of a key head.
    """
    row_bytes = problem.head_dim * DTYPE_BYTES[problem.dtype_q] + problem.head_dim_v * DTYPE_BYTES[problem.dtype_out]
    walked_q, walked_k = max(1, problem.group * problem.seqlen_q * row_bytes), max(1, problem.seqlen_k * row_bytes)
    return max(1, _L2_BYTES // walked_q), problem.group * max(1, _L2_BYTES // walked_k)
