"""What FlashAttention's functions take and flashtile has no counterpart for: refused with the reason, never ignored."""

from __future__ import annotations

import torch

from flashtile.errors import UnsupportedError, message

_SCALES = "Scales belong to float8 tensors, which no kernel reads yet: multiply them into 16-bit ones."
_WHY = {
    "qv": "Latent attention with a query of its own for values has no kernel yet.",
    "q_descale": _SCALES,
    "k_descale": _SCALES,
    "v_descale": _SCALES,
    "attention_chunk": "A mask of chunks is none of the masks that kernels know: causal, and windows around each query.",
    "sm_margin": "No kernel leaves SMs free on request.",
    "leftpad_k": "Keys begin where their sequence does; flash_attn_with_kvcache knows left padding.",
}


def check_supported(function: str, **given: object) -> None:
    """Raises UnsupportedError for the first argument that is given: that is neither None, False nor 0, by which each is left out."""
    for name, value in given.items():
        if value is None or value is False or (value.__class__ is int and value == 0):
            continue
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
        raise UnsupportedError(message(f"{function}: {name}", "it left out", got, _WHY[name]))


def check_splits(function: str, num_splits: int) -> None:
    """Raises UnsupportedError where the keys of whole sequences are to be cut into several parts."""
    if num_splits not in (0, 1):
        why = "Attention of whole sequences is never split over keys; flash_attn_with_kvcache is."
        raise UnsupportedError(message(f"{function}: num_splits", "0 or 1", repr(num_splits), why))
