"""Link: how fast ranks send to each other. Figures are what transfers reach, a direction and GPU, not what a datasheet promises."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """``bandwidth`` in bytes/s of one GPU in one direction, ``latency`` in seconds of one transfer or collective step."""

    name: str
    bandwidth: float
    latency: float

    def seconds(self, num_bytes: float, steps: int = 1) -> float:
        """One after the other: ``steps`` transfers, ``num_bytes`` in all."""
        return steps * self.latency + num_bytes / self.bandwidth


# NVLink of a Hopper GPU is 450 GB/s a direction, and an InfiniBand port 50; four fifths of either is what large transfers reach.
NVLINK = Link("NVLink", 360e9, 8e-6)
NETWORK_400G = Link("400 Gb/s", 40e9, 15e-6)
LINKS = {link.name: link for link in (NVLINK, NETWORK_400G)}
