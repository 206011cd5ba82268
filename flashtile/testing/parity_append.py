"""flash_attn_with_kvcache with new keys, rotary embeddings and left padding: what it is told, and what it should do, in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from flashtile.testing.append_cases import Written, assert_caches, written
from flashtile.testing.parity import Parity, Tensors, assert_lse_near, assert_near
from flashtile.testing.parity_cache import Layout, Placed, placed

OUT_FACTOR = 3  # FlashAttention-2's own tests of caches take three times the dtype's own error, and five with ALiBi,
ALIBI_FACTOR = 5
_LONGEST = 320  # positions of the tables


class Appended(NamedTuple):
    """A call: the case, its cache before, what FlashAttention-2 is told beside q and the caches, and what should be written."""

    case: Parity
    cache: Placed
    given: dict[str, Any]
    expected: Written
    leftpad: torch.Tensor | None

    def given_to_three(self) -> dict[str, Any]:
        """What FlashAttention-3 is told."""
        return {"page_table" if name == "block_table" else name: value for name, value in self.given.items()}

    def caches(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the caches as they are before the call, in their layout."""
        return self.cache.tensors["k"].clone(), self.cache.tensors["v"].clone()


def appended(
    case: Parity, layout: Layout, new: int, fraction: float, interleaved: bool, leftpad: bool, device: torch.device | str = "cpu"
) -> Appended:
    """``new`` keys behind those of each of the two sequences, ``fraction`` of each head turned; 0.0 without tables."""
    cache = placed(case, layout, device)
    rng = torch.Generator().manual_seed(5)
    tensors, capacity = cache.tensors, case.lengths_k
    heads = (case.heads[1], tensors["k"].shape[-1]), (case.heads[1], tensors["v"].shape[-1])
    k, v = (torch.randn(2, new, *shape, generator=rng).to(device, tensors["k"].dtype) for shape in heads)
    given = {**cache.given, "k": k, "v": v}
    seqlens = cache.known["seqused_k"].to(device, torch.int32)
    args: dict[str, Any] = {"k_cache": tensors["k"], "v_cache": tensors["v"], "k": k, "v": v, "seqlens_k": seqlens, "q": tensors["q"]}
    if "page_table" in cache.known:
        args["page_table"] = cache.known["page_table"].to(torch.int32)
    if fraction:
        pairs = int(fraction * case.head_dim) // 16 * 8
        angles = torch.outer(torch.arange(_LONGEST), 1000.0 ** (-torch.arange(pairs) / pairs))
        tables = {"rotary_cos": angles.cos().to(device, k.dtype), "rotary_sin": angles.sin().to(device, k.dtype)}
        local = case.causal or any(side >= 0 for side in case.window_size)
        args |= {**tables, "rotary_interleaved": interleaved, "queries_advance": local}
        given |= {**tables, "rotary_interleaved": interleaved}
    padding = torch.tensor([capacity // 4, 3], dtype=torch.int32, device=device) if leftpad and isinstance(capacity, int) else None
    if padding is not None:
        given["cache_leftpad"] = padding
    return Appended(case, cache, given, written(args), padding)


def assert_appended(
    call: Appended, out: torch.Tensor, lse: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, unseen: float
) -> None:
    """Raises AssertionError unless caches and results are as near to float64 as FlashAttention's tests want them."""
    assert_caches(k_cache, v_cache, call.expected)
    known = {**call.cache.known, "seqused_k": call.expected.seqlens_k}
    if call.leftpad is not None:
        known["leftpad_k"] = call.leftpad
    dtype = call.cache.tensors["q"].dtype
    expected, expected_lse = _attended(call, torch.float64, known)
    in_dtype, _ = _attended(call, dtype, known)
    factor = ALIBI_FACTOR if "alibi_slopes" in call.cache.tensors else OUT_FACTOR
    assert_near(out, expected, in_dtype, factor, "out")
    if "rotary_cos" not in call.given:
        assert_lse_near(lse, expected_lse, unseen)


def _attended(call: Appended, dtype: torch.dtype, known: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of what was written, all in ``dtype``."""
    q = call.expected.q
    tensors: Tensors = call.cache.tensors
    device = tensors["q"].device
    turned = {"q": tensors["q"] if q is None else q, "k": call.expected.k_cache, "v": call.expected.v_cache}
    with torch.no_grad():
        out, lse, _ = call.case.expected(tensors | {name: x.to(device, dtype) for name, x in turned.items()}, dtype, **known)
    return out, lse
