"""What the decode kernels for GPUs share on the host: one argument list, and the run of a call.

The kernels have the same parameters but for K and V, which one reads by pointers and the other by tensor maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from flashtile.errors import UnsupportedError
from flashtile.kernels.call import DecodeCall, DecodeRunner
from flashtile.kernels.combine import bind_combine, combines, partials_spec, unit_cost
from flashtile.kernels.launch import Launch, on_device, workspace
from flashtile.kernels.operands import kv_scales_spec, kv_scales_view, lengths_spec, rows_spec, shared_specs
from flashtile.kernels.spec import Arg
from flashtile.kernels.tile.schedule import sequences_at_once
from flashtile.kernels.tile.softmax import LOG2E
from flashtile.kernels.tile.views import band_view
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem

_LOG2E: float = LOG2E.value
_MAX_GRID_X = 2**31 - 1
_MAX_GRID_Y = 65_535
_MAX_LINE = 2**31 - 1  # positions, which the device counts in 32 bits


def split_args(problem: Problem, plan: DecodePlan) -> dict[str, Any]:
    """The parameters of a split kernel except k and v."""
    i32 = Arg("i32")
    finishes = not splits_all(plan)
    return {
        "q": rows_spec(problem, problem.dtype_q),
        "out": rows_spec(problem, problem.dtype_out),
        "kv_scales": kv_scales_spec(problem),
        **shared_specs(problem if finishes else problem.with_(lse=False, sinks=False)),
        "partials": partials_spec(plan),
        "lengths": lengths_spec(problem),
        "num_heads_kv": i32,
        "batch": i32,
        "row_blocks": i32,
        "min_keys_per_split": i32,
    }


def split_constants(problem: Problem, plan: DecodePlan) -> dict[str, Any]:
    """The constants of a split kernel that do not depend on how it computes."""
    sequences = sequences_at_once(problem.batch) if plan.num_programs else 0
    return {
        "GROUP": problem.group,
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "HEAD_DIM": problem.head_dim,
        "HEAD_DIM_V": problem.head_dim_v,
        "PAGE_SIZE": problem.page_size,
        "SPLIT": splits_all(plan),
        "SEQUENCES": sequences,
        "ONE_STEP": problem.batch <= sequences,
        "UNIT_COST": unit_cost(plan),
        "WAITS": waits(problem, plan),
        "PDL": combines(plan) and plan.dependent_launch,
    }


def waits(problem: Problem, plan: DecodePlan) -> bool:
    """Whether the kernel is launched while the one before it ends, and waits for what that wrote."""
    return problem.after_append and plan.dependent_launch


def splits_all(plan: DecodePlan) -> bool:
    """Whether every row's keys are split, so that all results are combine's to write."""
    return combines(plan) and plan.num_programs == 0


def bind_split(
    problem: Problem,
    plan: DecodePlan,
    device: torch.device,
    pointer: Callable[[torch.Tensor], Any],
    launch_with_keys: Callable[[torch.Tensor, torch.Tensor], tuple[Launch, Any, Any]],
    own_numbers: tuple[int, ...] = (),
    merges_parts: bool = False,
) -> DecodeRunner:
    """Runs calls of ``problem``: the split kernel and, where keys are split, combine.

    ``launch_with_keys(k_cache, v_cache)`` gives the split kernel's launch, and K and V as it is passed them;
    ``own_numbers`` are what the kernel takes behind the parameters of ``split_args``. A kernel that ``merges_parts``
    itself needs flags for them, and no combine.
    """
    group, heads_kv, page_size, head_dim_v = problem.group, problem.num_heads_kv, problem.page_size, problem.head_dim_v
    num_splits, split = plan.num_splits, splits_all(plan)
    row_blocks = max(1, -(-problem.rows // plan.block_m))
    grid = (plan.num_programs, 1) if plan.num_programs else (problem.batch * heads_kv * row_blocks, num_splits)
    if not 1 <= grid[1] <= _MAX_GRID_Y or not 0 <= grid[0] <= _MAX_GRID_X:
        limit = f"a grid of {grid[0]} x {grid[1]} programs: at most {_MAX_GRID_X} x {_MAX_GRID_Y}"
        raise UnsupportedError("The plan does not fit a launch.", {plan.kernel: [limit]})
    min_keys = max(1, -(-plan.min_keys_per_split // plan.block_n)) * plan.block_n
    numbers = (heads_kv, problem.batch, row_blocks, min_keys, *own_numbers)
    max_seqlen_q, band = problem.seqlen_q, band_view(problem.band)
    rows_of_programs = 2 * plan.num_programs * plan.block_m
    leaves_parts = combines(plan)
    combine = bind_combine(problem, plan, device) if leaves_parts and not merges_parts else None
    floats_of_flags = 4 * plan.num_programs if merges_parts else 0
    units = max(1, problem.batch * heads_kv * row_blocks)
    longest = (_MAX_LINE // units - unit_cost(plan)) * plan.block_n if plan.num_programs else math.inf
    no_lse, no_partials, no_pages, no_scales = (None,) * 4, (None,) * 3, (None,) * 3, (None,) * 6

    def run(stream: int, call: DecodeCall) -> None:
        q, k, v, seqlens_k, page_table, cu_seqlens_q, sinks, slopes, out, lse, scale, softcap, k_scale, v_scale, leftpad = call
        launch, k_view, v_view = launch_with_keys(k, v)
        pages: tuple[Any, ...] = no_pages
        if page_table is None:
            capacity = k.shape[1]
        else:
            capacity, pages = page_table.shape[1] * page_size, (pointer(page_table), page_table.stride(0), k.shape[0])
        if capacity > longest:
            # the plan was made for max_seqlen_k, which is a hint; a line too long to count would be shared out wrongly
            limit = f"{units} units of up to {capacity} keys are more than {_MAX_LINE} key tiles: ask for a grid by num_splits"
            raise UnsupportedError("The cache is too large for programs to share its tiles.", {plan.kernel: [limit]})
        padding = None if leftpad is None else pointer(leftpad)
        lse_view: tuple[Any, ...] = no_lse
        if cu_seqlens_q is not None:
            total_q = q.shape[0]
            q_strides, out_strides = (0, *q.stride()[:2]), (0, *out.stride()[:2])
            lengths = (pointer(seqlens_k), pointer(cu_seqlens_q), capacity, max_seqlen_q, total_q, padding)
            if lse is not None:
                lse_view = (pointer(lse), 0, *lse.stride())
        else:
            total_q = q.shape[0] * q.shape[1]
            q_strides, out_strides = q.stride()[:3], out.stride()[:3]
            lengths = (pointer(seqlens_k), None, capacity, max_seqlen_q, total_q, padding)
            if lse is not None:
                lse_view = (pointer(lse), *lse.stride())
        slopes_view = (None, None) if slopes is None else (pointer(slopes), slopes.stride(0) if slopes.ndim == 2 else 0)
        scores = (scale * _LOG2E, softcap or None, *slopes_view)
        q_view, out_view = (pointer(q), *q_strides), (pointer(out), *out_strides)
        sink = None if sinks is None else pointer(sinks)
        kv_scales = no_scales if k_scale is None and v_scale is None else kv_scales_view(k_scale, v_scale, pointer)
        rows = total_q * heads_kv * group
        partials: tuple[Any, ...] = no_partials
        if leaves_parts:
            num_partials = rows_of_programs or rows * num_splits
            scratch = workspace(num_partials * (head_dim_v + 1) + floats_of_flags, device)
            partials = (pointer(scratch), num_partials * head_dim_v, num_splits if split else None)
        elif rows_of_programs:
            partials = (0, 0, None)  # a lone program finishes every unit
        lse_now, sink_now = (no_lse, None) if split else (lse_view, sink)
        launch.run(
            *grid, stream, q_view, k_view, v_view, out_view, lse_now, partials, lengths, pages, scores, band, sink_now,
            kv_scales, *numbers, *launch.constants,
        )  # fmt: skip
        if combine is not None:
            combine(stream, rows, partials, out_view, lse_view, lengths, sink)

    return on_device(run, device)
