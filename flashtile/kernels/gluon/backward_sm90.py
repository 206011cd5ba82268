"""Backward on Hopper: the copy engine runs ahead of two warpgroups that multiply, in two passes over the scores or in one.

In the first of two a program owns 128 keys and sums their dK and dV over the queries that see them (backward_keys.py); in the second it
owns 128 queries and sums their dQ (backward_queries.py). Of heads wider than 128, a program of the first owns 64 keys
(backward_wide_keys.py, backward_wide_queries.py). Nothing is added in memory, so that results never vary. In one pass
(backward_whole.py) programs that own keys also add to dQ in memory, in float32 and in no fixed order (backward_sums.py): five products
where two passes take seven. Before all, the portable backward's small kernel makes what they need of each query.

Source: FlashAttention-2 and -3 (Dao 2023, Shah et al. 2024).
"""

from __future__ import annotations

import torch

from flashtile.errors import UnsupportedError
from flashtile.kernels.backward import CallViews, clear_gradients, delta_pass
from flashtile.kernels.backward_delta import delta_spec, sinks_spec
from flashtile.kernels.call import BackwardCall, BackwardRunner
from flashtile.kernels.gluon.backward_results import padded_dim
from flashtile.kernels.gluon.backward_specs import DEPENDENT_LAUNCH, NO_PAGES, NO_ROWS, has_adders, keys_spec, queries_spec, whole_spec
from flashtile.kernels.gluon.backward_sums import SUMS_BLOCK, SUMS_SIDE, as_boxes, conversion_spec, sums_blocks
from flashtile.kernels.gluon.forward_counter import tile_counters
from flashtile.kernels.launch import Spec, launcher, on_device, workspace
from flashtile.kernels.operands import rows_view, scores_view
from flashtile.kernels.tile.views import band_view
from flashtile.planner.plans import BackwardPlan
from flashtile.problem import DTYPE_BYTES, Problem

_TILE = 128  # queries of a tile of the second pass
_MAX_TILES = 2**30  # which the device counts in 32 bits, and some more
_L2_BYTES = 8 << 20  # of what a head's tiles read again and again, for heads that are taken together


def specs(problem: Problem, plan: BackwardPlan) -> tuple[Spec, ...]:
    """What ``bind`` will launch, where no gradient flows through lse."""
    delta = delta_spec(problem, dlse=False, dsinks=problem.sinks, sums=plan.one_pass, dependents=DEPENDENT_LAUNCH)
    if plan.one_pass:
        usual = delta, whole_spec(problem, plan), conversion_spec(problem, dependent=DEPENDENT_LAUNCH)
    else:
        usual = delta, keys_spec(problem, plan), queries_spec(problem, plan)
    return (*usual, sinks_spec()) if problem.sinks else usual


def prepare(problem: Problem, plan: BackwardPlan, device: torch.device) -> None:
    """Compiles what ``bind`` will launch."""
    for spec in specs(problem, plan):
        launcher(spec, device)


def bind(problem: Problem, plan: BackwardPlan, device: torch.device) -> BackwardRunner:
    """What runs calls of ``problem`` as ``plan`` says."""
    pointer, one_pass = torch.Tensor.data_ptr, plan.one_pass
    heads, heads_kv, programs, keys_a_tile = problem.num_heads_q, problem.num_heads_kv, plan.num_programs, plan.block_n
    write_delta = delta_pass(problem, device, sums=one_pass, dependents=DEPENDENT_LAUNCH)
    over_queries = launcher(whole_spec(problem, plan) if one_pass else keys_spec(problem, plan), device)
    finish = launcher(conversion_spec(problem, dependent=DEPENDENT_LAUNCH) if one_pass else queries_spec(problem, plan), device)
    band, transposed = band_view(problem.band), band_view(problem.band.transposed())
    keys_at_once, queries_at_once = heads_at_once(problem, plan)
    counters = tile_counters(device) if programs else None
    panels, boxed = padded_dim(problem.head_dim) // SUMS_SIDE.value, one_pass and has_adders(problem, plan)

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
        packed = cu_seqlens_q is not None
        blocks = sums_blocks(batch, seqlen_q, total_q, packed) if one_pass else 0
        all_blocks = blocks * heads * (1 if packed else batch) * panels
        sums = workspace(all_blocks * SUMS_BLOCK.value, q.device) if one_pass else None
        cleared = (None, None) if sums is None else (pointer(sums), all_blocks)
        write_delta(stream, call, CallViews(batch, rows_view(dout, pointer), statistics, tokens, cleared))
        if not q.numel() or not k.numel():
            clear_gradients(call._replace(dsinks=None))
            return
        dq_view, dk_view, dv_view = NO_ROWS, NO_ROWS, NO_ROWS
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
        key_band_args = (statistics, tokens, keys, transposed, counter, grid, heads_kv, batch, min(keys_at_once, in_line), scale, scores[0])
        if sums is not None:
            added = (pointer(sums), blocks)
            box = as_boxes(sums) if boxed else None
            over_queries.run(grid, 1, stream, q, k, v, dout, dk, dv, dk_view, dv_view, added, box, *key_band_args, *over_queries.constants)
            row_blocks = max(1, -(-seqlen_q // SUMS_SIDE.value))  # somebody clears rows of nobody
            finish.run(
                batch * row_blocks * heads, 1, stream, added, rows_view(call.dq, pointer), tokens, scale, heads, batch, row_blocks,
                *finish.constants,
            )  # fmt: skip
            return
        over_queries.run(grid, 1, stream, q, k, v, dout, dk, dv, dk_view, dv_view, *key_band_args, *over_queries.constants)
        grid = min(programs, row_tiles * heads) if programs else row_tiles * heads
        in_line = heads if cu_seqlens_q is not None else batch * heads
        finish.run(
            grid, 1, stream, q, k, v, dout, dq, dq_view, statistics, tokens, NO_PAGES, scores, band, counter, grid, heads, batch,
            min(queries_at_once, in_line), scale, *finish.constants,
        )  # fmt: skip

    return on_device(run, device)


def heads_at_once(problem: Problem, plan: BackwardPlan) -> tuple[int, int]:
    """Heads whose tiles take turns (tile/order.py): key heads in the keys' pass, query heads in the queries' pass.

    As many as L2 keeps of what their tiles walk: q and dout of all heads of a group, or k and v of a key head. But of key heads as many as
    occupy programs that stay: the last heads' long walks would else begin when most programs have nothing left to do.
    """
    row_bytes = problem.head_dim * DTYPE_BYTES[problem.dtype_q] + problem.head_dim_v * DTYPE_BYTES[problem.dtype_out]
    walked_q, walked_k = max(1, problem.group * problem.seqlen_q * row_bytes), max(1, problem.seqlen_k * row_bytes)
    busy = plan.num_programs // max(1, -(-problem.seqlen_k // plan.block_n))
    return max(1, _L2_BYTES // walked_q, busy), problem.group * max(1, _L2_BYTES // walked_k)
