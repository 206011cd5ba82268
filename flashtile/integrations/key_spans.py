"""Which keys a model's queries see, for transformers: what stands in the place of a mask.

Transformers asks once a forward pass, and hands the answer to the attention of each layer. Instead of a mask of queries x keys it gets
None, where shapes say it all, or one small int32 tensor of one of three kinds. Each has four dimensions, because transformers takes
such a tensor for a finished mask and passes it on.

* lengths, (1, 1, 1, batch): each sequence's only query sees that many keys, the first ones; or (1, 1, 2, batch), where the second row
  says how many of these are padding.
* chosen, (batch, 1, 1, 2 + kv_length): each sequence's only query sees chosen keys: their count, the row of the batch, and the
  places of all keys, the chosen ones first.
* spans, (1, 1, 4, sequences + 1): packed sequences. Where each one's queries start, in rows of the whole batch; in which row of the batch
  its keys are, and from which place; how many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flashtile.errors import UnsupportedError

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# The names of transformers' mask functions that are a band, or a band within packed sequences.
_BANDS = ("causal_mask_function", "bidirectional_mask_function", "and_mask")
_ELSE = 'Use attn_implementation="sdpa" or "eager" for this model.'


def causal_mask_function(batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return k <= q


def key_spans(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Transformers' mask interface. The host waits for the device only where there is padding, or rows are packed.

    Args:
        q_length, kv_length: queries and places of keys, of which the first is at position ``kv_offset``.
        q_offset: position of the first query; a tensor where only the device knows.
        mask_function: (batch, head, query, key) positions to whether the query sees the key.
        attention_mask: (batch, positions) bool, False for padding; None where there is none.
        local_size: the size of a sliding window or of a chunk.
        allow_is_causal_skip: False (among other reasons) where the mask function knows of packed sequences.
        use_vmap: the caller has added to the mask function.

    Returns:
        None where each query sees what the band says, the last query on the last key; else lengths, chosen or spans.

    Raises:
        UnsupportedError: several queries with a mask that is no band within one span of keys for each sequence.
    """
    causal = "allow_is_bidirectional_skip" not in kwargs
    # Keys that there are: places of a cache beyond them are empty.
    filled = q_offset + q_length - kv_offset if causal else kv_length
    if not isinstance(filled, torch.Tensor):
        filled = min(filled, kv_length)
    chunked = local_size is not None and local_size == getattr(config, "attention_chunk_size", None)
    chunked = chunked and (isinstance(filled, torch.Tensor) or filled + kv_offset > (local_size or 0))
    banded = not use_vmap and not chunked and getattr(mask_function, "__name__", "") in _BANDS
    if q_length == 1:
        if banded and attention_mask is None:
            return _same_lengths(batch_size, filled, device)[None, None, None]
        if banded and attention_mask is not None and _host_may_read(attention_mask):
            lengths = _after_padding(_visible_rows(attention_mask, kv_length, kv_offset), filled)
            if lengths is not None:
                return lengths
        return _chosen(batch_size, kv_length, q_offset, kv_offset, mask_function, attention_mask, device)
    if not banded:
        raise UnsupportedError(f"attention_mask: expected a causal or full mask or a sliding window, got another pattern. {_ELSE}")
    if attention_mask is not None:
        aligned = causal or local_size is not None
        spans = padded(_visible_rows(attention_mask, kv_length, kv_offset), q_length, filled, aligned)
        if spans is not None:
            return spans
    elif causal and not allow_is_causal_skip and isinstance(q_offset, int) and q_offset == 0 and kv_length == q_length:
        return _packed(batch_size, q_length, mask_function, device)
    if not isinstance(filled, torch.Tensor) and filled == kv_length:
        return None
    return whole_rows(batch_size, q_length, _same_lengths(batch_size, filled, device))


def _same_lengths(batch_size: int, length: int | torch.Tensor, device: torch.device | str) -> torch.Tensor:
    if isinstance(length, torch.Tensor):
        return length.to(torch.int32).reshape(1).repeat(batch_size)
    return torch.full((batch_size,), length, dtype=torch.int32, device=device)


def _lengths(*rows: torch.Tensor) -> torch.Tensor:
    return torch.stack([row.to(torch.int32) for row in rows])[None, None]


def _host_may_read(x: torch.Tensor) -> bool:
    return not torch.compiler.is_compiling() and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _after_padding(visible: torch.Tensor, filled: int | torch.Tensor) -> torch.Tensor | None:
    """Lengths where each row of ``visible``, (batch, kv_length) bool, has all its keys behind its padding, and None elsewhere."""
    first, last, counts = _ends(visible, filled)
    behind, unpadded = torch.stack([((last == filled) & (last - first == counts)).all(), (first == 0).all()]).tolist()
    if not behind:
        return None
    return _lengths(last) if unpadded else _lengths(last, first)


def whole_rows(batch_size: int, q_length: int, lengths: torch.Tensor, first: torch.Tensor | None = None) -> torch.Tensor:
    """Spans where each row of the batch is one sequence with all its queries. ``lengths`` and ``first``: (batch,) of keys."""
    rows = torch.arange(batch_size + 1, dtype=torch.int32, device=lengths.device)
    first = torch.zeros_like(lengths) if first is None else first
    return _spans(rows * q_length, rows, _with_end(first), _with_end(lengths))


