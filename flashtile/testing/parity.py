"""FlashAttention's own yardstick: no farther from float64 than a few times the same computation in the input's dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flashtile import reference
from flashtile.testing.tolerance import LSE_TORCH_CPU_16_BIT, check_finite, score_error_of

OUT_FACTOR = 2.0  # of FlashAttention's tests, outputs
GRADIENT_FACTOR = 3.0  # and gradients
FLOOR = 1e-5  # what they add where the input's dtype may be exact

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Parity:
    """One call in FlashAttention's terms; ``lengths_q`` and ``lengths_k`` are one number each, or one for each packed sequence."""

    lengths_q: int | tuple[int, ...]
    lengths_k: int | tuple[int, ...]
    head_dim: int = 64
    heads: tuple[int, int] = (6, 6)
    dtype: str = "bfloat16"
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    head_dim_v: int = 0
    batch: int = 2

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Parity:
        """The case of a row of a cover: ``lengths`` is a pair, and what is a dict stands for its entries."""
        facts = dict(zip(("lengths_q", "lengths_k"), row["lengths"]))
        for name, value in row.items():
            facts |= value if isinstance(value, dict) else {} if name == "lengths" else {name: value}
        return cls(**facts)

    @property
    def scores(self) -> dict[str, Any]:
        """What both generations' functions take."""
        return {"causal": self.causal, "window_size": self.window_size, "softcap": self.softcap}

    def tensors(self, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
        """q, k and v, the gradient dout, and slopes and starts where the call has them. Softcapped scores reach beyond their cap."""
        rng = torch.Generator().manual_seed(seed)
        heads_q, heads_k = self.heads

        def rows(lengths: int | tuple[int, ...], heads: int, dim: int) -> torch.Tensor:
            tokens = (self.batch, lengths) if isinstance(lengths, int) else (sum(lengths),)
            return torch.randn((*tokens, heads, dim), generator=rng)

        dim_v = self.head_dim_v or self.head_dim
        made = {
            "q": rows(self.lengths_q, heads_q, self.head_dim) * (self.softcap or 1.0),
            "k": rows(self.lengths_k, heads_k, self.head_dim),
        }
        made |= {"v": rows(self.lengths_k, heads_k, dim_v), "dout": rows(self.lengths_q, heads_q, dim_v)}
        made = {name: tensor.to(device, getattr(torch, self.dtype)) for name, tensor in made.items()}
        if self.alibi:
            made["alibi_slopes"] = (torch.rand(heads_q, generator=rng) * 0.3).to(device)
        for name, lengths in (("cu_seqlens_q", self.lengths_q), ("cu_seqlens_k", self.lengths_k)):
            if not isinstance(lengths, int):
                starts = torch.tensor((0, *lengths)).cumsum(0)
                made[name] = starts.to(device, torch.int32)
        return made

    def expected(self, tensors: Tensors, dtype: torch.dtype, **more: Any) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """out, lse (-inf where no key is seen) and gradients of q, k and v, by the reference in ``dtype``, which ``more`` goes to."""
        leaves = [tensors[name].detach().to(dtype).requires_grad_() for name in ("q", "k", "v")]
        left, right = (None if side < 0 else side for side in self.window_size)
        more = {name: tensors[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "alibi_slopes") if name in tensors} | more
        out, lse = reference.forward(
            leaves[0], leaves[1], leaves[2], causal=self.causal, window=(left, right), softcap=self.softcap, dtype=dtype, **more
        )
        grads = torch.autograd.grad(out, leaves, tensors["dout"].to(dtype), materialize_grads=True) if out.requires_grad else leaves
        return out.detach(), lse.detach(), tuple(grads)


def assert_near(got: torch.Tensor, expected: torch.Tensor, in_dtype: torch.Tensor, factor: float, what: str, floor: float = FLOOR) -> None:
    """Raises AssertionError unless the largest error is at most ``factor`` times that of ``in_dtype``, and a floor."""
    if got.shape != expected.shape:
        raise AssertionError(f"{what} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    check_finite(what, got, "")
    if expected.numel() == 0:
        return
    error = (got.double() - expected).abs().max().item()
    limit = factor * (in_dtype.double() - expected).abs().max().item() + floor
    if not error <= limit:
        raise AssertionError(f"{what} is off by {error:.3g}; {factor} times the dtype's own error, and {floor}, is {limit:.3g}")


def assert_lse_near(got: torch.Tensor, expected: torch.Tensor, unseen: float) -> None:
    """Raises AssertionError unless lse is float32 and right; ``unseen`` is what stands for a query that sees no key."""
    if got.dtype != torch.float32 or got.shape != expected.shape:
        raise AssertionError(f"softmax_lse is {got.dtype} {tuple(got.shape)}, expected float32 {tuple(expected.shape)}")
    nothing = expected == -torch.inf
    if not torch.equal(got[nothing], torch.full_like(got[nothing], unseen)):
        raise AssertionError(f"softmax_lse is not {unseen} in rows that see no key")
    error = (got[~nothing].double() - expected[~nothing]).abs()
    limit = 4 * score_error_of(expected) + (LSE_TORCH_CPU_16_BIT if got.device.type == "cpu" else 0.0)
    if error.numel() and not error.max().item() <= limit:
        raise AssertionError(f"softmax_lse is off by {error.max().item():.3g}; the limit is {limit:.3g}")


def assert_parity(
    case: Parity,
    tensors: Tensors,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    grads: tuple[torch.Tensor, ...] | None,
    *,
    unseen: float = torch.inf,
    **more: Any,
) -> None:
    """Raises AssertionError unless a function's results are as near to float64 as FlashAttention's tests want them."""
    expected, expected_lse, expected_grads = case.expected(tensors, torch.float64, **more)
    in_dtype, _, grads_in_dtype = case.expected(tensors, tensors["q"].dtype, **more)
    assert_near(out, expected, in_dtype, OUT_FACTOR, "out")
    if lse is not None:
        assert_lse_near(lse, expected_lse, unseen)
    for name, got, want, same in zip(("dq", "dk", "dv"), grads or (), expected_grads, grads_in_dtype):
        floor = max(FLOOR, _float32_noise_of_dk(case, tensors)) if name == "dk" else FLOOR
        assert_near(got, want, same, GRADIENT_FACTOR, name, floor)


def _float32_noise_of_dk(case: Parity, tensors: Tensors) -> float:
    """What float32 leaves of a dk that is exactly zero, as that of a sequence's only key is: dP and delta are one number, summed twice.

    Six standard deviations of a sum over the rows of a group, each q times the rounding of a product of dout and v. The same
    computation in the input's dtype has no such error: there softmax's gradient is exactly zero.
    """
    q, v, dout = (tensors[name].float().square().mean().sqrt().item() for name in ("q", "v", "dout"))
    heads_q, heads_k = case.heads
    rows = heads_q // heads_k * (case.lengths_q if isinstance(case.lengths_q, int) else max(case.lengths_q, default=0))
    dim_v = tensors["v"].shape[-1]
    noise: float = 6 * torch.finfo(torch.float32).eps * case.head_dim**-0.5 * q * dout * v * (rows * dim_v) ** 0.5
    return noise
