"""Who takes part: a process group, or a device mesh of one dimension, seen from this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from flashtile.errors import ArgumentError, message


@dataclass(frozen=True)
class Members:
    """The ``size`` processes of ``group``, of which this one is number ``rank``."""

    group: Any
    rank: int
    size: int

    @property
    def following(self) -> int:
        """The next one on the ring, as all processes number it."""
        return int(dist.get_global_rank(self.group, (self.rank + 1) % self.size))

    @property
    def preceding(self) -> int:
        """The one before on the ring, as all processes number it."""
        return int(dist.get_global_rank(self.group, (self.rank - 1) % self.size))


def members_of(group: Any = None) -> Members:
    """The members of a ``ProcessGroup``, of a ``DeviceMesh`` of one dimension, or of all processes (None). Raises ArgumentError."""
    if not dist.is_available() or not dist.is_initialized():
        fix = "Call torch.distributed.init_process_group() first; torchrun sets what it needs."
        raise ArgumentError(message("group", "processes that know each other", "no process group", fix))
    if hasattr(group, "get_group"):
        if group.ndim != 1:
            names = group.mesh_dim_names
            fix = f"Pass one dimension of it, mesh[{names[-1]!r}] say." if names else "Name its dimensions and pass one of them."
            raise ArgumentError(message("group", "a DeviceMesh of one dimension", f"one of {group.ndim} dimensions", fix))
        group = group.get_group()
    group = dist.group.WORLD if group is None else group
    rank = dist.get_rank(group) if isinstance(group, dist.ProcessGroup) else -1
    if rank < 0:
        wanted = "a ProcessGroup or DeviceMesh that this process belongs to"
        raise ArgumentError(message("group", wanted, repr(group), "Processes outside do not call."))
    return Members(group, rank, dist.get_world_size(group))
