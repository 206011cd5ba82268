"""How far a gradient may lie from the reference: at most twice as far as the same computation in the input's dtype."""

from __future__ import annotations

import torch

from flashtile.testing.tolerance import check_finite

_FACTOR = 2.0
_ROW_FACTOR = 8.0  # one row's rounding is that much beyond the tensor's mean, rarely more
_SMALLEST_ROW = 2.0**-6  # of a tensor's mean row: smaller ones count as if they were this large


def assert_gradients_close(
    gradient: torch.Tensor, expected: torch.Tensor, in_dtype: torch.Tensor, floor: torch.Tensor, *, what: str
) -> None:
    """Raises AssertionError, with where and by how much, unless a gradient equals the reference up to rounding.

    All of one shape, (..., dim) or one number a row: ``expected`` in float64, ``in_dtype`` by the same reference in the inputs'
    dtype, and ``floor`` the error that is allowed in any case, 0 where nothing flows. Errors are compared over the whole tensor,
    and in the row where they are the most floors.
    """
    if gradient.shape != expected.shape:
        raise AssertionError(f"{what} has shape {tuple(gradient.shape)}, expected {tuple(expected.shape)}")
    check_finite(what, gradient, "")
    for name, tensor in (("the reference in the dtype", in_dtype), ("the floor", floor)):
        check_finite(f"{what}: {name}", tensor, "")
    if expected.numel() == 0:
        return
    wrong = (gradient != 0.0) & (floor == 0.0)
    if wrong.any():
        raise AssertionError(
            f"{what} is not 0 at {wrong.nonzero()[0].tolist()} and {int(wrong.sum()) - 1} other places where nothing flows"
        )
    error, error_in_dtype = gradient.double() - expected, in_dtype.double() - expected
    limit = _FACTOR * error_in_dtype.norm().item() + floor.norm().item()
    if error.norm().item() > limit:
        size = max(expected.norm().item(), 1e-30)
        raise AssertionError(f"{what} differs by {error.norm().item() / size:.3g} (relative L2); the limit is {limit / size:.3g}")
    floors = _rows(floor)
    floors = floors.clamp(min=_SMALLEST_ROW * floors.mean().item() + torch.finfo(torch.float64).tiny)
    errors = _rows(error) / floors
    row_limit = _FACTOR * (_rows(error_in_dtype) / floors).max().item() + _ROW_FACTOR
    if errors.max().item() > row_limit:
        where = [int(i) for i in torch.unravel_index(errors.argmax(), errors.shape)]
        raise AssertionError(
            f"{what} at {where} differs by {errors.max().item():.3g} of its floor {floors[tuple(where)].item():.3g}; the limit is "
            f"{row_limit:.3g}; {int((errors > row_limit).sum())} of {errors.numel()} rows are off"
        )


def _rows(error: torch.Tensor) -> torch.Tensor:
    """(...,): the size of each row."""
    return error.norm(dim=-1) if error.ndim > 1 else error.abs()
