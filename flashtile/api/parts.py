"""merge: results over parts of the keys, folded into one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flashtile.errors import ArgumentError, DtypeError, ShapeError, message


def merge(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Folds attention over parts of the keys into attention over all of them. Differentiable, in plain torch.

    Each part is an attention result over keys of its own: ``lse = log(sum exp(lse_i))`` and
    ``out = sum(exp(lse_i - lse) * out_i)``. The order of the parts does not matter beyond rounding. Parts that saw no key
    (lse -inf) add nothing, whatever their out holds. A sink must be in one part only.

    Args:
        outs: one or more of (batch, seqlen_q, heads, dim), or packed (total_q, heads, dim); all of one shape, floating.
        lses: as many of (batch, heads, seqlen_q), or (heads, total_q); natural logarithm, floating.

    Returns:
        out: the shape of each part and their common dtype; computed in float32, or float64 where a part is.
        lse: the shape of each part's, float32, or float64 where a part is; -inf where no part saw a key.

    Raises:
        ArgumentError: no part, or not as many lses as outs, or devices that differ.
        ShapeError: shapes that differ, or a lse that does not fit its out.
        DtypeError: a part that is not a floating tensor.
    """
    _check_parts(outs, lses)
    dtype = outs[0].dtype
    for part in outs[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    work = torch.float64 if any(part.dtype == torch.float64 for part in (*outs, *lses)) else torch.float32
    stacked = torch.stack([lse.to(work) for lse in lses])  # (parts, [batch,] heads, queries)
    # The maximum only scales: the results do not depend on it, so no gradient needs to pass through it.
    top = stacked.detach().amax(dim=0)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(stacked - top)
    total = weights.sum(dim=0)
    seen = total > 0
    total = torch.where(seen, total, 1.0)
    lse = torch.where(seen, top + torch.log(total), -torch.inf)
    # (parts, [batch,] queries, heads, 1)
    shares = (weights / total).transpose(-1, -2).unsqueeze(-1)
    blind = (stacked == -torch.inf).transpose(-1, -2).unsqueeze(-1)
    parts = torch.stack([part.to(work) for part in outs])
    return (torch.where(blind, 0.0, parts) * shares).sum(dim=0).to(dtype), lse


def _check_parts(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> None:
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (Sequence, torch.Tensor)):
            raise DtypeError(message(name, "a sequence of tensors", type(parts).__name__, "Pass a list with a tensor for each part."))
    if len(outs) == 0 or len(outs) != len(lses):
        raise ArgumentError(
            message(
                "lses", "one for each of at least one out", f"{len(outs)} outs and {len(lses)} lses", "Pass two sequences of one length."
            )
        )
    first = outs[0]
    for i, (out, lse) in enumerate(zip(outs, lses)):
        for name, tensor in ((f"outs[{i}]", out), (f"lses[{i}]", lse)):
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                raise DtypeError(
                    message(
                        name, "a floating tensor", getattr(tensor, "dtype", type(tensor).__name__), "Pass what decode_with_lse returns."
                    )
                )
            if tensor.device != first.device:
                raise ArgumentError(
                    message(name, f"a tensor on the device of outs[0], {first.device}", tensor.device, "Move it there with .to(...).")
                )
        if out.ndim not in (3, 4) or out.shape != first.shape:
            wanted = tuple(first.shape) if first.ndim in (3, 4) else "(batch, seqlen_q, heads, dim) or (total_q, heads, dim)"
            raise ShapeError(
                message(f"outs[{i}]", f"shape {wanted}", f"shape {tuple(out.shape)}", "All parts are results for the same queries.")
            )
        fitting = (*out.shape[:-3], out.shape[-2], out.shape[-3])
        if tuple(lse.shape) != fitting:
            raise ShapeError(
                message(
                    f"lses[{i}]",
                    f"shape {fitting}, heads before queries",
                    f"shape {tuple(lse.shape)}",
                    "Transpose it if queries come before heads.",
                )
            )
