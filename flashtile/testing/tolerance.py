"""How far a result may lie from the reference: derived from what the dtypes round, not from what passes."""

from __future__ import annotations

import torch

# Relative L2 error of out. Rounding out and the softmax weights to bfloat16 (8 bits) gives 1.1e-3 each, 1.7e-3
# together on random data; float16 (11 bits) an eighth of that. float32 is bounded by the scores' own rounding.
_RELATIVE_L2 = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 0.0}
_UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}
_FLOAT32 = 2e-6
# For 16-bit inputs torch's CPU flash kernel takes exp from a cubic, Vec::exp_u20: with x*log2(e) = n + f it returns
# 2**n * (1 + f - K(f)), K(0) = 1.07e-4. Its relative error is largest where f = K(f), at f = 1.5e-4: there 1 stands for
# 2**f * (1 - 1.07e-4). So every weight, and with it their sum, is off by at most 1.07e-4 < 2**-13; out divides by
# the same sum. Sums of rounded weights (1e-3) or rounded scores (1e-2) are still seen. No other kernel has this error.
LSE_TORCH_CPU_16_BIT = 2.0**-13


def assert_close(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    expected_out: torch.Tensor,
    expected_lse: torch.Tensor | None,
    *,
    dtype: torch.dtype | None = None,
    cpu_engine: bool = False,
    what: str = "",
) -> None:
    """Raises AssertionError, with where and by how much, unless out and lse equal the reference up to rounding.

    ``dtype`` is the inputs' dtype, by default out's: partial results in float32 still carry 16-bit softmax weights.
    ``cpu_engine`` says that the CPU engine computed them, whose lse of 16-bit inputs is coarser than that of other kernels.
    ``expected_*`` come from ``reference`` in float64 or float32. Either lse may be None: it is not compared.
    """
    dtype = dtype or out.dtype
    label = f"{what}: " if what else ""
    if out.shape != expected_out.shape:
        raise AssertionError(f"{label}out has shape {tuple(out.shape)}, expected {tuple(expected_out.shape)}")
    score_error = _FLOAT32 if expected_lse is None else score_error_of(expected_lse)
    if lse is not None and expected_lse is not None:
        coarse_exp = LSE_TORCH_CPU_16_BIT if cpu_engine and dtype != torch.float32 else 0.0
        _check_lse(lse, expected_lse, 4 * score_error + coarse_exp, label)
    check_finite("out", out, label)
    _check_out(out.double(), expected_out.double(), dtype, score_error, label)


def relative_l2(out: torch.Tensor, expected: torch.Tensor) -> float:
    """||out - expected|| / ||expected||; 0 where both are zero."""
    error = (out.double() - expected.double()).norm().item()
    return error / max(expected.double().norm().item(), 1e-30) if error else 0.0


def unit_of(dtype: torch.dtype) -> float:
    """The most that rounding to ``dtype`` changes a value of size 1; 0 for float32, whose rounding a score's error covers."""
    return _UNIT[dtype]


def score_error_of(lse: torch.Tensor) -> float:
    """The relative error of softmax weights in float32: a score of size L has an absolute error of about L units."""
    finite = lse[lse.isfinite()]
    return _FLOAT32 * max(1.0, finite.abs().max().item() if finite.numel() else 1.0)


def check_finite(name: str, tensor: torch.Tensor, label: str) -> None:
    """Raises AssertionError, with the first such place, if an element is NaN or infinite."""
    bad = ~tensor.isfinite()
    if bad.any():
        where = bad.nonzero()[0].tolist()
        raise AssertionError(f"{label}{name} has {int(bad.sum())} of {bad.numel()} elements NaN or infinite, the first at {where}")


def _check_lse(lse: torch.Tensor, expected: torch.Tensor, tolerance: float, label: str) -> None:
    if lse.shape != expected.shape:
        raise AssertionError(f"{label}lse has shape {tuple(lse.shape)}, expected {tuple(expected.shape)}")
    empty, expected_empty = lse == float("-inf"), expected == float("-inf")
    if not torch.equal(empty, expected_empty):
        where = (empty != expected_empty).nonzero()[0].tolist()
        raise AssertionError(f"{label}lse is -inf in {int(empty.sum())} rows, expected {int(expected_empty.sum())}; they differ at {where}")
    seen, expected_seen = lse[~empty], expected[~expected_empty]
    check_finite("lse", seen, label)
    if seen.numel() == 0:
        return
    error = (seen.double() - expected_seen.double()).abs()
    if error.max().item() > tolerance:
        where = (~empty).nonzero()[error.argmax()].tolist()
        raise AssertionError(f"{label}lse differs by {error.max().item():.3g} at {where}; the limit is {tolerance:.3g}")


def _check_out(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, score_error: float, label: str) -> None:
    if expected.numel() == 0:
        return
    error = (out - expected).abs()
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # half of the subnormals' step is below this
    limit = _RELATIVE_L2[dtype] + score_error
    norm, floor = expected.norm().item(), smallest * expected.numel() ** 0.5
    if error.norm().item() > limit * norm + floor:
        raise AssertionError(f"{label}out differs by {error.norm().item() / max(norm, 1e-30):.3g} (relative L2); the limit is {limit:.3g}")
    # One element: rounding of itself, and of weights whose errors add up like the row's values do.
    row = expected.pow(2).mean(dim=-1, keepdim=True).sqrt()
    bound = (4 * _UNIT[dtype] + 8 * score_error) * (expected.abs() + row) + smallest
    if (error > bound).any():
        where = torch.unravel_index((error / bound).argmax(), error.shape)
        raise AssertionError(
            f"{label}out at {[int(i) for i in where]} is {out[where].item():.6g}, expected {expected[where].item():.6g}; "
            f"the limit is {bound[where].item():.3g}; {int((error > bound).sum())} of {error.numel()} elements are off"
        )
