"""The floor: kernels that merely read the bytes of K and V that a decode call has to read."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from benchmarks.sets import InputSets

# (int32 words a tile, programs a multiprocessor, warps): the best of them is the best sustained read of a run
VARIANTS = {"read 1K x16": (256, 16, 2), "read 4K x16": (1024, 16, 4), "read 8K x16": (2048, 16, 4), "read 16K x8": (4096, 8, 4)}


@triton.jit
def _read(K, V, SINK, num_words, BLOCK: tl.constexpr):
    # (BLOCK,) running xor of the words of both tensors
    words = tl.arange(0, BLOCK)
    folded = tl.zeros([BLOCK], tl.int32)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for at in range(first, num_words, step):
        inside = at + words < num_words
        folded ^= tl.load(K + at + words, mask=inside, other=0)
        folded ^= tl.load(V + at + words, mask=inside, other=0)
    tl.store(SINK + tl.program_id(0), tl.xor_sum(folded, 0))


def readers(sets: InputSets) -> dict[str, Callable[[int], torch.Tensor]]:
    """One contestant for each variant; reads as many bytes of the caches as the problem's lengths ask for, laid out flat."""
    num_words = sets.entry.kv_bytes // 2 // 4
    flat_k = [k.reshape(-1).view(torch.int32) for k in sets.k]
    flat_v = [v.reshape(-1).view(torch.int32) for v in sets.v]
    num_sms = torch.cuda.get_device_properties(sets.device).multi_processor_count

    def reader(block: int, programs: int, num_warps: int) -> Callable[[int], torch.Tensor]:
        grid = max(1, min(num_sms * programs, triton.cdiv(num_words, block)))
        sink = torch.empty(grid, device=sets.device, dtype=torch.int32)

        def read(i: int) -> torch.Tensor:
            _read[(grid,)](flat_k[i], flat_v[i], sink, num_words, BLOCK=block, num_warps=num_warps)
            return sink

        return read

    return {name: reader(*variant) for name, variant in VARIANTS.items()}


def expected(sets: InputSets, i: int) -> int:
    """The xor of all words, by folding halves: what the sums of a reader's sink must come to."""
    num_words = sets.entry.kv_bytes // 2 // 4
    folded = sets.k[i].reshape(-1).view(torch.int32)[:num_words] ^ sets.v[i].reshape(-1).view(torch.int32)[:num_words]
    return fold(folded)


def fold(words: torch.Tensor) -> int:
    """xor of all elements of a one-dimensional int32 tensor."""
    while words.numel() > 1:
        half = words.numel() // 2
        rest = words[2 * half :]
        words = words[:half] ^ words[half : 2 * half]
        if rest.numel():
            words[0] ^= rest[0]
    return int(words.item())
