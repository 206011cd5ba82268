"""What tests of calls that are repeated share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cpu.kernels.fake_gpu import FakeGpu


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    from tests.cpu.kernels.fake_gpu import FakeGpu  # not where Triton is missing

    return FakeGpu(monkeypatch)
