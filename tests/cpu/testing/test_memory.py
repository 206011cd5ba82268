"""How memory is measured: what is held at once, not what was ever asked for."""

from __future__ import annotations

import torch

from flashtile.testing.memory import peak_bytes

CPU = torch.device("cpu")
MIB = 1 << 20


def mebibytes(count: int) -> torch.Tensor:
    return torch.empty(count * MIB, dtype=torch.uint8)


def test_the_peak_is_what_is_held_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(5):
            mebibytes(3)

    assert peak_bytes(one_after_the_other, CPU) == 3 * MIB
    assert peak_bytes(lambda: [mebibytes(3) for _ in range(5)], CPU) == 15 * MIB
    assert peak_bytes(lambda: (mebibytes(4), mebibytes(2).clone())[0], CPU) == 8 * MIB


def test_what_was_there_before_does_not_count() -> None:
    before = mebibytes(8)
    assert peak_bytes(lambda: before[:MIB].clone(), CPU) == MIB


def test_what_kernels_allocate_for_themselves_counts() -> None:
    """Those of attention have sums of their own beside the output."""
    q = torch.randn(1, 1, 64, 8)
    held = peak_bytes(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q), CPU)
    assert held > q.numel() * q.element_size()
