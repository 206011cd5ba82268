"""Groups of Gloo processes on this machine, started once and kept for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from flashtile.testing.ranks import Ranks


@pytest.fixture(scope="session")
def ranks_of() -> Iterator[Callable[[int], Ranks]]:
    """``ranks_of(n)``: n processes that run functions together."""
    started: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        if size not in started:
            started[size] = Ranks(size)
        return started[size]

    yield get
    for ranks in started.values():
        ranks.close()
