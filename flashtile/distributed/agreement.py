"""One cheap check ahead of a call: that all ranks make the same call, on shards that fit. Where not, every rank raises."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from flashtile.distributed.groups import Members
from flashtile.distributed.transport import gather, told
from flashtile.errors import ArgumentError, AttentionError, message


def agree(facts: Mapping[str, object], complaint: AttentionError | None, members: Members, device: torch.device) -> None:
    """Returns if ``facts`` are equal on all ranks and none has a complaint; else raises on each.

    One gather of 32 bytes a rank, after which the host waits for it; what differs is fetched only where something does. A rank with
    a ``complaint`` about its arguments raises that, the others an ArgumentError that names it.
    """
    known = {name: repr(value) for name, value in facts.items()}
    digest = hashlib.sha256(repr((None if complaint is None else str(complaint), sorted(known.items()))).encode()).digest()
    words = torch.frombuffer(bytearray(digest), dtype=torch.int64).to(device)
    everyones = gather(words, members, "the check that all ranks make the same call").tolist()
    if complaint is None and all(other == everyones[0] for other in everyones):
        return
    if all(other == everyones[0] for other in everyones):
        raise complaint  # type: ignore[misc]  # everyone has the same one
    reports: list[Any] = [None] * members.size
    with told(members, "the exchange of what differs"):
        dist.all_gather_object(reports, (None if complaint is None else str(complaint), known), group=members.group)
    if complaint is not None:
        raise complaint
    for rank, (others, _) in enumerate(reports):
        if others is not None:
            raise ArgumentError(f"rank {rank}: {others} So rank {members.rank} does not begin either.")
    for name in known:
        values = [report[1].get(name, "nothing") for report in reports]
        if len(set(values)) > 1:
            shown = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
            raise ArgumentError(message(name, "the same on every rank", shown, "Nothing has been sent yet."))
    raise ArgumentError(message("group", "ranks that make the same call", "calls of different kinds", "Nothing has been sent yet."))
