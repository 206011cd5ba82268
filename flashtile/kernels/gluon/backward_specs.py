"""How Hopper's backward kernels are compiled for a problem and a plan."""

from __future__ import annotations

from typing import Any

from flashtile.kernels.gluon.backward_keys import backward_keys_kernel
from flashtile.kernels.gluon.backward_queries import backward_queries_kernel
from flashtile.kernels.gluon.backward_results import padded_dim
from flashtile.kernels.gluon.backward_sums import sums_box, sums_spec
from flashtile.kernels.gluon.backward_whole import backward_whole_kernel
from flashtile.kernels.gluon.backward_wide_keys import backward_wide_keys_kernel
from flashtile.kernels.gluon.backward_wide_queries import backward_wide_queries_kernel
from flashtile.kernels.launch import TRITON_DTYPES, Arg, Descriptor, Spec
from flashtile.kernels.operands import band_spec, rows_spec, scores_spec, statistics_spec, tokens_spec
from flashtile.kernels.tile.views import PagesView, RowsView, TokensView
from flashtile.planner.plans import BackwardPlan
from flashtile.problem import Problem

NO_ROWS = RowsView(None, None, None, None)
NO_PAGES = PagesView(None, None, None)
# Whether a kernel's programs take their places while the last kernel of the call ends: not until packed batches were right with it.
DEPENDENT_LAUNCH = False
_ROWS = 64  # of a warpgroup
_PANEL = 64
_WIDE_HEAD = 128  # heads wider than this have kernels of their own
_REGISTERS, _PRODUCER_REGISTERS = 240, 24  # of a thread
_REGISTERS_BESIDE_ADDERS, _ADDER_REGISTERS = 192, 104  # where a third warpgroup sums dQ: below these, products would not overlap


def keys_spec(problem: Problem, plan: BackwardPlan) -> Spec:
    """The keys' pass."""
    boxes, tokens = _boxes_of_calls(problem, plan.block_m, _ROWS), tokens_spec(problem)
    return Spec(
        backward_wide_keys_kernel if _is_wide(problem) else backward_keys_kernel,
        args={
            **boxes,
            "dk_box": boxes["k"],
            "dv_box": boxes["v"],
            "dk": rows_spec(problem, problem.dtype_k) if problem.ragged_k else NO_ROWS,
            "dv": rows_spec(problem, problem.dtype_v) if problem.ragged_k else NO_ROWS,
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
            "PDL": DEPENDENT_LAUNCH,
        },
        options={"num_warps": 4, "num_stages": 1, "launch_pdl": DEPENDENT_LAUNCH},
    )


def whole_spec(problem: Problem, plan: BackwardPlan) -> Spec:
    """Both in one pass: the keys' pass, which also adds to dQ's sums."""
    keys = keys_spec(problem, plan)
    adders = has_adders(problem, plan)
    # on an H200, 1024 to 16384 keys: 0.94 to 0.97x under a mask, 0.98 to 1.04x without one; 128 queries a step leave no registers for it
    behind = not adders and problem.band.is_full and plan.block_m == _PANEL
    registers = {"REGISTERS": _REGISTERS_BESIDE_ADDERS} if adders else {}
    return Spec(
        backward_whole_kernel,
        args={**keys.args, "sums": sums_spec(), "sums_box": sums_box() if adders else None},
        constants={
            **keys.constants,
            "ADDERS": adders,
            "SPARE": adders and padded_dim(problem.head_dim_v) == _PANEL,
            "BEHIND": behind,
            "FROM_SHARED": padded_dim(problem.head_dim) > _PANEL,
            **registers,
            "ADDER_REGISTERS": _ADDER_REGISTERS,
        },
        options=keys.options,
    )


def has_adders(problem: Problem, plan: BackwardPlan) -> bool:
    """Whether a third warpgroup computes dQ in one pass: two find a half each of 128 queries, or of 128 dims, and else have none."""
    return bool(padded_dim(problem.head_dim) * plan.block_m < _PANEL * 128)


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
            "dq": rows_spec(problem, problem.dtype_q) if problem.ragged_q else NO_ROWS,
            **_numbers_spec(problem, plan),
            "pages": NO_PAGES,
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
            "PDL": DEPENDENT_LAUNCH,
        },
        options={"num_warps": 4, "num_stages": 1, "launch_pdl": DEPENDENT_LAUNCH},
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
