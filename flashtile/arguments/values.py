"""Checks of Python numbers and switches, and of all that acts on the scores."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flashtile.arguments.tensors import check_per_head
from flashtile.errors import ArgumentError, message

if TYPE_CHECKING:
    import torch


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ArgumentError(message(name, "True or False", repr(value), "Tensors and numbers are not read as switches."))


def check_number(name: str, value: object, minimum: float | None = None) -> None:
    """Raises ArgumentError unless ``value`` is a finite Python number, at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ArgumentError(
            message(name, "a finite Python number", repr(value), "Pass a float or an int: tensors are not read on the host.")
        )
    if minimum is not None and value < minimum:
        raise ArgumentError(message(name, f"at least {minimum}", value, f"Use {name}=0.0 to switch it off."))


def check_dropout(dropout_p: object) -> None:
    """Raises ArgumentError unless it is a Python number from 0 on that is less than 1."""
    check_number("dropout_p", dropout_p, minimum=0.0)
    if not dropout_p < 1.0:  # type: ignore[operator]
        raise ArgumentError(message("dropout_p", "less than 1", dropout_p, "It is the share of the softmax that is dropped: 0.0 is none."))


def check_scores(
    heads_q: int,
    batch: int,
    causal: bool,
    softcap: float,
    scale: float | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    allow_tf32: bool,
) -> None:
    """What becomes of q.k in any operation; the window is checked where its Band is made."""
    for name, vector in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        check_per_head(name, vector, heads_q, batch if name == "alibi_slopes" else None)
    check_number("softcap", softcap, minimum=0.0)
    if scale is not None:
        check_number("scale", scale)
    check_bool("causal", causal)
    check_bool("allow_tf32", allow_tf32)
