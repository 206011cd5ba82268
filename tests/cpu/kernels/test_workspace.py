"""Scratch for partial results: kept for a thread and stream, never shared between two, and a graph's own while it is captured."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

launch = pytest.importorskip("flashtile.kernels.launch", exc_type=ImportError)
GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """A GPU whose memory is the host's; ``capturing`` says whether its stream is being captured."""
    state = {"capturing": False}
    empty = torch.empty

    def on_the_host(*sizes: Any, device: torch.device, **options: Any) -> torch.Tensor:
        return empty(*sizes, **options)

    monkeypatch.setattr(torch, "empty", on_the_host)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: state["capturing"], raising=False)
    monkeypatch.setattr(launch, "_SCRATCH", launch._Scratch())
    return state


def test_a_stream_of_a_thread_keeps_its_buffer(gpu: dict[str, bool]) -> None:
    first = launch.workspace(1000, GPU, 7)
    assert launch.workspace(10, GPU, 7) is first
    assert launch.workspace(10, GPU, 8) is not first
    assert launch.workspace(10, torch.device("cuda", 1), 7) is not first


def test_a_larger_need_gets_a_larger_buffer(gpu: dict[str, bool]) -> None:
    launch.workspace(10, GPU, 7)
    larger = launch.workspace(1000, GPU, 7)
    assert larger.numel() >= 1000
    assert larger.dtype == torch.float32
    assert launch.workspace(900, GPU, 7) is larger


def test_another_thread_has_its_own(gpu: dict[str, bool]) -> None:
    mine = launch.workspace(10, GPU, 7)
    theirs: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: theirs.append(launch.workspace(10, GPU, 7)))
    thread.start()
    thread.join()
    assert theirs[0] is not mine


def test_what_is_captured_gets_memory_of_its_own(gpu: dict[str, bool]) -> None:
    kept = launch.workspace(10, GPU, 7)
    gpu["capturing"] = True
    captured = [launch.workspace(10, GPU, 7) for _ in range(2)]
    assert len({tensor.data_ptr() for tensor in (kept, *captured)}) == 3
    gpu["capturing"] = False
    assert launch.workspace(10, GPU, 7) is kept


def test_large_needs_are_not_kept(gpu: dict[str, bool]) -> None:
    first = launch.workspace(launch.KEPT_FLOATS + 1, GPU, 7)
    assert launch.workspace(launch.KEPT_FLOATS + 1, GPU, 7) is not first
    assert not launch._SCRATCH.buffers
