"""Tensors for a Case, with NaN wherever a kernel must not look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flashtile.band import Band
from flashtile.testing.cases import Case
from flashtile.testing.tensors import alibi_slopes, in_blocks, laid_out, on_device, place_pages, starts_of, unseen_of

SPREAD = 20.0  # of quantised values that have a scale: most of int8's range, and in float8 of its exponents


@dataclass(frozen=True)
class Inputs:
    """``args`` are the keyword arguments of ``flashtile.decode`` (and ``reference.decode``) for ``case``."""

    case: Case
    args: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.args["q"].dtype
        return dtype


def make_inputs(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """Random tensors of one case, the same on every device for one seed.

    Cache rows past each length and pages that no sequence owns are NaN; page tables are shuffled, and hold absurd ids
    past each sequence's end.
    """
    rng = torch.Generator().manual_seed(seed)
    lengths = [min(max(n, 0), case.room) for n in case.seqlens_k]
    spread_k, spread_v = (1.0 if scales == "none" else SPREAD for scales in (case.k_scales, case.v_scales))
    k_rows = [spread_k * torch.randn(n, case.num_heads_kv, case.head_dim, generator=rng) for n in lengths]
    v_rows = [spread_v * torch.randn(n, case.num_heads_kv, case.head_dim_v, generator=rng) for n in lengths]
    slots, page_table, num_blocks = _place(case, lengths, rng)
    args: dict[str, Any] = {
        "q": _queries(case, rng),
        "k_cache": _cache(case, case.head_dim, k_rows, slots, num_blocks),
        "v_cache": _cache(case, case.head_dim_v, v_rows, slots, num_blocks),
        "seqlens_k": torch.tensor(case.seqlens_k, dtype=torch.int32),
        "page_table": page_table,
        "cu_seqlens_q": starts_of(case.query_lengths) if case.ragged_q else None,
        "sinks": torch.randn(case.num_heads_q, generator=rng) if case.sinks else None,
        "alibi_slopes": alibi_slopes(case.batch, case.num_heads_q, case.alibi_per_sequence, rng) if case.alibi else None,
    }
    if case.dtype_kv:
        args |= {"k_scale": _scale(case, case.k_scales, rng), "v_scale": _scale(case, case.v_scales, rng)}
    if case.leftpad_k:
        args["leftpad_k"] = torch.tensor(case.leftpad_k, dtype=torch.int32)
    args = {name: None if tensor is None else on_device(tensor, device) for name, tensor in args.items()}
    args |= {
        "max_seqlen_q": max(case.query_lengths, default=0) if case.ragged_q else None,
        "causal": case.causal,
        "window": case.window,
        "softcap": case.softcap,
        "scale": case.scale,
    }
    return Inputs(case, args)


def hide_unseen(inputs: Inputs) -> Inputs:
    """Writes NaN, in place, over the keys inside each length that none of its sequence's queries sees: before a window, or padding.

    Returns the same inputs. The reference reads such keys: give it inputs made anew.
    """
    case, args = inputs.case, inputs.args
    band = Band.of(case.causal, case.window)
    for i, (seqlen_q, length) in enumerate(zip(case.query_lengths, case.seqlens_k)):
        unseen = ~band.dense(seqlen_q, min(max(length, 0), case.room)).any(0)
        unseen[: max(0, case.leftpad_k[i]) if case.leftpad_k else 0] = True
        for key in unseen.nonzero().flatten().tolist():
            block, slot = i, key
            if case.page_size:
                block, slot = int(args["page_table"][i, key // case.page_size]), key % case.page_size
            if 0 <= block < len(args["k_cache"]):
                args["k_cache"][block, slot] = unseen_of(args["k_cache"].dtype)
                args["v_cache"][block, slot] = unseen_of(args["v_cache"].dtype)
    return inputs


def _queries(case: Case, rng: torch.Generator) -> torch.Tensor:
    if isinstance(case.seqlens_q, int) and not case.ragged_q:
        rows: tuple[int, ...] = (case.batch, case.seqlens_q)
    else:
        rows = (sum(case.query_lengths) + case.spare_rows,)
    q = torch.randn(*rows, case.num_heads_q, case.head_dim, generator=rng) * case.logit_scale
    return laid_out(q, getattr(torch, case.dtype), offset=case.offset_elements)


def _place(case: Case, lengths: list[int], rng: torch.Generator) -> tuple[list[torch.Tensor], torch.Tensor | None, int]:
    """Where each sequence's keys lie: its blocks (pages, or its own row of a contiguous cache); the table; how many blocks there are."""
    if not case.page_size:
        return [torch.tensor([i]) for i in range(case.batch)], None, case.batch
    return place_pages(lengths, case.page_size, case.room // case.page_size, case.missing_pages, rng)


def _cache(case: Case, dim: int, rows: list[torch.Tensor], slots: list[torch.Tensor], num_blocks: int) -> torch.Tensor:
    """A cache (blocks, block size, hk, dim) of NaN but for the rows of the sequences; in HND a transposed view."""
    cache = in_blocks(rows, slots, (num_blocks, case.page_size or case.room, case.num_heads_kv, dim))
    if case.dtype_kv == "int8":
        cache = cache.round().clamp(-128, 127).nan_to_num(unseen_of(torch.int8))
    return laid_out(cache, getattr(torch, case.dtype_kv or case.dtype), case.layout, case.offset_elements)


def _scale(case: Case, granularity: str, rng: torch.Generator) -> torch.Tensor | None:
    """k_scale or v_scale, such that what is stored times the scale has a size of about 1; of either sign."""
    shapes = {"tensor": (1,), "head": (case.num_heads_kv,), "sequence": (case.batch, case.num_heads_kv)}
    if granularity == "none":
        return None
    scale = (0.5 + torch.rand(shapes[granularity], generator=rng)) / SPREAD
    return scale * torch.where(torch.rand(scale.shape, generator=rng) < 0.2, -1.0, 1.0)
