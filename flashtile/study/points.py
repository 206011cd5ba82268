"""The problems of a study, the most telling first: one axis at a time around what serves most, then everything between."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from flashtile.band import Band
from flashtile.errors import ArgumentError, message
from flashtile.problem import Problem
from flashtile.rounding import length_bucket

NUM_HEADS_KV = 8  # of every problem, so that units of work depend on the batch alone
SEQLENS_Q = (1, 2, 4, 8, 16, 32, 64)
GROUPS = (1, 4, 8, 16)
HEAD_DIMS = (64, 128, 256)
KEYS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
BATCHES = (1, 8, 64)
DTYPE = "bfloat16"
FP8 = "float8_e4m3fn"
CACHES = (DTYPE, FP8)
AXES: dict[str, tuple[int, ...] | tuple[str, ...]] = {  # what a Point may be
    "head_dim": HEAD_DIMS, "seqlen_q": SEQLENS_Q, "group": GROUPS, "batch": BATCHES, "keys": KEYS, "dtype_kv": CACHES
}  # fmt: skip
# a lone short and a lone long sequence, a batch that splits help, one that fills the device
REGIMES = ((1, 4096), (1, 32768), (8, 8192), (64, 2048))
COARSE_SEQLENS_Q, COARSE_GROUPS = (1, 8, 64, 4), (8, 1, 4)
STAGES = ("tiles", "splits", "shapes")


@dataclass(frozen=True)
class Point:
    """One problem of the study: ``batch`` sequences of ``keys`` keys and ``seqlen_q`` causal queries, ``group`` query heads a key head."""

    batch: int
    keys: int
    seqlen_q: int = 1
    group: int = 8
    head_dim: int = 128
    dtype_kv: str = DTYPE

    @property
    def name(self) -> str:
        """ "8x4096 q1 g8 d128", and the cache's dtype where it is quantised."""
        cache = "" if self.dtype_kv == DTYPE else f" {self.dtype_kv}"
        return f"{self.batch}x{self.keys} q{self.seqlen_q} g{self.group} d{self.head_dim}{cache}"

    @property
    def quantised(self) -> bool:
        return self.dtype_kv != DTYPE

    @property
    def problem(self) -> Problem:
        """The problem that ``Problem.decode`` makes of the point's tensors."""
        scales = "tensor" if self.quantised else "none"
        return Problem(
            batch=self.batch, seqlen_q=self.seqlen_q, seqlen_k=length_bucket(self.keys),
            num_heads_q=self.group * NUM_HEADS_KV, num_heads_kv=NUM_HEADS_KV, head_dim=self.head_dim,
            dtype_q=DTYPE, dtype_k=self.dtype_kv, dtype_v=self.dtype_kv, k_scales=scales, v_scales=scales, band=Band.of(True, None),
        )  # fmt: skip

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that a call reads once."""
        return 2 * self.batch * self.keys * NUM_HEADS_KV * self.head_dim * (1 if self.quantised else 2)

    @classmethod
    def parse(cls, name: str) -> Point:
        """The point of that name; raises ArgumentError for another text."""
        match = re.fullmatch(r"(\d+)x(\d+) q(\d+) g(\d+) d(\d+)(?: (\w+))?", name)
        if match is None:
            raise ArgumentError(message("name", 'a problem like "8x4096 q1 g8 d128"', repr(name), "Point.name gives one."))
        batch, keys, seqlen_q, group, head_dim = (int(number) for number in match.groups()[:5])
        return cls(batch, keys, seqlen_q, group, head_dim, match[6] or DTYPE)


@dataclass(frozen=True)
class Task:
    """A stage at a point: "tiles" tries every query tile, "splits" numbers of splits, "shapes" keys a step, warps and ring stages."""

    stage: str
    point: Point

    @property
    def name(self) -> str:
        return f"{self.stage} {self.point.name}"


def tasks() -> Iterator[Task]:
    """Every task once, in the order in which a study should have them: wherever it is cut, what came before can be used."""
    yield from dict.fromkeys(_in_order())


def _in_order() -> Iterator[Task]:
    coarse = list(product(COARSE_SEQLENS_Q, COARSE_GROUPS))
    for (q, g), (batch, keys) in product(coarse[:6], REGIMES):
        yield Task("tiles", Point(batch, keys, q, g))
    for batch, keys in REGIMES[:3]:
        yield Task("splits", Point(batch, keys))
    for batch, keys in product(BATCHES, KEYS):  # achieved bandwidth against keys
        yield Task("tiles", Point(batch, keys))
    for batch, keys in REGIMES:
        yield Task("tiles", Point(batch, keys, dtype_kv=FP8))
    for head_dim, (batch, keys) in product((64, 256), REGIMES):
        yield Task("tiles", Point(batch, keys, head_dim=head_dim))
    yield Task("shapes", Point(*REGIMES[1]))
    for (q, g), (batch, keys) in product(product(SEQLENS_Q, GROUPS), REGIMES):  # the map's other cells
        yield Task("tiles", Point(batch, keys, q, g))
    for batch, keys in REGIMES[2:]:
        yield Task("shapes", Point(batch, keys))
    for q, g in ((1, 1), (8, 8), (64, 8)):
        yield Task("splits", Point(1, 32768, q, g))
        yield Task("shapes", Point(8, 8192, q, g))
    for dtype_kv, head_dim, (batch, keys), (q, g) in product(reversed(CACHES), HEAD_DIMS, REGIMES, coarse):
        yield Task("tiles", Point(batch, keys, q, g, head_dim, dtype_kv))
    for dtype_kv, head_dim, batch, keys, q, g in product(CACHES, HEAD_DIMS, BATCHES, KEYS, SEQLENS_Q, GROUPS):
        yield Task("tiles", Point(batch, keys, q, g, head_dim, dtype_kv))
