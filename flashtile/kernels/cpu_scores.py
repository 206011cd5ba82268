"""Softmax and partial results of the CPU engine: everything that touches rows and keys at once."""

from __future__ import annotations

import torch

from flashtile.kernels.cpu_mask import MaskBlock
from flashtile.problem import Problem

_MIN_SPLIT_KEYS = 512
_FOLD_ELEMENTS = 1 << 22


def flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, attn_mask: torch.Tensor | None = None, is_causal: bool = False, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's flash kernel: (batch, heads, rows, dim) and keys alike to out in q's dtype and lse float32; sums in float32.

    Without a mask it makes out 0 and lse 0 of a row of q that holds NaN, which are NaN here as in every other kernel.
    """
    out, lse = torch._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    if attn_mask is None and int(torch.count_nonzero(lse)) < lse.numel():
        lost = (lse == 0.0) & q.isnan().any(dim=-1)
        out, lse = out.masked_fill(lost.unsqueeze(-1), torch.nan), lse.masked_fill(lost, torch.nan)
    return out, lse


def needs_products(softcap: float, head_dim: int, head_dim_v: int) -> bool:
    """Whether scores go through two matrix products: torch's flash kernel knows neither softcap nor a value dim of its own."""
    return softcap != 0.0 or head_dim != head_dim_v


def computes_natively(problem: Problem, rows: int) -> bool:
    """Whether torch's flash kernel should get the inputs as they are, not converted to float32.

    It is fast for bfloat16 with two or more rows; one row and float16 take a path that is slower than converting. A float32
    result must not be rounded to 16 bits on its way.
    """
    if problem.dtype_q == "float32":
        return True
    if problem.quantised:
        return False
    fast = problem.dtype_q == "bfloat16" and rows >= 2 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return fast and problem.dtype_out != "float32"


class Partials:
    """Results over parts of the keys, to be merged by their lse."""

    def __init__(self) -> None:
        self._outs: list[torch.Tensor] = []  # (parts, batch, hk, rows, dv)
        self._lses: list[torch.Tensor] = []  # (parts, batch, hk, rows)
        self._elements = 0

    def add(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        self._outs.append(out)
        self._lses.append(lse)
        self._elements += out.numel()
        if self._elements > _FOLD_ELEMENTS and len(self._outs) > 1:
            out, lse = self._fold()
            self._outs, self._lses, self._elements = [out[None]], [lse[None]], out.numel()

    def merged(self, shape: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """out of ``shape`` (batch, hk, rows, dv), and lse; 0 and -inf if there was no part."""
        if not self._outs:
            return torch.zeros(shape), torch.full(shape[:-1], float("-inf"))
        if len(self._outs) == 1 and self._outs[0].shape[0] == 1:
            return self._outs[0][0], self._lses[0][0]
        return self._fold()

    def _fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        lses = torch.cat(self._lses)
        lse = torch.logsumexp(lses, dim=0)
        shares = torch.exp(lses - lse).masked_fill_(lses == float("-inf"), 0.0)
        return (torch.cat(self._outs) * shares.unsqueeze(-1)).sum(dim=0), lse


def splits_of(batch: int, heads_kv: int, keys: int) -> int:
    """Into how many parts keys are cut so that each thread has one: torch's kernel gives a key head to one thread."""
    if batch > 1:
        return 1
    return max(1, min(torch.get_num_threads() // heads_kv, keys // _MIN_SPLIT_KEYS))


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: MaskBlock | None, scale: float, softcap: float, partials: Partials,
    factors: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Adds the result of rows q (batch, hk, rows, d) over keys k (batch, hk, keys, d), v (batch, hk, keys, dv).

    ``factors`` (hk, rows, keys) multiply the softmax's entries, behind its sum: dropout.
    """
    if factors is not None or needs_products(softcap, q.shape[-1], v.shape[-1]):
        out, lse = _by_products(q, k, v, mask, scale, softcap, factors)
    elif mask is not None:
        out, lse = flash(q, k, v, attn_mask=mask.bias, scale=scale)
        if mask.blind is not None:  # the kernel reports an lse of 0 for them
            lse = lse.masked_fill(mask.blind, float("-inf"))
    else:
        splits = splits_of(q.shape[0], q.shape[1], k.shape[2])
        if splits > 1:
            _attend_in_splits(q, k, v, scale, splits, partials)
            return
        out, lse = flash(q, k, v, scale=scale)
    partials.add(out.unsqueeze(0), lse.unsqueeze(0))


def _attend_in_splits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, splits: int, partials: Partials) -> None:
    """One sequence with fewer key heads than there are threads: the keys are parted as if they were sequences."""
    keys = k.shape[2] // splits
    k_parts, v_parts = (t[0, :, : splits * keys].view(t.shape[1], splits, keys, t.shape[3]).transpose(0, 1) for t in (k, v))
    out, lse = flash(q.expand(splits, -1, -1, -1), k_parts, v_parts, scale=scale)
    partials.add(out.unsqueeze(1), lse.unsqueeze(1))
    if splits * keys < k.shape[2]:
        out, lse = flash(q, k[:, :, splits * keys :], v[:, :, splits * keys :], scale=scale)
        partials.add(out.unsqueeze(0), lse.unsqueeze(0))


def _by_products(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: MaskBlock | None, scale: float, softcap: float, factors: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float32 matrix products with the softmax between them, for scores that the flash kernel does not know."""
    scores = torch.matmul(q * scale, k.transpose(2, 3))
    if softcap:
        scores.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores.add_(mask.bias)
    largest = scores.amax(dim=-1, keepdim=True)
    largest.masked_fill_(largest == float("-inf"), 0.0)
    weights = scores.sub_(largest).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    lse = (largest + total.log()).squeeze(-1)
    if factors is not None:
        weights.mul_(factors)
    return torch.matmul(weights, v).div_(total.clamp_(min=torch.finfo(torch.float32).tiny)), lse
