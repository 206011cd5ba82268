"""The key of a backward call."""

from __future__ import annotations

import torch

from flashtile.facts.features import Key
from flashtile.facts.forward import forward_key
from flashtile.rounding import alignment_of


def backward_key(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    dout: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    seqused_k: torch.Tensor | None,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    softcap: float,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    allow_tf32: bool,
    deterministic: bool,
    dropout: bool = False,
) -> Key | None:
    """The key of one call: that of its forward call, how out and the gradients are aligned, and ``deterministic``.

    None where it is checked each time.
    """
    key = forward_key(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, seqused_k, causal, window, softcap,
        sinks, alibi_slopes, dout, None, None, allow_tf32, True, dropout,
    )  # fmt: skip
    return None if key is None else (*key, alignment_of(dq, dk, dv, out), deterministic)
