"""What a Problem keeps of lengths and addresses: so much that neighbouring calls are one problem."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def length_bucket(length: int) -> int:
    """Rounds a number of keys up to one of eight steps an octave (at least 64 keys a step), so that growth rarely replans."""
    if length <= 0:
        return 0
    shift = (length - 1).bit_length() - 4
    if shift < 6:
        shift = 6
    return ((length - 1 >> shift) + 1) << shift


def query_bucket(length: int) -> int:
    """Rounds a number of queries up to one of eight steps an octave; up to 16 every number is its own step."""
    shift = (length - 1).bit_length() - 4
    return length if shift <= 0 else ((length - 1 >> shift) + 1) << shift


def alignment_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None = None) -> int:
    """The largest power of two, at most 16, that divides every address and outer stride in bytes.

    0 where a last dimension is not contiguous, or memory holds the negatives: such tensors have no kernel. All have rank 3 or 4, k and
    v the same one; k and v have one dtype.
    """
    strides_q, strides_k, strides_v = q.stride(), k.stride(), v.stride()
    if not strides_q[-1] == strides_k[-1] == strides_v[-1] == 1 or q.is_neg() or k.is_neg() or v.is_neg():
        return 0
    strides = strides_k[0] | strides_k[1] | strides_v[0] | strides_v[1]
    if len(strides_k) == 4:
        strides |= strides_k[2] | strides_v[2]
    own_strides = strides_q[0] | strides_q[1]
    if len(strides_q) == 4:
        own_strides |= strides_q[2]
    bits = strides * k.element_size() | own_strides * q.element_size() | q.data_ptr() | k.data_ptr() | v.data_ptr() | 16
    if out is not None:
        *outer, last = out.stride()
        if last != 1 or out.is_neg():
            return 0
        for stride in outer:
            bits |= stride * out.element_size()
        bits |= out.data_ptr()
    return bits & -bits
