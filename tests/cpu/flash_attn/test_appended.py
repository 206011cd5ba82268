"""flash_attn_with_kvcache of both generations with new keys, rotary embeddings and left padding, against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flashtile.flash_attn_interface as three
from flashtile.errors import ArgumentError, ShapeError, UnsupportedError
from flashtile.flash_attn import flash_attn_with_kvcache
from flashtile.planner.plans import DecodePlan
from flashtile.testing.pairwise import pairwise
from flashtile.testing.parity import Parity
from flashtile.testing.parity_append import appended, assert_appended

pytestmark = pytest.mark.usefixtures("one_thread")

CAPACITY = 120
AXES = {
    "lengths": tuple((queries, CAPACITY) for queries in (1, 4, 150)),
    "heads": ((4, 4), (6, 1), (6, 2)),
    "head_dim": (59, 64, 128),
    "dtype": ("float16", "bfloat16", "float32"),
    "mask": ({}, {"causal": True}, {"window_size": (19, 5)}, {"causal": True, "window_size": (30, -1)}),
    "features": ({}, {"alibi": True}, {"softcap": 15.0}),
    "layout": ("int", "lengths", "batch index", 1, 16, 256),
    "num_splits": (0, 1),
    "new": (1, 4, 7),
    "fraction": (0.0, 0.5, 1.0),
    "interleaved": (False, True),
    "leftpad": (False, True),
}
ROWS = pairwise(AXES, seed=9)
OF_THE_CALL = ("layout", "num_splits", "new", "fraction", "interleaved", "leftpad")


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_parity(row: dict[str, Any]) -> None:
    case = Parity.of({name: value for name, value in row.items() if name not in OF_THE_CALL})
    call = appended(case, *(row[name] for name in ("layout", "new", "fraction", "interleaved", "leftpad")))
    q, slopes = call.cache.tensors["q"], call.cache.tensors.get("alibi_slopes")
    args = case.scores | {"num_splits": row["num_splits"], "return_softmax_lse": True}
    k_cache, v_cache = call.caches()
    out, lse = flash_attn_with_kvcache(q, k_cache, v_cache, alibi_slopes=slopes, **call.given, **args)
    assert_appended(call, out, lse, k_cache, v_cache, math.inf)
    if slopes is None:
        k_cache, v_cache = call.caches()
        out, lse, *_ = three.flash_attn_with_kvcache(q, k_cache, v_cache, **call.given_to_three(), **args)
        assert_appended(call, out, lse, k_cache, v_cache, -math.inf)


@pytest.mark.parametrize("own_positions", [False, True])
def test_packed_queries_and_keys(own_positions: bool) -> None:
    """Sequences that take turns: one token of one, three of the other, as a batch with each by itself."""
    rng = torch.Generator().manual_seed(0)
    rows = lambda *shape: torch.randn(*shape, 64, generator=rng)  # noqa: E731
    q, k, v, caches = rows(4, 4), rows(4, 2), rows(4, 2), (rows(2, 30, 2), rows(2, 30, 2))
    angles = torch.outer(torch.arange(60), 100.0 ** (-torch.arange(16) / 16))
    tables: dict[str, Any] = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "causal": True}
    starts, lengths = torch.tensor([0, 1, 4], dtype=torch.int32), torch.tensor([9, 20], dtype=torch.int32)
    positions = torch.tensor([30, 2], dtype=torch.int32) if own_positions else None
    packed = [cache.clone() for cache in caches]
    out = three.flash_attn_with_kvcache(
        q, *packed, k, v, cache_seqlens=lengths, cu_seqlens_q=starts, cu_seqlens_k_new=starts, max_seqlen_q=3, rotary_seqlens=positions,
        **tables,
    )  # fmt: skip
    for b, (first, end) in enumerate(((0, 1), (1, 4))):
        alone = [cache[b : b + 1].clone() for cache in caches]
        here, one = slice(first, end), slice(b, b + 1)
        expected = three.flash_attn_with_kvcache(
            q[None, here], *alone, k[None, here], v[None, here], cache_seqlens=lengths[one],
            rotary_seqlens=None if positions is None else positions[one], **tables,
        )  # fmt: skip
        torch.testing.assert_close(out[here], expected[0])
        for cache, cache_alone in zip(packed, alone):
            assert torch.equal(cache[b], cache_alone[0])


def test_what_was_appended_is_there_for_the_next_call() -> None:
    """Token by token, with lengths that grow, is the whole sequence at once."""
    rng = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 9, heads, 32, generator=rng) for heads in (4, 2, 2))
    angles = torch.outer(torch.arange(9), 100.0 ** (-torch.arange(16) / 16))
    tables: dict[str, Any] = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "rotary_interleaved": False, "causal": True}
    whole = flash_attn_with_kvcache(q, torch.zeros(2, 16, 2, 32), torch.zeros(2, 16, 2, 32), k, v, cache_seqlens=0, **tables)
    caches = torch.zeros(2, 16, 2, 32), torch.zeros(2, 16, 2, 32)
    lengths = torch.zeros(2, dtype=torch.int32)
    steps = []
    for i in range(9):
        now = slice(i, i + 1)
        steps.append(flash_attn_with_kvcache(q[:, now], *caches, k[:, now], v[:, now], cache_seqlens=lengths, **tables))
        lengths += 1
    torch.testing.assert_close(torch.cat(steps, 1), whole)


STRIDED = (("q",), ("k",), ("v",), ("k_cache",), ("v_cache",), ("q", "k", "v"))


@pytest.mark.parametrize("names", STRIDED, ids="-".join)
@pytest.mark.parametrize("new", [False, True])
def test_layouts_without_a_contiguous_last_dimension_are_copied(names: tuple[str, ...], new: bool) -> None:
    """All but the caches that are written to, which are refused: a copy would be what is written."""
    rng = torch.Generator().manual_seed(4)
    heads = {"q": (3, 4), "k_cache": (20, 2), "v_cache": (20, 2)} | ({"k": (3, 2), "v": (3, 2)} if new else {})
    plain = {name: torch.randn(2, *shape, 32, generator=rng) for name, shape in heads.items()}
    given: dict[str, Any] = {"cache_seqlens": torch.tensor([7, 16], dtype=torch.int32), "causal": True}
    given |= {"rotary_cos": torch.rand(20, 8, generator=rng), "rotary_sin": torch.rand(20, 8, generator=rng)} if new else {}
    strided = {name: x.transpose(1, 3).contiguous().transpose(1, 3) if name in names else x.clone() for name, x in plain.items()}
    for function in (flash_attn_with_kvcache, three.flash_attn_with_kvcache):
        if new and {"k_cache", "v_cache"} & set(names):
            with pytest.raises(ShapeError, match=names[0]):
                function(**strided, **given)
        else:
            assert torch.equal(function(**strided, **given), function(**plain, **given))


@pytest.mark.parametrize("new", [False, True])
def test_the_usual_step_is_passed_on_without_any_operation(new: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would take the host as long as all that is done here: tensors arrive as they are, and nothing runs but append and decode."""
    q, row, lengths = torch.zeros(2, 1, 4, 64), torch.zeros(2, 1, 2, 64), torch.zeros(2, dtype=torch.int32)
    cache, table, turned, later, out = torch.zeros(2, 16, 2, 64), torch.zeros(16, 16), q.clone(), lengths.clone(), q.clone()

    def append_kv(*args: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert all(arg is wanted for arg, wanted in zip(args, (cache, cache, row, row, lengths))) and named["q"] is q
        return later, turned

    def decode(*args: Any, **named: Any) -> torch.Tensor:
        assert all(arg is wanted for arg, wanted in zip(args, (turned if new else q, cache, cache, later if new else lengths)))
        assert named["scale"] is None and named["window"] is None and named["after_append"] is new
        return out

    class Refused(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(f"{func} runs")

    monkeypatch.setattr("flashtile.flash_attn.cache.append_kv", append_kv)
    monkeypatch.setattr("flashtile.flash_attn.cache.decode", decode)
    given = {"k": row, "v": row, "rotary_cos": table, "rotary_sin": table} if new else {}
    for function in (flash_attn_with_kvcache, three.flash_attn_with_kvcache):
        with Refused():
            assert function(q, cache, cache, cache_seqlens=lengths, causal=True, **given) is out


@pytest.mark.parametrize("layout", ["lengths", "batch index", 16])
def test_compilers_see_one_graph(layout: Any) -> None:
    call = appended(Parity(4, CAPACITY, heads=(4, 2), causal=True), layout, 4, 0.5, True, layout == "lengths")
    q, (k_cache, v_cache) = call.cache.tensors["q"], call.caches()
    compiled = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    out, lse = compiled(q, k_cache, v_cache, causal=True, return_softmax_lse=True, **call.given)
    assert_appended(call, out, lse, k_cache, v_cache, math.inf)


def test_plans_know_left_padding() -> None:
    lengths = torch.ones(2, dtype=torch.int32)
    plan = three.get_scheduler_metadata(2, 300, CAPACITY, 4, 2, 64, lengths, cache_leftpad=lengths, causal=True, sm_margin=8)
    assert isinstance(plan, DecodePlan), "attention over pages has no padding"
    call = appended(Parity(300, CAPACITY, heads=(4, 2), causal=True), "lengths", 4, 0.0, True, True)
    q, (k_cache, v_cache) = call.cache.tensors["q"], call.caches()
    args: dict[str, Any] = {"causal": True, "return_softmax_lse": True, **call.given}
    out, lse, *_ = three.flash_attn_with_kvcache(q, k_cache, v_cache, scheduler_metadata=plan, sm_margin=8, **args)
    assert_appended(call, out, lse, k_cache, v_cache, -math.inf)
    whole = three.get_scheduler_metadata(2, 300, CAPACITY, 4, 2, 64, lengths, causal=True, max_seqlen_k_new=4, cu_seqlens_k_new=lengths)
    with pytest.raises(UnsupportedError, match="left padding"):
        three.flash_attn_with_kvcache(q, k_cache, v_cache, scheduler_metadata=whole, **args)


@pytest.mark.parametrize("quantised", [torch.float8_e4m3fn, torch.int8])
def test_descales_are_those_of_the_cache(quantised: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(2)
    q = torch.randn(2, 1, 4, 64, generator=rng).to(torch.bfloat16)
    k, v = ((torch.randn(2, 50, 2, 64, generator=rng) * 20).to(quantised) for _ in range(2))
    k_descale, v_descale = torch.rand(2, 2, generator=rng) / 10, torch.rand(2, 2, generator=rng) / 10
    out = three.flash_attn_with_kvcache(q, k, v, cache_seqlens=40, k_descale=k_descale, v_descale=v_descale)
    wide = [(x.double() * scale[:, None, :, None]).to(torch.bfloat16) for x, scale in ((k, k_descale), (v, v_descale))]
    torch.testing.assert_close(out, three.flash_attn_with_kvcache(q, *wide, cache_seqlens=40), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("as_codes", [False, True])
@pytest.mark.parametrize("quantised", [torch.float8_e4m3fn, torch.int8])
def test_new_keys_of_a_quantised_cache(quantised: torch.dtype, as_codes: bool) -> None:
    """New keys come as floats, which are scaled and rounded, or as codes, which are not; either way they are what is attended to."""
    rng = torch.Generator().manual_seed(3)
    q = torch.randn(2, 1, 4, 64, generator=rng).to(torch.bfloat16)
    caches = [(torch.randn(2, 50, 2, 64, generator=rng) * 20).to(quantised) for _ in range(2)]
    scales = {name: torch.rand(2, 2, generator=rng) / 10 + 0.05 for name in ("k_descale", "v_descale")}
    codes = [(torch.randn(2, 1, 2, 64, generator=rng) * 20).round().to(quantised) for _ in range(2)]
    new = codes if as_codes else [(x.float() * scale[:, None, :, None]).float() for x, scale in zip(codes, scales.values())]
    whole = [cache.clone() for cache in caches]
    for cache, x in zip(whole, codes):
        cache[:, 40:41] = x
    expected = three.flash_attn_with_kvcache(q, *whole, cache_seqlens=41, **scales)
    out = three.flash_attn_with_kvcache(q, *caches, *new, cache_seqlens=40, **scales)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(caches, whole))
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"v": None}, ArgumentError, "k and v"),
        ({"k": None}, ArgumentError, "k and v"),
        ({"cache_seqlens": None}, ArgumentError, "cache_seqlens"),
        ({"k": None, "v": None}, ArgumentError, "rotary_cos: expected None without new keys"),
        ({"rotary_sin": None}, ArgumentError, "rotary_cos and rotary_sin"),
        ({"k": torch.zeros(2, 1, 3, 64)}, ShapeError, "k:"),
        ({"cache_leftpad": torch.zeros(3, dtype=torch.int32)}, ShapeError, "leftpad_k"),
    ],
    ids=range(7),
)  # fmt: skip
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], match: str) -> None:
    cache, new, table = torch.zeros(2, 30, 2, 64), torch.zeros(2, 1, 2, 64), torch.zeros(40, 16)
    given = {"k": new, "v": new, "rotary_cos": table, "rotary_sin": table, "cache_seqlens": torch.zeros(2, dtype=torch.int32)} | change
    for function in (flash_attn_with_kvcache, three.flash_attn_with_kvcache):
        with pytest.raises(error, match=match):
            function(torch.zeros(2, 1, 4, 64), cache.clone(), cache.clone(), **given)
