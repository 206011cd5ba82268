"""bert_padding: padded batches to packed sequences and back, and the gradients of both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashtile.errors import ArgumentError, ShapeError
from flashtile.flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASK = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int32])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_there_and_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(3, 4, *shape)
    tokens, indices, cu_seqlens, longest, used = unpad_input(x, MASK.to(dtype))
    assert indices.tolist() == [1, 2, 4, 5, 6, 7] and torch.equal(tokens, x.flatten(0, 1)[indices])
    assert cu_seqlens.dtype == used.dtype == torch.int32
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 2, 6, 6], 4, [2, 4, 0])
    back = pad_input(tokens, indices, 3, 4)
    assert torch.equal(back, torch.where(MASK.bool().view(3, 4, *[1] * len(shape)), x, 0.0))


def test_unused_tokens_are_packed_but_not_counted_as_used() -> None:
    x = torch.randn(2, 4, 3)
    mask, unused = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]), torch.tensor([[0, 0, 1, 0], [0, 1, 1, 0]])
    tokens, indices, cu_seqlens, longest, used = unpad_input(x, mask, unused)
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 3, 6], 3, [2, 1])
    assert indices.tolist() == [0, 1, 2, 4, 5, 6] and torch.equal(tokens, x.flatten(0, 1)[indices])


def test_short_sequences_in_one_row() -> None:
    x = torch.randn(3, 6, 2)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    tokens, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17]
    assert (cu_seqlens.tolist(), cu_seqlens.dtype, longest) == ([0, 2, 5, 8, 10, 16], torch.int32, 6)
    assert torch.equal(tokens, x.flatten(0, 1)[indices])


def test_gradients() -> None:
    x, indices = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True), torch.tensor([4, 0, 2])
    values = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: index_first_axis(x, indices), (x,))
    assert torch.autograd.gradcheck(lambda x: index_put_first_axis(x, indices, 6), (values,))
    assert torch.autograd.gradcheck(lambda x: pad_input(x, indices, 2, 3), (values,))
    rows, residual = index_first_axis_residual(x, indices)
    (grad,) = torch.autograd.grad(rows.sum() + 2.0 * residual.sum(), x)
    assert grad[:, 0, 0].tolist() == [3.0, 2.0, 3.0, 2.0, 3.0]


def test_a_mask_of_another_batch_is_refused() -> None:
    with pytest.raises(ShapeError, match="attention_mask"):
        unpad_input(torch.randn(3, 5, 2), MASK)
    with pytest.raises(ShapeError, match="unused_mask"):
        unpad_input(torch.randn(3, 4, 2), MASK, MASK[:2])
    with pytest.raises(ShapeError, match="attention_mask_in_length"):
        unpad_input_for_concatenated_sequences(torch.randn(2, 4, 2), MASK)


def test_no_sequence_at_all() -> None:
    tokens, indices, cu_seqlens, longest, used = unpad_input(torch.randn(0, 4, 2), torch.zeros(0, 4, dtype=torch.int64))
    assert (tokens.shape, indices.shape, cu_seqlens.tolist(), longest, used.shape) == ((0, 2), (0,), [0], 0, (0,))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_states": None}, "hidden_states: expected a tensor"),
        ({"indices": None}, r"indices: expected a tensor \(3,\), got None"),
        ({"indices": torch.zeros(2, dtype=torch.int64)}, r"indices: expected a tensor \(3,\), got shape \(2,\)"),
        ({"batch": "2"}, "batch: expected an int"),
        ({"seqlen": -1}, "seqlen: expected an int"),
    ],
)
def test_wrong_arguments_of_pad_input_are_named(change: dict[str, Any], match: str) -> None:
    right = {"hidden_states": torch.zeros(3, 4), "indices": torch.tensor([0, 1, 4]), "batch": 2, "seqlen": 3}
    with pytest.raises(ArgumentError, match=match):
        pad_input(**right | change)


def test_what_is_no_tensor_is_named() -> None:
    with pytest.raises(ArgumentError, match="hidden_states: expected a tensor"):
        unpad_input(None, MASK)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="attention_mask: expected a tensor"):
        unpad_input(torch.randn(3, 4, 2), [[1, 1, 1, 1]])  # type: ignore[arg-type]
