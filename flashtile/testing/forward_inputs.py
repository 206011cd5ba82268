"""Tensors for a ForwardCase, with NaN wherever a kernel must not look, and the call that a kernel gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flashtile import reference
from flashtile.dropout import draw_seed
from flashtile.kernels.call import Dropout, ForwardCall
from flashtile.testing.forward_cases import ForwardCase
from flashtile.testing.tensors import NAN, alibi_slopes, in_blocks, laid_out, on_device, place_pages, starts_of

GENERATOR_SEED = 11
"""What torch's generator of a device is seeded with for its next draw to be ``ForwardInputs.seed``."""


@dataclass(frozen=True)
class ForwardInputs:
    """``args`` are the keyword arguments of ``flashtile.attention_varlen`` where ``varlen``, else of ``flashtile.attention``."""

    case: ForwardCase
    args: dict[str, Any]

    @property
    def varlen(self) -> bool:
        return self.case.varlen

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.args["q"].dtype
        return dtype

    @property
    def seed(self) -> torch.Tensor:
        """Of dropout, (2,) int64: what a call draws first after ``torch.manual_seed(GENERATOR_SEED)``."""
        device = self.args["q"].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(GENERATOR_SEED)
            return draw_seed(device)

    @property
    def dropout(self) -> Dropout | None:
        """What a kernel's call gets."""
        return Dropout(self.case.dropout_p, self.seed) if self.case.dropout_p else None


def make_forward_inputs(case: ForwardCase, device: torch.device | str = "cpu", seed: int = 0) -> ForwardInputs:
    """Random tensors of one case, the same on every device for one seed.

    NaN are: memory around the tensors, rows of q that no sequence owns, keys that do not count, and pages that nobody owns.
    Page tables are shuffled, and hold absurd ids past each sequence's end.
    """
    rng = torch.Generator().manual_seed(seed)
    k_rows = [_keys(case, n, case.head_dim, rng) for n in case.key_lengths]
    v_rows = [torch.randn(n, case.num_heads_kv, case.head_dim_v, generator=rng) for n in case.key_lengths]
    q_rows = [torch.randn(n, case.num_heads_q, case.head_dim, generator=rng) * case.logit_scale for n in case.query_lengths]
    tensors: dict[str, torch.Tensor | None] = {
        "q": in_sequences(case, q_rows, case.seqlens_q, case.spare_rows, case.num_heads_q, case.head_dim)
    }
    if case.page_size:
        pages = place_pages(case.key_lengths, case.page_size, case.room // case.page_size, case.missing_pages, rng)
        for name, rows, dim in (("k", k_rows, case.head_dim), ("v", v_rows, case.head_dim_v)):
            cache = in_blocks(rows, pages.of_sequence, (pages.num_pages, case.page_size, case.num_heads_kv, dim))
            tensors[name] = laid_out(cache, getattr(torch, case.dtype), case.layout, case.offset_elements)
    else:
        for name, rows, dim in (("k", k_rows, case.head_dim), ("v", v_rows, case.head_dim_v)):
            tensors[name] = in_sequences(case, rows, case.seqlens_k, case.spare_keys, case.num_heads_kv, dim)
    tensors["sinks"] = torch.randn(case.num_heads_q, generator=rng) if case.sinks else None
    tensors["alibi_slopes"] = alibi_slopes(case.batch, case.num_heads_q, case.alibi_per_sequence, rng) if case.alibi else None
    if case.varlen:
        tensors["cu_seqlens_q"] = starts_of(case.query_lengths)
        tensors["cu_seqlens_k"] = None if case.page_size else starts_of(case.stored_lengths)
        tensors["page_table"] = pages.table if case.page_size else None
        used = case.seqlens_k if case.page_size else case.seqused_k
        tensors["seqused_k"] = None if used is None else torch.tensor(used, dtype=torch.int32)
    args: dict[str, Any] = {name: None if tensor is None else on_device(tensor, device) for name, tensor in tensors.items()}
    if case.varlen:
        args["max_seqlen_q"] = max(case.query_lengths, default=0)
    return ForwardInputs(case, args | {name: getattr(case, name) for name in ("causal", "window", "softcap", "scale", "dropout_p")})


def forward_call(inputs: ForwardInputs, out: torch.Tensor, lse: torch.Tensor | None) -> ForwardCall:
    """What a kernel's runner gets for these inputs; ``out`` and ``lse`` as ``poison.outputs`` makes them, or lse None."""
    args, case = inputs.args, inputs.case
    names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "page_table", "sinks", "alibi_slopes")
    return ForwardCall(
        q=args["q"], k=args["k"], v=args["v"], **{name: args.get(name) for name in names},
        max_seqlen_q=max(case.query_lengths, default=0) if case.varlen else args["q"].shape[1],
        out=out, lse=lse, scale=case.head_dim**-0.5 if case.scale is None else case.scale, softcap=case.softcap, dropout=inputs.dropout,
    )  # fmt: skip


def expected_forward(inputs: ForwardInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of the reference, in float64."""
    return reference.forward(**inputs.args, seed=inputs.seed)


def _keys(case: ForwardCase, length: int, dim: int, rng: torch.Generator) -> torch.Tensor:
    """One sequence's keys (length, hk, dim); of a rising case, each a little larger than the one before."""
    keys = torch.randn(length, case.num_heads_kv, dim, generator=rng)
    return keys * torch.linspace(0.1, 1.0, length)[:, None, None] if case.rising else keys


def in_sequences(
    case: ForwardCase, rows: Sequence[torch.Tensor], lengths: int | Sequence[int], spare: int, heads: int, dim: int
) -> torch.Tensor:
    """q, k, v or dout with each sequence's rows (n, heads, dim) in its place, which is ``lengths`` long; NaN where there are no rows.

    (batch, lengths, heads, dim), or packed (sum of lengths and spare, heads, dim).
    """
    if isinstance(lengths, int):
        total = lengths
        tensor = torch.full((case.batch, total + case.padding, heads, dim), NAN)
        for i, sequence in enumerate(rows):
            tensor[i, : len(sequence)] = sequence
    else:
        total = sum(lengths) + spare
        tensor = torch.full((total + case.padding, heads, dim), NAN)
        for start, sequence in zip(starts_of(lengths).tolist(), rows):
            tensor[start : start + len(sequence)] = sequence
    return laid_out(tensor, getattr(torch, case.dtype), case.layout, case.offset_elements).narrow(-3, 0, total)
