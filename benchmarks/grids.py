"""The problems that are measured, most telling first.

An ``Entry`` is one problem: the keys of each sequence, the heads, the page size. ``beside`` names a second problem
that is timed in turn with it (an even batch beside a ragged one, a contiguous cache beside a paged one).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import ceil, exp, log
from typing import Any

from flashtile.problem import Problem
from flashtile.rounding import length_bucket
from flashtile.testing import traffic

CAPACITY_STEP = 16
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1, "int8": 1}
STORED = {"e4m3": "float8_e4m3fn", "int8": "int8"}  # quantised caches, as names of entries have them
GRID_NAMES = ("seqlen1", "speculative", "paged", "ragged", "host", "kvcache", "floor", "search", "cpu", "fp8")


@dataclass(frozen=True)
class Entry:
    """One problem; ``lengths`` holds the keys of each sequence, ``page_size`` is 0 for a contiguous cache.

    ``dtype_kv`` is that of a quantised cache, which has a scale for all keys and one for all values.
    """

    name: str
    lengths: tuple[int, ...]
    num_heads_q: int
    num_heads_kv: int
    seqlen_q: int = 1
    head_dim: int = 128
    dtype: str = "bfloat16"
    page_size: int = 0
    dtype_kv: str = ""
    beside: Entry | None = None

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def is_even(self) -> bool:
        return len(set(self.lengths)) <= 1

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that one call has to read."""
        return 2 * sum(self.lengths) * self.num_heads_kv * self.head_dim * DTYPE_BYTES[self.dtype_kv or self.dtype]

    @property
    def cache_bytes(self) -> int:
        """Bytes of K and V that one input set occupies (a contiguous ragged cache has room for the longest everywhere)."""
        keys = sum(self.lengths) if self.page_size else self.batch * self.longest
        return 2 * keys * self.num_heads_kv * self.head_dim * DTYPE_BYTES[self.dtype_kv or self.dtype]

    @property
    def capacity(self) -> int:
        """Keys that each sequence has room for: of a contiguous cache rounded up, so that libraries that know pages alone can read it."""
        step = self.page_size or CAPACITY_STEP
        return ceil(self.longest / step) * step

    def problem(self) -> Problem:
        """What the planner sees of it."""
        stored, scales = self.dtype_kv or self.dtype, "tensor" if self.dtype_kv else "none"
        return Problem(
            batch=self.batch, seqlen_q=self.seqlen_q, seqlen_k=length_bucket(self.capacity), num_heads_q=self.num_heads_q,
            num_heads_kv=self.num_heads_kv, head_dim=self.head_dim, dtype_q=self.dtype, page_size=self.page_size,
            dtype_k=stored, dtype_v=stored, k_scales=scales, v_scales=scales,
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """What a result file says about the problem."""
        facts = asdict(self)
        facts.pop("beside")
        lengths = facts.pop("lengths")
        facts["batch"] = self.batch
        facts["seqlens_k"] = {"min": min(lengths, default=0), "max": self.longest, "sum": sum(lengths)}
        facts["kv_bytes"] = self.kv_bytes
        return facts


def even(batch: int, keys: int, heads: tuple[int, int], seqlen_q: int = 1, page_size: int = 0, stored: str = "") -> Entry:
    """``batch`` sequences of ``keys`` keys each; ``stored`` is one of STORED where the cache is quantised."""
    suffix = (f" q{seqlen_q}" if seqlen_q > 1 else "") + (f" page {page_size}" if page_size else "") + (f" {stored}" if stored else "")
    name, dtype_kv = f"{batch}x{keys} {heads[0]}/{heads[1]}{suffix}", STORED.get(stored, "")
    return Entry(name, (keys,) * batch, *heads, seqlen_q=seqlen_q, page_size=page_size, dtype_kv=dtype_kv)


GQA, MHA, WIDE, MQA = (32, 8), (32, 32), (64, 8), (16, 1)
SEQLEN1_SHAPES = ((1, 512), (1, 4096), (1, 32768), (8, 2048), (32, 4096), (1, 131072), (8, 16384), (128, 1024), (128, 4096))
ODD_SHAPES = ((1, 777), (8, 5001))


def seqlen1() -> list[Entry]:
    """One query a sequence: four kinds of heads, batch x keys from latency to bandwidth, odd lengths beside them."""
    first = [even(b, n, GQA) for b, n in SEQLEN1_SHAPES + ODD_SHAPES]
    others = [even(b, n, heads) for b, n in SEQLEN1_SHAPES for heads in (MQA, WIDE, MHA)]
    odd = [even(b, n, heads) for b, n in ODD_SHAPES for heads in (MQA, WIDE, MHA)]
    return first + others + odd


def speculative() -> list[Entry]:
    """Several query positions a sequence, causal."""
    return [even(b, n, GQA, seqlen_q=q) for q in (4, 8, 2, 16) for b, n in ((1, 4096), (1, 32768), (16, 4096))]


def paged() -> list[Entry]:
    """Pages of 16 keys, of 64 and of one, each beside the contiguous cache."""
    return [replace(even(b, n, GQA, page_size=size), beside=even(b, n, GQA)) for b, n in ((32, 4096), (8, 2048)) for size in (16, 64, 1)]


def log_uniform(count: int, low: int, high: int, seed: int) -> tuple[int, ...]:
    """``count`` lengths whose logarithms are uniform."""
    draw = random.Random(seed)
    return tuple(round(exp(draw.uniform(log(low), log(high)))) for _ in range(count))


def trace_lengths(quantiles: traffic.Quantiles, count: int, seed: int) -> tuple[int, ...]:
    """Keys of ``count`` running requests of a service: a prompt, and a random part of its answer."""
    draw = random.Random(seed)
    requests = quantiles.draw(count, seed=seed)
    return tuple(max(1, request.context_tokens + round(draw.random() * request.generated_tokens)) for request in requests)


def ragged() -> list[Entry]:
    """Batches of 64 whose lengths differ, each beside an even batch of the same bytes; contiguous and in pages of 16."""
    batches: dict[str, tuple[int, ...]] = {
        "conversation": trace_lengths(traffic.conversation_quantiles(), 64, seed=2023),
        "one 65536 among 512": (512,) * 31 + (65536,) + (512,) * 32,
        "code": trace_lengths(traffic.code_quantiles(), 64, seed=2023),
        "log-uniform": log_uniform(64, 128, 65536, seed=2023),
    }
    return [_beside_even(f"ragged {kind}", lengths, page_size) for kind, lengths in batches.items() for page_size in (0, 16)]


def _beside_even(name: str, lengths: tuple[int, ...], page_size: int) -> Entry:
    mean = round(sum(lengths) / len(lengths))
    return Entry(
        name + (f" page {page_size}" if page_size else ""),
        lengths,
        *GQA,
        page_size=page_size,
        beside=even(len(lengths), mean, GQA, page_size=page_size),
    )


def host() -> list[Entry]:
    """Where the host's work is as large as the kernel's: with a combine, then without (as many units as SMs, and more)."""
    return [even(1, 512, GQA), even(1, 4096, GQA), even(8, 2048, GQA), even(64, 64, GQA)]


def kvcache() -> list[Entry]:
    """A step with and without an append and rotary embeddings before it: where they weigh most, in pages, and where they should not."""
    return [even(1, 4096, GQA), even(1, 4096, GQA, page_size=16), even(1, 512, GQA), even(8, 2048, GQA), even(1, 4096, GQA, seqlen_q=4),
            even(32, 4096, GQA), even(128, 1024, GQA)]  # fmt: skip


def floor() -> list[Entry]:
    """67 MB of keys and values, then half a gigabyte and more: against a kernel that merely reads them."""
    return [even(b, n, heads) for b, n, heads in (
        (8, 2048, GQA), (1, 16384, GQA), (1, 4096, MHA), (32, 4096, GQA), (1, 131072, GQA), (8, 16384, GQA), (128, 1024, GQA),
        (128, 4096, GQA), (8, 16384, MHA), (128, 4096, MHA),
    )]  # fmt: skip


def search() -> list[Entry]:
    """Problems on which the planner's choice is held against a search."""
    shapes = (
        (1, 4096, GQA, 1), (8, 2048, GQA, 1), (1, 512, GQA, 1), (1, 32768, MQA, 1), (32, 4096, GQA, 1), (1, 32768, GQA, 1),
        (1, 4096, GQA, 4), (16, 4096, GQA, 8), (8, 2048, MHA, 1), (128, 1024, MQA, 1), (1, 4096, WIDE, 1), (1, 777, GQA, 1),
        (8, 5001, GQA, 1), (1, 131072, MQA, 1), (1, 4096, MHA, 1), (1, 32768, GQA, 16), (8, 16384, WIDE, 1), (128, 1024, GQA, 1),
        (1, 512, MQA, 1), (8, 2048, MQA, 1),
    )  # fmt: skip
    return [even(b, n, heads, seqlen_q=q) for b, n, heads, q in shapes]


def cpu() -> list[Entry]:
    """What the CPU engine is held to, beside torch SDPA."""
    shapes = ((1, 4096, GQA), (1, 512, GQA), (4, 2048, GQA), (1, 4096, MHA), (1, 16384, MQA))
    in_bf16 = [even(b, n, heads) for b, n, heads in shapes]
    in_fp32 = [replace(entry, name=entry.name + " float32", dtype="float32") for entry in in_bf16[:4]]
    return in_bf16 + in_fp32


def fp8() -> list[Entry]:
    """Quantised caches, each beside the same keys and values in bfloat16: one query, then as many as several blocks of 16 rows hold."""
    shapes = ((32, 4096, 1, 0), (1, 131072, 1, 0), (1, 4096, 1, 0), (8, 2048, 1, 0), (1, 32768, 1, 0), (128, 1024, 1, 0),
              (32, 4096, 1, 16), (16, 4096, 4, 0), (16, 4096, 8, 0), (1, 512, 1, 0), (16, 4096, 2, 0), (16, 4096, 16, 0), (16, 4096, 32, 0),
              (1, 32768, 8, 0), (1, 32768, 16, 0), (4, 8192, 8, 0), (16, 4096, 8, 16))  # fmt: skip
    in_e4m3 = [(*shape, "e4m3") for shape in shapes]
    in_int8 = [(*shape, "int8") for shape in shapes[:2]]
    return [replace(even(b, n, GQA, q, page, stored), beside=even(b, n, GQA, q, page)) for b, n, q, page, stored in [*in_e4m3, *in_int8]]


def grid(name: str) -> list[Entry]:
    """The entries of the grid called ``name``."""
    makers: dict[str, Callable[[], list[Entry]]] = {
        "seqlen1": seqlen1, "speculative": speculative, "paged": paged, "ragged": ragged,
        "host": host, "kvcache": kvcache, "floor": floor, "search": search, "cpu": cpu, "fp8": fp8,
    }  # fmt: skip
    return makers[name]()


_NAME = re.compile(r"(\d+)x(\d+) (\d+)/(\d+)(?: q(\d+))?(?: page (\d+))?(?: (e4m3|int8))?")


def named(text: str) -> list[Entry]:
    """A grid's entries by its name, or one entry by its own (``8x2048 32/8 q4 page 16 e4m3``, in a grid or not); raises ValueError."""
    if text in GRID_NAMES:
        return grid(text)
    for name in GRID_NAMES:
        for entry in grid(name):
            if entry.name == text:
                return [replace(entry, beside=None)]
    if match := _NAME.fullmatch(text):
        *numbers, stored = match.groups()
        batch, keys, heads_q, heads_kv, seqlen_q, page_size = (int(part) if part else 0 for part in numbers)
        return [even(batch, keys, (heads_q, heads_kv), seqlen_q=seqlen_q or 1, page_size=page_size, stored=stored or "")]
    raise ValueError(f"{text}: no grid ({', '.join(GRID_NAMES)}), no entry of one, and not of the form 8x2048 32/8 q4 page 16 e4m3")


def shrunk(entry: Entry, max_keys: int = 192, max_batch: int = 3) -> Entry:
    """The same kind of problem, small enough for a dry run of the scripts where there is no GPU."""
    lengths = tuple(min(n, max_keys + n % 7) for n in entry.lengths[:max_batch])
    beside = None if entry.beside is None else shrunk(entry.beside, max_keys, max_batch)
    return replace(entry, lengths=lengths, beside=beside)