def _spans(starts: torch.Tensor, rows: torch.Tensor, places: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return torch.stack([column.to(torch.int32) for column in (starts, rows, places, lengths)])[None, None]


def _with_end(values: torch.Tensor, end: int = 0) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, 1), value=end)


def _visible_rows(attention_mask: torch.Tensor, kv_length: int, kv_offset: int) -> torch.Tensor:
    """(batch, kv_length): the padding mask of the places of keys; what lies beyond it is padding."""
    rows = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    return torch.nn.functional.pad(rows, (0, kv_length - rows.shape[1]))


def _chosen(
    batch_size: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int,
    mask_function: MaskFunction,
    attention_mask: torch.Tensor | None,
    device: torch.device | str,
) -> torch.Tensor:
    """Any mask of one query: the places that it sees, in order."""
    rows = torch.arange(batch_size, device=device)
    places = torch.arange(kv_length, device=device)
    query = torch.zeros((1, 1), dtype=torch.int64, device=device) + q_offset
    seen = mask_function(rows[:, None], torch.zeros_like(query), query, places[None, :] + kv_offset)
    visible = seen.expand(batch_size, kv_length)
    if attention_mask is not None:
        visible = visible & _visible_rows(attention_mask, kv_length, kv_offset)
    return chosen_of(visible)[:, None, None, :]


def chosen_of(visible: torch.Tensor) -> torch.Tensor:
    """(batch, kv_length) bool as (batch, 2 + kv_length) int32: count, row, and all places, the visible ones first and in order."""
    batch_size, kv_length = visible.shape
    rows, places = (torch.arange(count, device=visible.device) for count in (batch_size, kv_length))
    order = torch.where(visible, places, places + kv_length).argsort(dim=-1)
    counts = visible.sum(dim=-1, keepdim=True)
    return torch.cat([counts, rows[:, None], order], dim=-1).to(torch.int32)


def padded(visible: torch.Tensor, q_length: int, filled: int | torch.Tensor, aligned: bool) -> torch.Tensor | None:
    """Spans of rows that begin or end with padding; None where there turns out to be none. Raises UnsupportedError for gaps.

    ``visible`` is (batch, kv_length) bool. ``aligned``: queries stand on keys, the last one at place ``filled - 1``, and those that are
    padding are sequences of their own that see nothing. Otherwise all queries of a row see the same keys.
    """
    first, last, counts = _ends(visible, filled)
    in_one_piece = (last - first == counts).all()
    if not _host_may_read(visible):
        torch._assert_async(in_one_piece, "several queries of a row with gaps between its keys")
    else:
        in_order, full = torch.stack([in_one_piece, (counts == filled).all()]).tolist()
        if full:
            return None
        if not in_order:
            raise UnsupportedError(f"attention_mask: expected each row's padding at its ends, got gaps between its keys. {_ELSE}")
    batch_size = visible.shape[0]
    if not aligned:
        return whole_rows(batch_size, q_length, counts, first)
    skipped = filled - q_length  # places before the first query's
    own = torch.stack([torch.zeros_like(first), first - skipped, last - skipped], dim=-1).clamp(0, q_length)
    rows = torch.arange(batch_size, device=visible.device)
    starts = (own + rows[:, None] * q_length).flatten()
    lengths = torch.stack([torch.zeros_like(counts), counts, torch.zeros_like(counts)], dim=-1).flatten()
    spots = torch.stack([torch.zeros_like(first), first, last], dim=-1).flatten()
    return _spans(
        _with_end(starts, batch_size * q_length), _with_end(rows.repeat_interleave(3), batch_size), _with_end(spots), _with_end(lengths)
    )


def _ends(visible: torch.Tensor, filled: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(batch,) each: the first visible place before ``filled``, the place after the last, and how many there are; 0 where none is."""
    places = torch.arange(visible.shape[1], device=visible.device)
    visible = visible & (places < filled)
    counts = visible.sum(dim=-1)
    first = torch.where(visible, places, visible.shape[1]).amin(dim=-1).where(counts > 0, 0)
    return first, torch.where(visible, places + 1, 0).amax(dim=-1), counts


def _packed(batch_size: int, q_length: int, mask_function: MaskFunction, device: torch.device | str) -> torch.Tensor | None:
    """Spans of sequences that are packed into rows; None where each row is one. A token begins one if it does not see the one before."""
    rows = torch.arange(batch_size, device=device)[:, None]
    places = torch.arange(1, q_length, device=device)[None, :]
    joined = mask_function(rows, torch.zeros_like(rows), places, places - 1).expand(batch_size, q_length - 1)
    starts = torch.nn.functional.pad(~joined, (1, 0), value=True).flatten().nonzero().flatten()
    if starts.shape[0] == batch_size:
        return None
    lengths = torch.diff(starts, append=starts.new_full((1,), batch_size * q_length))
    return _spans(
        _with_end(starts, batch_size * q_length),
        _with_end(starts // q_length, batch_size),
        _with_end(starts % q_length),
        _with_end(lengths),
    )
