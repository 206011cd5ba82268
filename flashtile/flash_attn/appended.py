"""New keys and values of ``flash_attn_with_kvcache``, and rotary embeddings, on their way to `append_kv`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashtile.api import append_kv
from flashtile.errors import ArgumentError, message
from flashtile.flash_attn.attend import Scores
from flashtile.flash_attn.conventions import with_rows


class New(NamedTuple):
    """What is written to the cache before the call attends to it, as both generations name it; ``k`` None for nothing."""

    k: torch.Tensor | None
    v: torch.Tensor | None
    rotary_cos: torch.Tensor | None = None
    rotary_sin: torch.Tensor | None = None
    rotary_interleaved: bool = True
    cu_seqlens_k_new: torch.Tensor | None = None
    rotary_seqlens: torch.Tensor | None = None


def append(
    new: New,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seqlens_k: torch.Tensor,
    page_table: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int | None,
    scores: Scores,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, turned where there are tables, and the lengths from now on. The queries of full attention all stand at the first position."""
    if new.k is None or new.v is None:
        raise ArgumentError(message("k and v", "both or neither", "one of them", "Both caches grow by the same tokens."))
    local = scores.causal or any(side is not None and side >= 0 for side in scores.window_size)
    scales = {} if new.k.dtype == k_cache.dtype else {"k_scale": k_scale, "v_scale": v_scale}  # codes come as they are stored
    seqlens, turned = append_kv(
        k_cache, v_cache, with_rows(new.k), with_rows(new.v), seqlens_k, page_table=page_table, cu_seqlens_k_new=new.cu_seqlens_k_new,
        q=with_rows(q) if new.rotary_cos is not None else None, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
        rotary_cos=new.rotary_cos, rotary_sin=new.rotary_sin, rotary_seqlens=new.rotary_seqlens,
        rotary_interleaved=new.rotary_interleaved, queries_advance=local, **scales,
    )  # fmt: skip
    return q if turned is None else turned, seqlens


def check_new(new: New, cache_seqlens: object) -> bool:
    """Whether there is anything to append; raises ArgumentError for what makes no sense without it."""
    if new.k is not None or new.v is not None:
        if cache_seqlens is None:
            fix = "A cache without lengths is full, and has no room for new keys."
            raise ArgumentError(message("cache_seqlens", "the keys of each sequence so far, beside k and v", None, fix))
        return True
    for name in ("rotary_cos", "rotary_sin", "cu_seqlens_k_new", "rotary_seqlens"):
        if getattr(new, name) is not None:
            fix = "flashtile.flash_attn.layers.rotary turns tensors by themselves."
            raise ArgumentError(message(name, "None without new keys k and v", "a tensor", fix))
    return False
