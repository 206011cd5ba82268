"""Which method fits: a paper model of what each computes and sends, in bytes and seconds, and the reasons in words.

A step of the ring computes over one rank's keys while the next rank's arrive; what of the transfer is longer than that stays visible.
An all-to-all hides behind nothing. What a causal mask leaves is shared evenly in zig-zag order alone: else the last rank, which has
all of it to do, is what all wait for. Numbers are for planning; measured ones are in the documents of results.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from flashtile.band import Band
from flashtile.distributed.exchange import explain_exchange
from flashtile.distributed.links import NVLINK, Link
from flashtile.planner.device import Device

_BACKWARD = 2.5  # operations of a backward pass, of the forward's
_FLOAT = 4  # bytes of a sum that travels or is folded
_MERGE_LAUNCHES = 8  # small kernels around the exchange: lengths before it, folding after it
_FOLDING = 3.5  # float32 passes over out that one fold makes: a cast, two reads and a write


@dataclass(frozen=True)
class Workload:
    """One call as a whole: lengths of the whole sequences, ``batch`` times where there is one length. ``training`` adds the gradients."""

    num_ranks: int
    num_heads_q: int
    num_heads_kv: int
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...] = ()
    batch: int = 1
    head_dim: int = 128
    head_dim_v: int = -1
    dtype_bytes: int = 2
    band: Band = field(default_factory=lambda: Band(None, 0))
    zigzag: bool = True
    training: bool = False
    alibi: bool = False

    def __post_init__(self) -> None:
        if not self.seqlens_k:
            object.__setattr__(self, "seqlens_k", self.seqlens_q)
        if self.head_dim_v == -1:
            object.__setattr__(self, "head_dim_v", self.head_dim)

    @property
    def pairs(self) -> int:
        """(query, key) pairs that the mask leaves, of one head."""
        return self.batch * sum(_pairs(self.band, n_q, n_k) for n_q, n_k in zip(self.seqlens_q, self.seqlens_k))

    @property
    def flops(self) -> float:
        """Of both products, forward and where it trains backward."""
        return 2.0 * self.num_heads_q * (self.head_dim + self.head_dim_v) * self.pairs * (1 + self.training * _BACKWARD)

    @property
    def key_elements(self) -> int:
        """Of k and v of one rank's shard."""
        return self.batch * sum(self.seqlens_k) * self.num_heads_kv * (self.head_dim + self.head_dim_v) // self.num_ranks

    @property
    def query_elements(self) -> int:
        """Of q and out of one rank's shard."""
        return self.batch * sum(self.seqlens_q) * self.num_heads_q * (self.head_dim + self.head_dim_v) // self.num_ranks


@dataclass(frozen=True)
class Estimate:
    """Of one rank: bytes, and seconds of computing and on the link, of which ``exposed_s`` hide behind nothing; ``alone_s`` of one GPU."""

    method: str
    bytes_sent: float
    compute_s: float
    link_s: float
    exposed_s: float
    alone_s: float

    @property
    def total_s(self) -> float:
        return self.compute_s + self.exposed_s

    @property
    def speedup(self) -> float:
        """Over one GPU that could hold it all."""
        return self.alone_s / self.total_s if self.total_s else 1.0

    @property
    def overlap(self) -> float:
        """The share of the transfers that computing hides."""
        return 1.0 - self.exposed_s / self.link_s if self.link_s else 1.0


@dataclass(frozen=True)
class Choice:
    """``method`` ("" where none can), an estimate of each that can run, and of each that cannot the reasons."""

    method: str
    estimates: tuple[Estimate, ...]
    reasons: dict[str, list[str]]
    link: Link

    def lines(self) -> list[str]:
        """The choice in words and numbers, a line each."""
        found = []
        for estimate in sorted(self.estimates, key=lambda estimate: estimate.total_s):
            chosen = " (chosen)" if estimate.method == self.method else ""
            found.append(
                f"{estimate.method}{chosen}: sends {estimate.bytes_sent / 1e6:.4g} MB a rank over {self.link.name}, "
                f"{estimate.link_s * 1e3:.4g} ms, of which computing hides {estimate.overlap:.0%}; "
                f"{estimate.total_s * 1e3:.4g} ms in all, {estimate.speedup:.2f}x one GPU"
            )
        found += [f"{method}: not possible: {reason}" for method, why in self.reasons.items() for reason in why]
        return found


@lru_cache(maxsize=1024)
def choose(work: Workload, link: Link | None = None, device: Device | None = None) -> Choice:
    """The faster of the methods that can run ``work``, by the paper model; NVLink and an H200 unless given."""
    link, device = link or NVLINK, device or Device.named("h200")
    reasons: dict[str, list[str]] = {}
    if work.num_heads_kv % work.num_ranks:
        reasons["ulysses"] = [f"{work.num_heads_kv} key heads cannot be shared evenly by {work.num_ranks} ranks"]
    if work.alibi and work.num_ranks > 1:
        reasons["ring"] = ["ALiBi counts distances in the whole sequence, and a block of the ring knows its own"]
    able = [estimate for estimate in (ring(work, link, device), ulysses(work, link, device)) if estimate.method not in reasons]
    best = min(able, key=lambda estimate: estimate.total_s).method if able else ""
    return Choice(best, tuple(able), reasons, link)


