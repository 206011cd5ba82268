"""The forward problems that are measured, most telling first.

A ``Shape`` is one problem: how many queries and keys each sequence has, heads, head dims, mask, and how the keys lie.
``beside`` names a second problem that is timed in turn with it (contiguous keys beside pages).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any, TypeVar

from benchmarks.grids import DTYPE_BYTES, log_uniform
from flashtile.band import Band

TOKENS = 16384  # of one problem, over all its sequences
WIDTH = 2048  # heads x head dim
KEYS = (4096, 16384, 1024, 32768, 8192, 2048)
PORTABLE = "triton.forward"
GRID_NAMES = ("dense", "chunked", "varlen", "window", "dims", "gqa", "host", "portable", "rescale", "cpu")


@dataclass(frozen=True)
class Shape:
    """One problem. Keys are packed where ``varlen`` says so, else batch-first; with ``page_size`` they are pages and q is packed.

    ``head_dim_v`` 0 is that of the queries. ``window`` is (left, right). ``growth`` makes the scores of a row grow by so many bits
    every 128 keys, so that running maxima move and partial sums are rescaled; ``kernel`` asks for one kernel's plan instead of
    the planner's choice.
    """

    name: str
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    num_heads_q: int
    num_heads_kv: int
    head_dim: int = 128
    head_dim_v: int = 0
    dtype: str = "bfloat16"
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    varlen: bool = False
    page_size: int = 0
    growth: float = 0.0
    kernel: str = ""
    beside: Shape | None = None

    def __post_init__(self) -> None:
        if not self.head_dim_v:
            object.__setattr__(self, "head_dim_v", self.head_dim)

    @property
    def batch(self) -> int:
        return len(self.seqlens_q)

    @property
    def packed(self) -> bool:
        """Whether q is (total_q, hq, d)."""
        return self.varlen or self.page_size > 0

    @property
    def band(self) -> Band:
        return Band.of(self.causal, self.window)

    @property
    def pairs(self) -> float:
        """Visible pairs of a query and a key over all sequences; half of all where causal and square, as FlashAttention counts."""
        return sum(self._pairs(q, k) for q, k in zip(self.seqlens_q, self.seqlens_k))

    def _pairs(self, seqlen_q: int, seqlen_k: int) -> float:
        band = self.band
        if band.is_full:
            return seqlen_q * seqlen_k
        if not self.packed and band == Band(None, 0) and seqlen_q == seqlen_k:
            return seqlen_q * seqlen_k / 2
        return visible_pairs(seqlen_q, seqlen_k, band)

    @property
    def flops(self) -> float:
        """Multiplications and additions of both matrix products over visible pairs."""
        return 2 * self.pairs * self.num_heads_q * (self.head_dim + self.head_dim_v)

    @property
    def bytes_in(self) -> int:
        """Bytes of q, k and v."""
        keys = sum(self.seqlens_k) * self.num_heads_kv * (self.head_dim + self.head_dim_v)
        return (sum(self.seqlens_q) * self.num_heads_q * self.head_dim + keys) * DTYPE_BYTES[self.dtype]

    def facts(self) -> dict[str, Any]:
        """What a result file says about the problem."""
        facts = asdict(self)
        facts.pop("beside")
        for name in ("seqlens_q", "seqlens_k"):
            lengths = facts[name]
            facts[name] = {"min": min(lengths, default=0), "max": max(lengths, default=0), "sum": sum(lengths)}
        return facts | {"batch": self.batch, "pairs": self.pairs, "flops": self.flops, "bytes_in": self.bytes_in}


AnyShape = TypeVar("AnyShape", bound=Shape)


def visible_pairs(seqlen_q: int, seqlen_k: int, band: Band) -> int:
    """How many (query, key) pairs of one sequence the band shows."""
    offset = seqlen_k - seqlen_q
    count = 0
    for query in range(seqlen_q):
        first = 0 if band.left is None else max(0, query + offset - band.left)
        last = seqlen_k if band.right is None else min(seqlen_k, query + offset + band.right + 1)
        count += max(0, last - first)
    return count


def square(batch: int, keys: int, heads: tuple[int, int], head_dim: int = 128, head_dim_v: int = 0, causal: bool = False) -> Shape:
    """``batch`` sequences with as many queries as keys."""
    dims = f"{head_dim}/{head_dim_v}" if head_dim_v not in (0, head_dim) else str(head_dim)
    grouped = f" {heads[0]}/{heads[1]}" if heads[0] != heads[1] else ""
    lengths = (keys,) * batch
    name = f"{dims} {'causal' if causal else 'full'} {batch}x{keys}{grouped}"
    return Shape(name, lengths, lengths, *heads, head_dim=head_dim, head_dim_v=head_dim_v, causal=causal)


def squares(keys: Iterable[int], head_dim: int, head_dim_v: int = 0, heads: tuple[int, int] | None = None) -> list[Shape]:
    """16k tokens in sequences of each length (one of them where it is longer), causal and full."""
    of = heads or (WIDTH // (head_dim_v or head_dim),) * 2
    return [square(max(1, TOKENS // n), n, of, head_dim, head_dim_v, causal) for n in keys for causal in (True, False)]


def dense() -> list[Shape]:
    """16k tokens, 2048 features: head dims 128, 64 and 256, full and causal, every length, and one sequence of 32k."""
    return [shape for head_dim in (128, 64, 256) for shape in squares(KEYS, head_dim)]


def dims() -> list[Shape]:
    """Head dims 96, 192, and 192 with values of 128."""
    return [shape for head_dim, head_dim_v in ((192, 128), (192, 0), (96, 0)) for shape in squares((4096, 16384), head_dim, head_dim_v)]


def gqa() -> list[Shape]:
    """Grouped heads: 32 over 8, and 16 over one."""
    return [shape for heads in ((32, 8), (16, 1)) for shape in squares((4096, 16384, 1024), 128, heads=heads)]


def chunked() -> list[Shape]:
    """A prefill in chunks: 512 new queries on 16k cached keys, in pages of 16, beside the same keys without pages."""
    keys = 16384 + 512
    plain = Shape("512 on 16k, contiguous", (512,) * 8, (keys,) * 8, 32, 8, causal=True)
    return [replace(plain, name="512 on 16k, pages of 16", page_size=16, beside=plain)]


def varlen() -> list[Shape]:
    """64 sequences whose lengths are log-uniform."""
    lengths = log_uniform(64, 128, 8192, seed=2023)
    return [Shape("64 log-uniform", lengths, lengths, 16, 16, causal=True, varlen=True)]


def window() -> list[Shape]:
    """Each query sees its last 1024 keys, itself among them."""
    return [replace(square(1, n, (16, 16), causal=True), name=f"window 1024 1x{n}", window=(1023, 0)) for n in (16384, 32768)]


def host() -> list[Shape]:
    """Where the host's work is longer than the kernel's."""
    packed = replace(square(2, 128, (16, 16), causal=True), name="128 causal 2x128 packed", varlen=True)
    return [square(1, 256, (16, 16), causal=True), square(2, 512, (16, 16)), packed]


def portable() -> list[Shape]:
    """The portable kernel where another one would be chosen."""
    return [replace(shape, name=f"{shape.name} portable", kernel=PORTABLE) for shape in squares(KEYS, 128)]


def rescale() -> list[Shape]:
    """Head dim 128 once more, on data whose maxima keep growing: in half of the heads towards the last key, in others towards the first."""
    return [replace(shape, name=f"{shape.name} growing", growth=12.0) for shape in squares(KEYS, 128)]


def cpu() -> list[Shape]:
    """What the CPU engine is held to, beside torch SDPA."""
    shapes = [square(1, 1024, (8, 8), causal=causal) for causal in (False, True)]
    grouped = square(2, 512, (8, 2), causal=True)
    return [*shapes, *(replace(shape, name=f"{shape.name} float32", dtype="float32") for shape in shapes), grouped]


def grid(name: str) -> list[Shape]:
    """The problems of the grid called ``name``."""
    makers: dict[str, Callable[[], list[Shape]]] = {
        "dense": dense, "dims": dims, "gqa": gqa, "chunked": chunked, "varlen": varlen, "window": window,
        "host": host, "portable": portable, "rescale": rescale, "cpu": cpu,
    }  # fmt: skip
    return makers[name]()


def shrunk(shape: AnyShape, longest: int = 96, max_batch: int = 2, max_heads: int = 4) -> AnyShape:
    """The same kind of problem, small enough for a dry run of the scripts where there is no GPU."""
    factor = ceil(max(shape.seqlens_k, default=1) / longest)
    group = shape.num_heads_q // shape.num_heads_kv
    heads_kv = max(1, min(shape.num_heads_kv, max_heads // group))
    beside = None if shape.beside is None else shrunk(shape.beside, longest, max_batch, max_heads)
    return replace(
        shape, beside=beside, num_heads_q=heads_kv * group, num_heads_kv=heads_kv,
        seqlens_q=tuple(max(1, n // factor) for n in shape.seqlens_q[:max_batch]),
        seqlens_k=tuple(max(1, n // factor) for n in shape.seqlens_k[:max_batch]),
    )  # fmt: skip
