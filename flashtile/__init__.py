"""flashtile: exact attention with no hard-coded tile.

Names are imported at first use, so that planning and explaining need neither torch nor Triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashtile.api import (
        append_kv,
        attention,
        attention_varlen,
        attention_varlen_with_lse,
        attention_with_lse,
        decode,
        decode_with_lse,
        merge,
        warmup,
    )
    from flashtile.band import Band
    from flashtile.checking import checked
    from flashtile.errors import (
        ArgumentError,
        AttentionError,
        CommunicationError,
        DtypeError,
        OutOfPagesError,
        ShapeError,
        ToolchainError,
        UnsupportedError,
    )
    from flashtile.paged import PagedKV
    from flashtile.planner.device import Device
    from flashtile.planner.explain import explain
    from flashtile.planner.plans import BackwardPlan, DecodePlan, ForwardPlan
    from flashtile.problem import Problem

__version__ = "0.1.0.dev0"

_HOMES = {
    "flashtile.api": (
        "append_kv",
        "attention",
        "attention_varlen",
        "attention_varlen_with_lse",
        "attention_with_lse",
        "decode",
        "decode_with_lse",
        "merge",
        "warmup",
    ),
    "flashtile.band": ("Band",),
    "flashtile.checking": ("checked",),
    "flashtile.errors": (
        "ArgumentError",
        "AttentionError",
        "CommunicationError",
        "DtypeError",
        "OutOfPagesError",
        "ShapeError",
        "ToolchainError",
        "UnsupportedError",
    ),
    "flashtile.paged": ("PagedKV",),
    "flashtile.planner.device": ("Device",),
    "flashtile.planner.explain": ("explain",),
    "flashtile.planner.plans": ("BackwardPlan", "DecodePlan", "ForwardPlan"),
    "flashtile.problem": ("Problem",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ArgumentError",
    "AttentionError",
    "BackwardPlan",
    "Band",
    "CommunicationError",
    "DecodePlan",
    "Device",
    "DtypeError",
    "ForwardPlan",
    "OutOfPagesError",
    "PagedKV",
    "Problem",
    "ShapeError",
    "ToolchainError",
    "UnsupportedError",
    "__version__",
    "append_kv",
    "attention",
    "attention_varlen",
    "attention_varlen_with_lse",
    "attention_with_lse",
    "checked",
    "decode",
    "decode_with_lse",
    "explain",
    "merge",
    "warmup",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'flashtile' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
