"""torch's scaled_dot_product_attention, sent here.

    with flashtile.integrations.sdpa.routed():
        model(x)

sends each call of ``torch.nn.functional.scaled_dot_product_attention`` in the block here, whoever makes it in Python, in eager mode and
under ``torch.compile``. What flashtile cannot take as it is goes to torch, which a warning says once for each reason.

The block does not see calls that C++ makes by itself (``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` have such a way, for
inference), those of a compiled graph that was made outside, and, while compiling, those within ``F.multi_head_attention_forward``. It does
not look at torch's own choice of a backend (``torch.nn.attention.sdpa_kernel``). A mode is asked about every torch function in its block,
which takes a microsecond or two each: where that counts, compile the model, or call `scaled_dot_product_attention` itself.

`register_flash_implementation` is the other way, from below: torch's own calls, and C++'s, by flashtile's kernels on CUDA.
"""

from __future__ import annotations

import math
import warnings
import weakref
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from flashtile.errors import UnsupportedError
from flashtile.flash_attn.conventions import cut, scale_for
from flashtile.integrations.attend import Scores, chosen, dense, is_inference, rows_before_heads, spanned
from flashtile.integrations.flash_backend import register_flash_implementation
from flashtile.integrations.key_spans import chosen_of, padded

__all__ = ["Routed", "register_flash_implementation", "routed", "scaled_dot_product_attention"]

_SAID: set[str] = set()
_MAX_HEAD_DIM = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch's function of this name, with its arguments, layout and alignment: a causal mask begins at the first query and the first key.

    Args:
        query: (..., heads, seqlen_q, head_dim); key and value (..., heads_kv, seqlen_k, ...), with query's leading dimensions.
        attn_mask: None, or bool with one row of keys for all heads and queries of a sequence, (..., 1, 1, seqlen_k) or expanded from that:
            True for keys that are there. Of several queries' keys those that are there lie in one piece. Such a mask is read once on
            the host, where it comes with several queries. Every other mask is torch's.
        dropout_p, is_causal, scale, enable_gqa: as for torch's function. The seed of dropout is flashtile's, and so is what it drops.

    Returns:
        (..., heads, seqlen_q, head_dim_v), with heads after queries in memory.
    """
    reason = _why_not(query, key, value, attn_mask, is_causal, enable_gqa)
    if reason:
        return _by_torch(reason, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    lead, seqlen_q = query.shape[:-3], query.shape[-2]
    # Keys beyond the last query are seen by none; without them the triangle ends where flashtile's does, or begins with keys.
    if is_causal and key.shape[-2] > seqlen_q:
        key, value = key[..., :seqlen_q, :], value[..., :seqlen_q, :]
    window = (None, seqlen_q - key.shape[-2]) if is_causal else None
    scores = Scores(False, window, 0.0, scale_for(query, scale), None)
    q, k, v = rows_before_heads(*(x.reshape(math.prod(lead), *x.shape[-3:]) for x in (query, key, value)))
    if attn_mask is None:
        out = dense(q, k, v, scores, dropout_p)
    else:
        visible = _rows_of_keys(attn_mask, lead, key.shape[-2])
        if seqlen_q == 1 and is_inference(dropout_p, query, key, value):
            out = chosen(q, k, v, chosen_of(visible), scores)
        else:
            try:
                spans = _spans(attn_mask, visible, seqlen_q)
            except UnsupportedError:
                reason = "a mask with gaps between keys"
                return _by_torch(reason, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
            out = dense(q, k, v, scores, dropout_p) if spans is None else spanned(q, k, v, spans[0, 0], scores, dropout_p)
    return cut(out, value.shape[-1]).transpose(1, 2).view(*lead, query.shape[-3], seqlen_q, value.shape[-1])


def _why_not(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None, is_causal: bool, enable_gqa: bool
) -> str:
    """Why torch has to take this call; empty where flashtile can. Wrong calls are torch's, whose complaint is the right one."""
    tensors = (query, key, value)
    if not all(type(x) in (torch.Tensor, torch.nn.Parameter) for x in tensors) or any(x.is_nested for x in tensors):
        return "tensors of a subclass or nested ones"
    if any(x.device.type not in ("cpu", "cuda") or x.dtype not in _DTYPES for x in tensors):
        return f"{query.dtype} on {query.device.type}"
    if not query.dtype == key.dtype == value.dtype and not torch.is_autocast_enabled(query.device.type):
        return "dtypes that differ"
    if query.ndim < 3 or key.ndim != query.ndim or value.ndim != query.ndim or not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        return "leading dimensions that differ, or none"
    if max(query.shape[-1], value.shape[-1]) > _MAX_HEAD_DIM:
        return f"a head dim beyond {_MAX_HEAD_DIM}"
    heads, heads_kv = query.shape[-3], key.shape[-3]
    if heads != heads_kv and not (enable_gqa and heads_kv and heads % heads_kv == 0):
        return "numbers of heads that do not go together"
    if key.shape[-2] != value.shape[-2] or query.shape[-1] != key.shape[-1] or value.shape[-3] != heads_kv:
        return "shapes that do not go together"
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return "torch.func or forward-mode differentiation"
    if not torch.compiler.is_compiling() and any(x.is_neg() for x in tensors):  # compiled calls get them resolved
        return "views of negatives"
    return "" if attn_mask is None else _why_not_mask(query, key, attn_mask, is_causal)


