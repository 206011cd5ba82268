"""What a call computes beside its tensors: the mask and the scores, the same for every block of it."""

from __future__ import annotations

from typing import NamedTuple

from flashtile.band import Band


class Scores(NamedTuple):
    """``band`` of the whole sequence; ``scale``, ``softcap``, ``allow_tf32`` and ``deterministic`` as `flashtile.attention` has them."""

    band: Band
    softcap: float
    scale: float | None
    allow_tf32: bool
    deterministic: bool | None