def ring(work: Workload, link: Link, device: Device) -> Estimate:
    """Ring attention: num_ranks - 1 transfers of a shard of k and v, and in training as many again, and of float32 gradients."""
    ranks = work.num_ranks
    share = work.flops / ranks if work.zigzag or work.band.right is None else _last_shards_flops(work)
    folds = ranks * _FOLDING * _FLOAT * work.query_elements * work.head_dim_v / (work.head_dim + work.head_dim_v)
    compute = share / device.matrix_rate + (folds / device.bandwidth if ranks > 1 else 0.0)
    forward_step = link.seconds(work.key_elements * work.dtype_bytes) if ranks > 1 else 0.0
    forward_compute = compute / (1 + work.training * _BACKWARD) / ranks
    exposed, seconds = (ranks - 1) * max(0.0, forward_step - forward_compute), (ranks - 1) * forward_step
    sent = (ranks - 1) * work.key_elements * work.dtype_bytes
    if work.training and ranks > 1:
        backward_compute = compute / ranks - forward_compute
        gradients = link.seconds(work.key_elements * _FLOAT)
        # the first step and the last have half of a rank's own block each, those between a transfer of keys and one of sums
        between = max(0.0, forward_step + gradients - backward_compute) * (ranks - 2)
        exposed += between + max(0.0, forward_step - backward_compute / 2) + max(0.0, gradients - backward_compute / 2)
        seconds += (ranks - 1) * (forward_step + gradients)
        sent += (ranks - 1) * work.key_elements * (work.dtype_bytes + _FLOAT)
    return Estimate("ring", sent, compute, seconds, exposed, work.flops / device.matrix_rate)


def ulysses(work: Workload, link: Link, device: Device) -> Estimate:
    """All-to-alls of q, k, v and out, each one's share for the others, and of their gradients; nothing hides them."""
    away = (work.num_ranks - 1) / work.num_ranks
    sent = away * (work.key_elements + work.query_elements) * work.dtype_bytes * (2 if work.training else 1)
    seconds = link.seconds(sent, (10 if work.training else 5) if work.num_ranks > 1 else 0)
    alone = work.flops / device.matrix_rate
    return Estimate("ulysses", sent, alone / work.num_ranks, seconds, seconds, alone)


def decode_speedup(kv_bytes: float, rows: int, num_heads: int, head_dim_v: int, num_ranks: int, link: Link, device: Device) -> float:
    """Of decode over a cut cache, over one GPU: reading ``kv_bytes`` is shared, the exchange and merge of ``rows`` queries are added."""
    alone = kv_bytes / device.bandwidth + device.launch_us * 1e-6
    how = explain_exchange(rows, num_heads, head_dim_v, num_ranks, link=link)
    exchange_s = how.gather_s if how.kind == "gather" else how.scatter_s
    merging = _MERGE_LAUNCHES * device.launch_us * 1e-6 if num_ranks > 1 else 0.0
    return alone / (kv_bytes / num_ranks / device.bandwidth + device.launch_us * 1e-6 + (exchange_s if num_ranks > 1 else 0.0) + merging)


def _pairs(band: Band, seqlen_q: int, seqlen_k: int) -> int:
    """Pairs that a band leaves, by areas: exact to the triangles at its ends."""
    offset = seqlen_k - seqlen_q
    return _below(seqlen_q, seqlen_k, None if band.right is None else offset + band.right + 1) - (
        0 if band.left is None else _below(seqlen_q, seqlen_k, offset - band.left)
    )


def _below(seqlen_q: int, seqlen_k: int, first: int | None) -> int:
    """The sum over queries i of min(max(first + i, 0), seqlen_k); all keys where ``first`` is None."""
    if first is None:
        return seqlen_q * seqlen_k
    begin, full = min(seqlen_q, max(0, -first)), min(seqlen_q, max(0, seqlen_k - first))
    rising = max(0, full - begin)
    return rising * (2 * first + begin + full - 1) // 2 + (seqlen_q - max(full, begin)) * seqlen_k


def _last_shards_flops(work: Workload) -> float:
    """Of the rank that has the last chunk of each sequence."""
    pairs = 0
    for n_q, n_k in zip(work.seqlens_q, work.seqlens_k):
        rows = n_q - (work.num_ranks - 1) * n_q // work.num_ranks
        pairs += _pairs(work.band, rows, n_k)
    return work.flops * (work.batch * pairs / work.pairs) if work.pairs else 0.0
