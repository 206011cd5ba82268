"""The CPU engine: decode by torch's own CPU kernels and matrix products, in memory linear in the keys.

A run of neighbouring sequences with equal lengths is one batch; ``block_m`` bounds the packed rows of one pass (a position's
heads are never parted).
"""

from __future__ import annotations

import torch

from flashtile.kernels.call import DecodeCall, DecodeRunner
from flashtile.kernels.cpu_keys import KeyReader
from flashtile.kernels.cpu_run import Tokens, clear, packed_tokens, run_packed, runs_of
from flashtile.kernels.cpu_scores import computes_natively, needs_products
from flashtile.kernels.cpu_whole import bind_whole
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem


def bind(problem: Problem, plan: DecodePlan, device: torch.device) -> DecodeRunner:
    """A runner for calls of ``problem`` on the CPU; every choice that does not hang on lengths is made here."""
    band, group = problem.band, problem.group
    positions = max(1, plan.block_m // group)
    products = needs_products(problem.softcap, problem.head_dim, problem.head_dim_v)
    native = computes_natively(problem, min(positions, max(1, problem.seqlen_q)) * group)
    through_float32 = not native or (products and problem.dtype_q != "float32")
    max_block = plan.keys_per_split if plan.keys_per_split < problem.seqlen_k else 0
    one_piece = _is_plain(problem) and not through_float32 and positions >= problem.seqlen_q and max_block == 0
    run_whole = bind_whole(problem) if one_piece else None

    def run(call: DecodeCall) -> None:
        if run_whole is not None and run_whole(call):
            return
        if call.cu_seqlens_q is not None:
            clear(call)
        if call.q.shape[0] == 0 or call.q.numel() == 0:
            return
        reader = KeyReader(call.k_cache, call.v_cache, call.page_table, through_float32, max_block, one_by_one=products)
        keys = [Tokens(0, min(max(length, 0), reader.capacity)) for length in call.seqlens_k.tolist()]
        if call.leftpad_k is not None:
            padding = [min(max(skipped, 0), length) for skipped, (_, length) in zip(call.leftpad_k.tolist(), keys)]
            keys = [Tokens(skipped, length - skipped) for skipped, (_, length) in zip(padding, keys)]
        if call.cu_seqlens_q is None:
            queries = [Tokens(0, call.q.shape[1])] * len(keys)
        else:
            queries = packed_tokens(call.cu_seqlens_q, call.q.shape[0])
        for part in runs_of(queries, keys, reader):
            run_packed(call, part, reader, band, positions)

    return run


def _is_plain(problem: Problem) -> bool:
    """Whether the problem is what torch's flash kernel computes by itself, but for packed rows, lengths and the band."""
    extras = problem.softcap or problem.alibi or problem.sinks or problem.ragged_q or problem.page_size or problem.leftpad_k
    return not extras and problem.total_q > 0 and problem.head_dim == problem.head_dim_v
