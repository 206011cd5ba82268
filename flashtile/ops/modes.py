"""Modes of the caller's that do not reach a kernel, and would reach engines whose operations are torch's own."""

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
