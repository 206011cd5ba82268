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
        return json.dumps({"operation": "decode", **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> DecodePlan:
        data: dict[str, Any] = json.loads(text)
        operation = data.pop("operation", "decode")
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        if operation != "decode" or unknown:
            raise ArgumentError(
                message(
                    "plan",
                    f"a decode plan with fields {sorted(known)}",
                    operation if operation != "decode" else unknown,
                    "Use DecodePlan.to_json().",
                )
            )
        return cls(**data)