def _why_not_mask(query: torch.Tensor, key: torch.Tensor, attn_mask: torch.Tensor, is_causal: bool) -> str:
    if is_causal:
        return "a mask beside is_causal"
    if attn_mask.dtype != torch.bool:
        return "a mask that is added to scores"
    one_row = all(attn_mask.shape[dim] == 1 or attn_mask.stride(dim) == 0 for dim in (-3, -2) if attn_mask.ndim >= -dim)
    if not one_row or not 2 <= attn_mask.ndim <= query.ndim or attn_mask.shape[-1] != key.shape[-2]:
        return "a mask of queries x keys or of heads"
    if query.shape[-2] > 1 and (torch.compiler.is_compiling() or _is_capturing(query)):
        return "a mask where the host cannot read it"
    return ""


def _is_capturing(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _rows_of_keys(attn_mask: torch.Tensor, lead: torch.Size, seqlen_k: int) -> torch.Tensor:
    """(batch, seqlen_k) bool: one row of the mask for each sequence."""
    rows = attn_mask
    for dim in (-3, -2):
        if rows.ndim >= -dim:
            rows = rows.narrow(dim, 0, 1)
    rows = rows.reshape(*rows.shape[:-3], seqlen_k)
    return rows.expand(*lead, seqlen_k).reshape(math.prod(lead), seqlen_k)


_Last = tuple["weakref.ref[torch.Tensor]", tuple[object, ...], torch.Tensor | None]
_last: _Last | None = None  # of the last mask that was read: the layers of a model get the same one


def _spans(attn_mask: torch.Tensor, visible: torch.Tensor, seqlen_q: int) -> torch.Tensor | None:
    """Which keys each sequence has, from the host's look at the mask; None where all. Raises UnsupportedError for gaps."""
    global _last
    if attn_mask.is_inference():  # whether it has changed cannot be known
        return padded(visible, seqlen_q, visible.shape[1], aligned=False)
    last, facts = _last, (visible.shape, seqlen_q, attn_mask._version)  # another thread may replace _last meanwhile
    if last is not None and last[0]() is attn_mask and last[1] == facts:
        return last[2]
    spans = padded(visible, seqlen_q, visible.shape[1], aligned=False)
    _last = (weakref.ref(attn_mask), facts, spans)
    return spans


def _by_torch(reason: str, *args: Any) -> torch.Tensor:
    if not torch.compiler.is_compiling() and reason not in _SAID:
        _SAID.add(reason)
        warnings.warn(f"scaled_dot_product_attention is left to torch: {reason}.", stacklevel=4)
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa = args
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _with_ours(function: Any) -> Any:
    """A function of torch.nn.functional that finds ours where it looks for scaled_dot_product_attention."""
    names = {**function.__globals__, "scaled_dot_product_attention": scaled_dot_product_attention}
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)


# About this function torch asks a mode as a whole, and not about what it calls.
_MULTI_HEAD = _with_ours(F.multi_head_attention_forward)


class Routed(TorchFunctionMode):
    """The mode that `routed` returns. May be entered again, and within itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return scaled_dot_product_attention(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward and not torch.compiler.is_compiling():
            return _MULTI_HEAD(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def routed() -> Routed:
    """A context in which torch's scaled_dot_product_attention is flashtile's."""
    return Routed()
