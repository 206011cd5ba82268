"""The paper model's table of docs/several-gpus.md: ``python -m benchmarks.distributed_paper``."""

from __future__ import annotations

from flashtile.distributed import LINKS, Estimate, Link, Workload, choose, decode_speedup
from flashtile.planner.device import Device

RANKS = (8, 64, 512)
TOKENS, CACHED = 16384, 131072  # of each rank: in training, and in the cache that decode reads
HEADS_Q, HEADS_KV, HEAD_DIM = 32, 8, 128


def table() -> str:
    """Markdown, a row a link and number of ranks: an H200 each, heads 32/8 x 128 in 16 bits, a causal mask in zig-zag order."""
    head = (
        "link",
        "ranks",
        "tokens",
        "ring, forward",
        "ring, with gradients",
        "all-to-all, with gradients",
        "keys",
        "decode of 1",
        "of 64",
    )
    rows = [head, ("---",) * len(head)]
    device = Device.named("h200")
    for link in LINKS.values():
        for ranks in RANKS:
            forward, training = (_estimates(ranks, link, device, gradients) for gradients in (False, True))
            decodes = (f"{_decode(ranks, rows_, link, device):.0f}x" for rows_ in (1, 64))
            rows.append((link.name, str(ranks), f"{ranks * TOKENS:,}", _cell(forward["ring"]), _cell(training["ring"]),
                         _cell(training.get("ulysses")), f"{ranks * CACHED:,}", *decodes))  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _estimates(ranks: int, link: Link, device: Device, training: bool) -> dict[str, Estimate]:
    work = Workload(ranks, HEADS_Q, HEADS_KV, (ranks * TOKENS,), head_dim=HEAD_DIM, training=training)
    return {estimate.method: estimate for estimate in choose(work, link, device).estimates}


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "too few key heads"
    return f"{estimate.bytes_sent / 1e9:.3g} GB, {estimate.overlap:.0%} hidden, {estimate.speedup:.1f}x"


def _decode(ranks: int, batch: int, link: Link, device: Device) -> float:
    num_bytes = 2.0 * batch * ranks * CACHED * HEADS_KV * HEAD_DIM * 2
    return decode_speedup(num_bytes, batch, HEADS_Q, HEAD_DIM, ranks, link, device)


if __name__ == "__main__":
    print(table())
