"""Attention of a transformers module: what the model passes, as a call of `decode`, `attention` or `attention_varlen`.

A single query of each sequence goes to `decode`, and so do few queries over many keys; more queries go to `attention`, or packed to
`attention_varlen` where sequences are padded, packed or shorter than their cache. Keys stay where the model's cache has them.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from flashtile.api import attention_varlen, decode
from flashtile.errors import ShapeError, UnsupportedError, message
from flashtile.flash_attn.conventions import cut, scale_for
from flashtile.integrations.attend import Scores, chosen, dense, is_inference, rows_before_heads, spanned
from flashtile.integrations.key_spans import whole_rows

_NOT_HERE = ("position_bias", "head_mask", "cache")


def module_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface.

    Args:
        query: (batch, heads, q_length, head_dim); key and value (batch, kv_heads, kv_length, ...).
        attention_mask: what `key_spans` returned.
        sliding_window: a query sees its own key and ``sliding_window - 1`` before it; without a causal mask as many after it.
        is_causal: by default as the module says.
        s_aux: (heads,) sinks.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed sequences in a batch of one row, in `attention_varlen`'s terms.

    Returns:
        (batch, q_length, heads, head_dim), and None in the place of attention weights.

    Raises:
        UnsupportedError: a mask of the caller's own, a position bias, transformers' paged cache, or a single query over keys with
            gaps where a gradient or dropout is wanted.
    """
    _refuse(kwargs)
    causal = _is_causal(module) if is_causal is None else bool(is_causal)
    window = None if sliding_window is None else (sliding_window - 1, None if causal else sliding_window - 1)
    sinks = None if s_aux is None else s_aux.float()
    q, k, v = rows_before_heads(query, key, value)
    scores = Scores(causal, window, softcap or 0.0, scale_for(query, scaling), sinks)
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        out = _packed(q, k, v, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, scores, dropout)
    elif attention_mask is None:
        out = dense(q, k, v, scores, dropout)
    elif attention_mask.dtype != torch.int32 or attention_mask.ndim != 4:
        raise UnsupportedError(
            "attention_mask: expected None or (batch, positions) where the model is called, got a mask of queries x keys. "
            'Use attn_implementation="sdpa" or "eager" for it.'
        )
    elif attention_mask.shape[2] == 4:
        out = spanned(q, k, v, attention_mask[0, 0], scores, dropout)
    elif attention_mask.shape == (1, 1, 1, q.shape[0]):
        out = _one_query(q, k, v, attention_mask.view(-1), None, scores, dropout)
    elif attention_mask.shape[2] == 2:
        out = _one_query(q, k, v, attention_mask[0, 0, 0], attention_mask[0, 0, 1], scores, dropout)
    elif is_inference(dropout, query, key, value, sinks):
        out = chosen(q, k, v, attention_mask[:, 0, 0], scores)
    else:
        raise UnsupportedError("attention_mask: a single query over keys with gaps has no gradient and no dropout. Pass several queries.")
    return cut(out, value.shape[-1]), None


def _one_query(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    padding: torch.Tensor | None,
    scores: Scores,
    dropout: float,
) -> torch.Tensor:
    """Of each sequence over its first keys, of which the first are ``padding``; both (batch,) int32."""
    if is_inference(dropout, q, k, v, scores.sinks):
        return decode(q, k, v, lengths, leftpad_k=padding, **scores._asdict())
    spans = whole_rows(q.shape[0], 1, lengths if padding is None else lengths - padding, padding)
    return spanned(q, k, v, spans[0, 0], scores, dropout)


def _refuse(kwargs: dict[str, Any]) -> None:
    for name in _NOT_HERE:
        if name in kwargs and kwargs[name] is not None:
            raise UnsupportedError(f'{name}: expected None, got a value. Use attn_implementation="sdpa" or "eager" for this model.')
    if kwargs.get("output_attentions"):
        warnings.warn('output_attentions: attention weights are never computed. Use attn_implementation="eager".', stacklevel=3)


def _is_causal(module: torch.nn.Module) -> bool:
    return bool(getattr(module, "is_causal", True)) and getattr(getattr(module, "config", None), "is_causal", True) is not False


def _packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts_q: torch.Tensor,
    starts_k: torch.Tensor,
    longest_q: int | None,
    longest_k: int | None,
    scores: Scores,
    dropout: float,
) -> torch.Tensor:
    """Sequences where the caller says they start; a longest one that is not given, or lies on the device, is all there is room for."""
    if q.shape[0] != 1:
        raise ShapeError(message("cu_seq_lens_q", "a batch of one row", f"{q.shape[0]} rows", "Pack all sequences into one row."))
    out = attention_varlen(
        q[0], k[0], v[0], starts_q.to(torch.int32), starts_k.to(torch.int32),
        longest_q if isinstance(longest_q, int) else q.shape[1], longest_k if isinstance(longest_k, int) else None,
        dropout_p=dropout, **scores._asdict(),
    )  # fmt: skip
    return out[None]
