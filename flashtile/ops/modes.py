"""What torch's own operations and kernels differ in: modes of the caller's, which do not reach a kernel, and notes of what is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from flashtile.ops.autocast import without_autocast


@contextmanager
def apart_from_callers_modes(device: torch.device) -> Iterator[None]:
    """No operation that autograd would follow, or autocast give other dtypes; tensors without a device of their own lie on ``device``."""
    with torch.no_grad(), without_autocast(device), nullcontext() if torch.get_default_device() == device else device:
        yield


def note_written(*tensors: torch.Tensor) -> None:
    """Tells autograd that tensors were changed in place, which it does not see a kernel do: who saved one for gradients gets an error.

    It takes half a microsecond; calls that are made for each token and layer only make it where gradients are enabled.
    """
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
