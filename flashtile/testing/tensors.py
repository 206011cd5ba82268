"""How the tensors of a case lie in memory: pages, layouts, views, and NaN around everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

_SPARE_PAGES = 3
_ABSURD_IDS = (2**30, -7)
NAN = float("nan")


class Pages(NamedTuple):
    """The pages of each sequence in order, the page table (batch, max_pages) int32, and how many pages there are."""

    of_sequence: list[torch.Tensor]
    table: torch.Tensor
    num_pages: int


def place_pages(lengths: Sequence[int], page_size: int, max_pages: int, missing_pages: int, rng: torch.Generator) -> Pages:
    """Shuffled pages for sequences of ``lengths`` keys, with a few more that nobody owns.

    The table holds absurd ids past each sequence's end, and in place of ``missing_pages`` of the pages inside it.
    """
    counts = [-(-n // page_size) for n in lengths]
    num_pages = sum(counts) + _SPARE_PAGES
    shuffled = torch.randperm(num_pages, generator=rng)
    absurd = torch.tensor(_ABSURD_IDS, dtype=torch.int32)
    table = absurd[torch.arange(max_pages) % len(absurd)].repeat(len(lengths), 1)
    of_sequence = []
    for i, count in enumerate(counts):
        pages, shuffled = shuffled[:count], shuffled[count:]
        table[i, :count] = pages.to(torch.int32)
        lost = torch.randperm(count, generator=rng)[:missing_pages]
        table[i, lost] = absurd[lost % len(absurd)]
        of_sequence.append(pages)
    return Pages(of_sequence, table, num_pages)


def in_blocks(rows: Sequence[torch.Tensor], owned: Sequence[torch.Tensor], shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Blocks of ``shape`` (blocks, block size, heads, dim), NaN but for each sequence's rows (n, heads, dim) in the blocks it owns."""
    cache = torch.full(shape, NAN)
    for keys, blocks in zip(rows, owned):
        padded = torch.full((len(blocks) * shape[1], *shape[2:]), NAN)
        padded[: len(keys)] = keys
        cache[blocks] = padded.view(len(blocks), *shape[1:])
    return cache


def laid_out(tensor: torch.Tensor, dtype: torch.dtype, layout: str = "NHD", offset: int = 0) -> torch.Tensor:
    """The values (..., tokens, heads, dim) in ``dtype``; in HND a transposed view, since heads come before tokens in memory.

    The view starts ``offset`` elements into a larger buffer.
    """
    if layout == "HND":
        tensor = tensor.transpose(-3, -2).contiguous()
    tensor = _view_from(tensor.to(dtype), offset)
    return tensor.transpose(-3, -2) if layout == "HND" else tensor


def on_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Moves a tensor with its strides and its offset into its buffer."""
    if torch.device(device).type == "cpu":
        return tensor
    buffer = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0).to(device)
    return torch.as_strided(buffer, tensor.shape, tensor.stride(), tensor.storage_offset())


def unseen_of(dtype: torch.dtype) -> float:
    """What lies where no kernel must look: NaN, or where the dtype has none its largest value."""
    return NAN if dtype.is_floating_point else float(torch.iinfo(dtype).max)


def starts_of(lengths: Sequence[int]) -> torch.Tensor:
    """cu_seqlens (batch + 1,) int32 of packed sequences."""
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)


def alibi_slopes(batch: int, heads: int, per_sequence: bool, rng: torch.Generator) -> torch.Tensor:
    """(heads,), or (batch, heads), from 0 to 0.5."""
    return torch.rand((batch, heads) if per_sequence else (heads,), generator=rng) * 0.5


def _view_from(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    if not offset:
        return tensor
    buffer = torch.full((tensor.numel() + offset,), unseen_of(tensor.dtype), dtype=tensor.dtype)
    return buffer[offset:].view(tensor.shape).copy_(tensor)
