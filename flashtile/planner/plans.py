"""Plans: every choice that a kernel launch rests on, as frozen values with a JSON round trip."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from flashtile.errors import ArgumentError, message

BLOCK_MS = (1, 8, 16, 32, 64, 128)
Source = Literal["rule", "tuned", "explicit"]


@dataclass(frozen=True)
class DecodePlan:
    """How one decode call runs.

    ``block_m`` is the query tile (FlashAttention's kBlockM): rows of (query position, head of a group) that one
    program holds. ``swapped`` gives the MMA's large side to the keys and its small side to the queries.
    ``keys_per_split`` bounds the keys that one program reads; the number of splits follows from the longest sequence
    the call may see. A shorter sequence is cut finer, but never below ``min_keys_per_split``; set both equal and the
    boundaries depend on key position alone.
    ``num_programs``, where it is not 0, replaces the grid of ``num_splits`` programs a unit (sequence, key head, row
    block): that many programs share the key tiles of the whole batch evenly, whatever the lengths are (stream-K, Osama
    et al. 2023). ``num_splits`` then only says what a unit gets where all lengths are alike.
    """

    kernel: str
    block_m: int
    block_n: int = 64
    swapped: bool = False
    num_warps: int = 4
    num_stages: int = 3
    keys_per_split: int = 0
    min_keys_per_split: int = 0
    num_splits: int = 1
    num_programs: int = 0
    combine_block_d: int = 32
    combine_warps: int = 1
    dependent_launch: bool = False
    source: Source = "rule"

    def with_(self, **changes: Any) -> DecodePlan:
        return replace(self, **changes)

    def to_json(self) -> str:
        return _to_json("decode", self)

    @classmethod
    def from_json(cls, text: str) -> DecodePlan:
        return cls(**_fields_of("decode", cls, text))


@dataclass(frozen=True)
class ForwardPlan:
    """How one forward call (prefill, or the forward half of training) runs.

    A program holds ``block_m`` query rows of one sequence and query head and walks their keys, ``block_n`` at a time, through a
    ring of ``num_stages`` tiles. ``num_programs``, where it is not 0, is a number of programs that stay on the device and take
    tiles of rows until none is left; with 0 there is a program for each tile.
    ``rescale_log2`` keeps a row's old maximum until a new one is 2**rescale_log2 times as large in probability (0 always takes
    the new one); the result is exact either way. ``q_in_registers`` keeps q as an operand in registers.
    """

    kernel: str
    block_m: int = 128
    block_n: int = 64
    num_warps: int = 8
    num_stages: int = 2
    num_programs: int = 0
    rescale_log2: int = 0
    q_in_registers: bool = False
    source: Source = "rule"

    def with_(self, **changes: Any) -> ForwardPlan:
        return replace(self, **changes)

    def to_json(self) -> str:
        return _to_json("forward", self)

    @classmethod
    def from_json(cls, text: str) -> ForwardPlan:
        return cls(**_fields_of("forward", cls, text))


@dataclass(frozen=True)
class BackwardPlan:
    """How one backward call runs: in two passes over the scores, without atomics, so that its results never vary, or in one.

    In the first, a program owns ``block_n`` keys of a sequence and key head, walks the queries that see them ``block_m`` at a
    time, and sums their dK and dV; in the second it owns ``dq_block_m`` queries, walks their keys ``dq_block_n`` at a time, and
    sums their dQ. Warps and ring stages are given for each pass. ``num_programs``, where it is not 0, is a number of programs
    that stay on the device and take tiles until none is left.
    With ``one_pass`` there is no second pass, and its fields say nothing: the programs that own keys add what their keys give to
    dQ in memory, in float32 and in no fixed order.
    """

    kernel: str
    block_m: int = 64
    block_n: int = 128
    num_warps: int = 8
    num_stages: int = 2
    dq_block_m: int = 128
    dq_block_n: int = 64
    dq_num_warps: int = 8
    dq_num_stages: int = 2
    num_programs: int = 0
    one_pass: bool = False
    source: Source = "rule"

    def with_(self, **changes: Any) -> BackwardPlan:
        return replace(self, **changes)

    def to_json(self) -> str:
        return _to_json("backward", self)

    @classmethod
    def from_json(cls, text: str) -> BackwardPlan:
        return cls(**_fields_of("backward", cls, text))


Plan = DecodePlan | ForwardPlan | BackwardPlan


def _to_json(operation: str, plan: Plan) -> str:
    return json.dumps({"operation": operation, **asdict(plan)}, sort_keys=True)


def _fields_of(operation: str, plan: type[Plan], text: str) -> dict[str, Any]:
    """The fields in a plan's JSON text; ArgumentError where it is another operation's, or has fields unknown here."""
    data: dict[str, Any] = json.loads(text)
    came = data.pop("operation", operation)
    known = {field.name for field in fields(plan)}
    unknown = sorted(set(data) - known)
    if came != operation or unknown:
        expected = f"a {operation} plan with fields {sorted(known)}"
        raise ArgumentError(message("plan", expected, came if came != operation else unknown, f"Use {plan.__name__}.to_json()."))
    return data
