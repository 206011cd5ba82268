"""The benchmarks' clocks of the host."""

from __future__ import annotations

import pytest
import torch

from benchmarks import timing


def test_host_times_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that two contestants are compared in the same stretches of a host that is slow now and then."""
    called: list[str] = []
    sets: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: called.append("|"))
    fns = {name: lambda i, name=name: (called.append(name), sets.append(i)) for name in "ab"}  # type: ignore[misc]
    times = timing.host_times(fns, 3, batches=2, calls=4)
    assert "".join(called) == "aaaaabbbbb" + "|aaaa|bbbb" * 2 + "|"
    assert set(sets) == {0, 1, 2}
    assert {name: len(timed.samples) for name, timed in times.items()} == {"a": 2, "b": 2}
    assert timing.host_time(fns["a"], 1, batches=3, calls=1).median_us > 0
