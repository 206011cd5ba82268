"""What is sent, through torch.distributed alone: collectives on whatever backend the group has, and errors that say who and where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from flashtile.distributed.groups import Members
from flashtile.errors import CommunicationError

# torch has renamed it; the older name works still, and warns
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather(x: torch.Tensor, members: Members, what: str) -> torch.Tensor:
    """(num_ranks, *x.shape): everyone's contiguous x, all of one shape."""
    everyones = x.new_empty((members.size, *x.shape))
    if x.numel():
        with told(members, what):
            _ALL_GATHER(everyones.view(-1), x.view(-1), group=members.group)
    return everyones


def exchange(pieces: torch.Tensor, sent: Sequence[int], received: Sequence[int], members: Members, what: str) -> torch.Tensor:
    """Sends a piece of a flat tensor to each rank, ``sent`` elements each in their order, and returns what came, ``received`` of each."""
    room = pieces.new_empty(sum(received))
    if room.numel() or pieces.numel():
        with told(members, what):
            dist.all_to_all_single(room, pieces, list(received), list(sent), group=members.group)
    return room


class Flight:
    """Tensors on their way along the ring: sent to the following rank, while others arrive from the one before.

    Nothing that is on its way may be changed or read before ``land``.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], rooms: Sequence[torch.Tensor], members: Members, what: str) -> None:
        self.members, self.what = members, what
        self._held = (*tensors, *rooms)  # till they have landed
        ops = [dist.P2POp(dist.isend, x, members.following, members.group) for x in tensors if x.numel()]
        ops += [dist.P2POp(dist.irecv, x, members.preceding, members.group) for x in rooms if x.numel()]
        with told(members, what):
            self._works = dist.batch_isend_irecv(ops) if ops else []

    def land(self) -> None:
        """Waits; on a GPU the current stream does, and not the host."""
        with told(self.members, self.what):
            for work in self._works:
                work.wait()
        self._held = ()


@contextmanager
def told(members: Members, what: str) -> Iterator[None]:
    """Says of a failure which rank saw it, and in what."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CommunicationError(
            f"rank {members.rank} of {members.size}: {what} failed: {reason}. Another process has died, or did not get here within the "
            "group's timeout."
        ) from error
