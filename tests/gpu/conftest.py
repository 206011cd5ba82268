"""Tests that need a GPU: without one, each is skipped and says why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def _missing() -> str:
    """Why kernels cannot run on a GPU in this process; empty where they can."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter is on in this process: run tests/gpu by itself"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _missing()
    if not reason:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The current CUDA device; freed memory goes back after each test, since other workers share it."""
    yield torch.device("cuda", torch.cuda.current_device())
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
