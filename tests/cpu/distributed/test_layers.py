"""A layer trains over several ranks as on one: beside FSDP2, under torch.compile, and with DTensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flashtile.testing.distributed_models import check_dtensors, check_layer
from flashtile.testing.ranks import Ranks


@pytest.mark.parametrize("how", ["fsdp", "compiled"])
def test_gradients_of_weights_are_those_of_one_process(ranks_of: Callable[[int], Ranks], how: str) -> None:
    ranks_of(2).run(check_layer, how)


@pytest.mark.parametrize(("size", "placed"), [(2, (1,)), (2, (2,)), (4, (0, 1)), (4, (1, 2))])
def test_dtensors_in_dtensors_out(ranks_of: Callable[[int], Ranks], size: int, placed: tuple[int, ...]) -> None:
    ranks_of(size).run(check_dtensors, placed)
