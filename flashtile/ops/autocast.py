"""Under torch.autocast, attention takes tensors of the dtype that autocast wants, as torch's own attention does."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def cast_by_autocast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """q, k and v as autocast wants them, or None where they stay as they are.

    Within ``torch.autocast`` for q's device, q, k and v are cast to its dtype where one is float32 or their dtypes differ; 16-bit
    tensors of one dtype, and float64 ones, which are an error, stay. Sinks and slopes are float32 whatever autocast says.
    """
    tensors = isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)
    if not tensors or not _autocasts(q.device):
        return None
    wanted = torch.get_autocast_dtype(q.device.type)
    dtypes = {q.dtype, k.dtype, v.dtype}
    if dtypes == {wanted} or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        return None
    if len(dtypes) == 1 and torch.float32 not in dtypes:
        return None
    return q.to(wanted), k.to(wanted), v.to(wanted)


def taken_as_they_come(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether autograd does not follow a call with these arguments, nor autocast cast q, k and v, which have one dtype.

    False too where q, k or v is no tensor. It takes half a microsecond.
    """
    try:
        if torch.is_grad_enabled():
            if q.requires_grad or k.requires_grad or v.requires_grad:
                return False
            for tensor in others:
                if tensor is not None and tensor.requires_grad:
                    return False
        return q.dtype is not torch.float32 or not _autocasts(q.device)
    except AttributeError:
        return False


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """For operators and engines, which take their tensors as they come: what autocast wants is cast before."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device) else nullcontext()


def _autocasts(device: torch.device) -> bool:
    """Whether autocast is on; torch cannot be asked about devices that have none, nor, while it compiles, which have."""
    return device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type)
