"""torch's scaled_dot_product_attention on a serving step: what stands beside flashtile on the same machine.

It knows neither pages nor lengths: keys and values are gathered from their pages and padded to the longest sequence
first, and a mask hides the padding. Sequences with equally many queries share a call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from flashtile.testing.serving import Step


@dataclass(frozen=True)
class DenseGroup:
    """Sequences of one step that have the same number of queries, as SDPA wants them (heads second).

    q (g, hq, seqlen_q, d); k, v (g, hk, longest, d); mask (g, 1, seqlen_q, longest) bool or None where all is visible.
    """

    rows: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None

    def __call__(self) -> torch.Tensor:
        gqa = self.q.shape[1] != self.k.shape[1]
        return F.scaled_dot_product_attention(self.q, self.k, self.v, attn_mask=self.mask, enable_gqa=gqa)


@dataclass(frozen=True)
class DenseStep:
    """One serving step for SDPA: ``run`` is what is timed, ``out`` (total_q, hq, d) brings the result into our order."""

    groups: tuple[DenseGroup, ...]
    total_q: int

    def run(self) -> list[torch.Tensor]:
        return [group() for group in self.groups]

    def out(self) -> torch.Tensor:
        first = self.groups[0].q
        out = first.new_empty((self.total_q, first.shape[1], first.shape[3]))
        for group, result in zip(self.groups, self.run()):
            out[group.rows.flatten()] = result.transpose(1, 2).flatten(0, 1)
        return out


def gather_step(step: Step) -> DenseStep:
    """Copies a step's keys and values out of their pages; groups sequences by their number of queries."""
    starts = [sum(step.seqlens_q[:i]) for i in range(len(step.seqlens_q))]
    q = step.call["q"].flatten(0, 1) if step.call["q"].ndim == 4 else step.call["q"]
    groups = []
    for seqlen_q in sorted(set(step.seqlens_q)):
        members = [i for i, n in enumerate(step.seqlens_q) if n == seqlen_q]
        rows = torch.tensor([[starts[i] + j for j in range(seqlen_q)] for i in members], device=q.device)
        seqlens_k = [step.seqlens_k[i] for i in members]
        groups.append(
            DenseGroup(
                rows=rows,
                q=q[rows].transpose(1, 2).contiguous(),
                k=_gather(step.call["k_cache"], step.call["page_table"], members, seqlens_k),
                v=_gather(step.call["v_cache"], step.call["page_table"], members, seqlens_k),
                mask=_mask(seqlen_q, seqlens_k, q.device),
            )
        )
    return DenseStep(tuple(groups), q.shape[0])


def gather_call(step: Step) -> Callable[[], object]:
    """The copy alone, to be timed: an engine built on SDPA pays for it at every step."""
    return lambda: gather_step(step)


def _gather(cache: torch.Tensor, page_table: torch.Tensor, members: list[int], seqlens_k: list[int]) -> torch.Tensor:
    page_size, longest = cache.shape[1], max(seqlens_k)
    pages = page_table[torch.tensor(members, device=cache.device), : -(-longest // page_size)].long().clamp(min=0)
    dense = cache[pages].flatten(1, 2)[:, :longest]
    lengths = torch.tensor(seqlens_k, device=cache.device)
    past_end = torch.arange(longest, device=cache.device)[None] >= lengths[:, None]
    # A masked weight of 0 times a NaN of an unwritten slot would still be NaN.
    return dense.masked_fill(past_end[..., None, None], 0).transpose(1, 2).contiguous()


def _mask(seqlen_q: int, seqlens_k: list[int], device: torch.device) -> torch.Tensor | None:
    longest = max(seqlens_k)
    if seqlen_q == 1 and min(seqlens_k) == longest:
        return None
    last_key = torch.tensor(seqlens_k, device=device)[:, None] - seqlen_q + torch.arange(seqlen_q, device=device)[None]
    return (torch.arange(longest, device=device) <= last_key[..., None])[:, None]
