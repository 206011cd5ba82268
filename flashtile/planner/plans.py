"""Plans: every choice that a kernel launch rests on, as frozen values with a JSON round trip."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

from flashtile.errors import ArgumentError, message

BLOCK_MS = (1, 8, 16, 32, 64, 128)
Source = Literal["rule", "tuned", "explicit"]
PlanOf = TypeVar("PlanOf", bound="_Stored")


@dataclass(frozen=True)
class _Stored:
    """What plans of all operations share: changed copies, and the way to JSON and back."""

    operation: ClassVar[str]

    def with_(self: PlanOf, **changes: Any) -> PlanOf:
        return replace(self, **changes)

    def to_json(self) -> str:
        return json.dumps({"operation": self.operation, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls: type[PlanOf], text: str) -> PlanOf:
        """The plan in a JSON text; ArgumentError where it is none, or another operation's, or has other fields than plans have here."""
        types = {field.name: field.type if field.default is MISSING else type(field.default).__name__ for field in fields(cls)}
        expected, fix = f"a {cls.operation} plan with fields {sorted(types)}", f"Use {cls.__name__}.to_json()."
        try:
            data: dict[str, Any] = dict(json.loads(text))
            came = data.pop("operation", cls.operation)
            wrong = sorted(name for name, value in data.items() if type(value).__name__ != types.get(name))
            if came == cls.operation and not wrong:
                return cls(**data)
        except (TypeError, ValueError) as error:
            raise ArgumentError(message("plan", expected, f"{text!r} ({error})", fix)) from error
        raise ArgumentError(message("plan", expected, came if came != cls.operation else wrong, fix))


@dataclass(frozen=True)
class DecodePlan(_Stored):
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

    operation: ClassVar[str] = "decode"
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


@dataclass(frozen=True)
class ForwardPlan(_Stored):
    """How one forward call (prefill, or the forward half of training) runs.

    A program holds ``block_m`` query rows of one sequence and query head and walks their keys, ``block_n`` at a time, through a
    ring of ``num_stages`` tiles. ``num_programs``, where it is not 0, is a number of programs that stay on the device and take
    tiles of rows until none is left; with 0 there is a program for each tile.
    ``rescale_log2`` keeps a row's old maximum until a new one is 2**rescale_log2 times as large in probability (0 always takes
    the new one); the result is exact either way. ``q_in_registers`` keeps q as an operand in registers.
    """

    operation: ClassVar[str] = "forward"
    kernel: str
    block_m: int = 128
    block_n: int = 64
    num_warps: int = 8
    num_stages: int = 2
    num_programs: int = 0
    rescale_log2: int = 0
    q_in_registers: bool = False
    source: Source = "rule"


@dataclass(frozen=True)
class BackwardPlan(_Stored):
    """How one backward call runs: in two passes over the scores, without atomics, so that its results never vary, or in one.

    In the first, a program owns ``block_n`` keys of a sequence and key head, walks the queries that see them ``block_m`` at a
    time, and sums their dK and dV; in the second it owns ``dq_block_m`` queries, walks their keys ``dq_block_n`` at a time, and
    sums their dQ. Warps and ring stages are given for each pass. ``num_programs``, where it is not 0, is a number of programs
    that stay on the device and take tiles until none is left.
    With ``one_pass`` there is no second pass, and its fields say nothing: the programs that own keys add what their keys give to
    dQ in memory, in float32 and in no fixed order.
    """

    operation: ClassVar[str] = "backward"
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


Plan = DecodePlan | ForwardPlan | BackwardPlan
