"""Whether decode's programs take their places while those of the append before them end, or once they have ended."""

from __future__ import annotations

from flashtile.planner.cost import cost_of, row_blocks_of, work_of
from flashtile.planner.device import Device
from flashtile.planner.footprint import footprint_of, padded
from flashtile.planner.plans import DecodePlan
from flashtile.problem import Problem

APPENDED_ELEMENTS = 2048  # of an append's program: some heads of some tokens (kernels/append.py)
JOINING_GAINS_US = 1.3  # of a launch that hides behind the append's end
UNEVEN_SHARE = 0.1  # of a call's time, lost where some SMs have a program more than their share for all of it


def joins_append(problem: Problem, plan: DecodePlan, device: Device) -> bool:
    """Whether dependent launch gains more than it may lose where an append comes before the call.

    An SM counts as fuller while programs of an append are on it. Programs of decode that come meanwhile crowd on other SMs, and where
    all are there at once none is left to even that out: it costs a tenth of the whole call. Nothing is lost where programs come in
    waves, where no SM has room for more than its share, and where both launches fit side by side; little where the call is short.

    Measured on an H200, bfloat16, 32/8 heads; joined by new keys alone, joined with rotary embeddings too, and apart:

    - 32 x 4096 keys, 256 programs of which an SM holds 3, beside an append's 64 or 128: 132.6, 138.2, 124.4 us (121.2 without append)
    - 1 x 4096, 4 queries, 128 programs beside 4 or 12: 10.5, 11.7, 11.7 us
    - 1 x 4096, 128 programs beside 2 or 4, which is an SM for each: 9.1, 9.1, 10.5 us
    - 8 x 2048, 64 programs, an SM for each: 20.8, 21.1, 22.3 us
    - 128 x 1024, 1024 programs in waves: 125.0, 124.9, 126.1 us
    """
    if not plan.dependent_launch:
        return False
    work, footprint = work_of(problem), footprint_of(problem, plan, device)
    programs = plan.num_programs or row_blocks_of(work, plan.block_m) * problem.num_heads_kv * plan.num_splits
    share = -(-programs // device.num_sms)
    if footprint.resident <= share or programs + append_programs(problem) <= share * device.num_sms:
        return True
    return UNEVEN_SHARE * cost_of(work, plan, footprint, plan.num_splits, device, plan.num_programs).total_us <= JOINING_GAINS_US


def append_programs(problem: Problem) -> int:
    """Programs of an append of as many tokens as there are queries, which turns queries too: of new keys, of new values, and of q."""
    heads = max(1, APPENDED_ELEMENTS // padded(max(problem.head_dim, problem.head_dim_v)))
    of_keys, of_queries = (-(-problem.seqlen_q * count // heads) for count in (problem.num_heads_kv, problem.num_heads_q))
    return problem.batch * (2 * of_keys + of_queries)
