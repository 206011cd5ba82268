"""What a computation holds in memory at once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


class LargestResult(TorchDispatchMode):
    """Notes the most elements that any operation inside returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return result


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that torch's allocator for ``device`` had given out at once during ``run()``, beyond those before it.

    What ``run`` returns is alive until the end, and counts. On a CPU that includes what torch's own kernels allocate for
    themselves; on a GPU it waits for the device.
    """
    gc.collect()  # or cycles of earlier tensors would be let go meanwhile
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = run()
        torch.cuda.synchronize(device)
        del results
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = run()
    del results
    traced = profiler.profiler.kineto_results.events()
    held = most = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in traced if event.name() == "[memory]"):
        held += size
        most = max(most, held)
    return most
