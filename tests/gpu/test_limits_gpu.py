"""Nothing outside: caches beyond 2^31 elements, memory full of NaN, lengths and page ids that make no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashtile import reference
from flashtile.band import Band
from flashtile.testing.cases import Case
from flashtile.testing.inputs import make_inputs
from flashtile.testing.tolerance import assert_close

FAR = 2**31
NAN = float("nan")


def lengths_on(device: torch.device, *lengths: int) -> torch.Tensor:
    return torch.tensor(lengths, dtype=torch.int32, device=device)


def in_chunks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: int = 1 << 20) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 attention of (1, 1, hq, d) over keys (1, n, hk, d), a chunk at a time, folded in float64."""
    total, sums = None, 0.0
    for start in range(0, k.shape[1], step):
        out, lse = reference.attention(q, k[:, start : start + step], v[:, start : start + step], band=Band(), dtype=torch.float32)
        lse = lse.double().transpose(1, 2)[..., None]
        total = lse if total is None else torch.logaddexp(total, lse)
        sums = sums + torch.exp(lse - 10.0) * out.double()
    return sums / torch.exp(total - 10.0), total[..., 0].transpose(1, 2)


def test_contiguous_cache_beyond_2_31_elements(device: torch.device, library: Any) -> None:
    seqlen_k = 17_000_001
    q, k, v = (torch.randn(1, n, h, 128, dtype=torch.bfloat16, device=device) for n, h in ((1, 4), (seqlen_k, 1), (seqlen_k, 1)))
    assert k.numel() > FAR
    out, lse = library.decode_with_lse(q, k, v, lengths_on(device, seqlen_k))
    expected, expected_lse = in_chunks(q, k, v)
    assert_close(out, lse, expected, expected_lse, what="17 million keys")


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_the_far_end_of_a_large_cache(layout: str, device: torch.device, library: Any) -> None:
    seqlen_k, heads, window = 9_000_000, 3, 300
    shape = (1, heads, seqlen_k, 128) if layout == "HND" else (1, seqlen_k, heads, 128)
    k, v = (torch.full(shape, NAN, dtype=torch.float16, device=device) for _ in range(2))
    k, v = (cache.transpose(1, 2) if layout == "HND" else cache for cache in (k, v))
    for cache in (k, v):
        cache[:, -window - 1 :] = torch.randn(1, window + 1, heads, 128, dtype=torch.float16, device=device)
    q = torch.randn(1, 1, 6, 128, dtype=torch.float16, device=device)
    out, lse = library.decode_with_lse(q, k, v, lengths_on(device, seqlen_k), window=(window, 0))
    expected = reference.attention(q, k[:, -window - 1 :], v[:, -window - 1 :])
    assert_close(out, lse, *expected, what=layout)


def test_pages_beyond_2_31_elements(device: torch.device, library: Any) -> None:
    page_size, pages, lengths = 16, 1_075_000, (500, 17, 333)
    k, v = (torch.full((pages, page_size, 1, 128), NAN, dtype=torch.bfloat16, device=device) for _ in range(2))
    assert k.numel() > FAR
    rows = [-(-n // page_size) for n in lengths]
    # ids on both sides of the element 2^31
    first = FAR // (page_size * 128) - rows[0] // 2
    ids = torch.arange(first, first + sum(rows), device=device)[torch.randperm(sum(rows), device=device)]
    table = torch.full((3, max(rows) + 2), 2**31 - 1, dtype=torch.int32, device=device)
    for row, part in zip(table, ids.split(rows)):
        row[: len(part)] = part.int()
    for cache in (k, v):
        cache[ids] = torch.randn(len(ids), page_size, 1, 128, dtype=torch.bfloat16, device=device)
    args = {"q": torch.randn(3, 1, 8, 128, dtype=torch.bfloat16, device=device), "k_cache": k, "v_cache": v, "page_table": table}
    out, lse = library.decode_with_lse(**args, seqlens_k=lengths_on(device, *lengths))
    assert_close(out, lse, *reference.decode(**args, seqlens_k=lengths_on(device, *lengths)), what="high page ids")


def test_keys_so_far_apart_that_a_tile_spans_2_31_elements(device: torch.device, library: Any) -> None:
    seqlen_k, stride, dim = 40, 2**26, 64
    buffer = torch.empty(seqlen_k * stride, dtype=torch.float16, device=device)
    k = buffer.as_strided((1, seqlen_k, 1, dim), (seqlen_k * stride, stride, dim, 1))
    v = buffer.as_strided((1, seqlen_k, 1, dim), (seqlen_k * stride, stride, dim, 1), dim)
    k.copy_(torch.randn(k.shape, device=device))
    v.copy_(torch.randn(v.shape, device=device))
    q = torch.randn(1, 1, 4, dim, dtype=torch.float16, device=device)
    out, lse = library.decode_with_lse(q, k, v, lengths_on(device, seqlen_k))
    assert_close(out, lse, *reference.attention(q, k, v), what="far keys")


@pytest.mark.parametrize("page_size", [0, 1, 16])
@pytest.mark.parametrize("num_splits", [1, 5])
def test_lengths_that_make_no_sense_are_clamped(page_size: int, num_splits: int, device: torch.device, library: Any) -> None:
    case = Case("clamped", (48, 48, 48, 48), 1, 8, 2, head_dim=128, dtype="bfloat16", page_size=page_size, capacity=48)
    inputs = make_inputs(case, device, seed=1)
    wild = inputs.args | {"seqlens_k": lengths_on(device, 2**31 - 1, -(2**31), 49, -1)}
    clamped = inputs.args | {"seqlens_k": lengths_on(device, 48, 0, 48, 0)}
    out, lse = library.decode_with_lse(**wild, num_splits=num_splits)
    assert_close(out, lse, *reference.decode(**clamped), what="clamped lengths")
    assert (out[1::2] == 0).all()
    assert (lse[1::2] == float("-inf")).all()


@pytest.mark.parametrize("bad", [2**31 - 1, -(2**31), -1, 10**6])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_page_ids_outside_the_cache_make_their_keys_invisible(bad: int, num_splits: int, device: torch.device, library: Any) -> None:
    inputs = make_inputs(Case("masked", (130, 64, 16), 2, 8, 2, head_dim=64, dtype="float16", page_size=16), device, seed=2)
    table = inputs.args["page_table"]
    table[0, 3], table[1, 0], table[2, 0] = bad, bad, bad
    out, lse = library.decode_with_lse(**inputs.args, num_splits=num_splits)
    assert_close(out, lse, *reference.decode(**inputs.args), what=f"page id {bad}")
    assert (out[2] == 0).all()


def test_entries_past_the_end_of_a_page_table_change_nothing(device: torch.device, library: Any) -> None:
    inputs = make_inputs(Case("tail", (33, 80), 1, 8, 2, head_dim=128, dtype="bfloat16", page_size=16, capacity=4096), device, seed=3)
    table = inputs.args["page_table"]
    out = library.decode(**inputs.args)
    for filler in (0, -1, 2**31 - 1, -(2**31)):
        table[0, 3:], table[1, 5:] = filler, filler
        assert torch.equal(library.decode(**inputs.args), out)


def test_starts_of_packed_queries_outside_q_write_nothing_outside(device: torch.device, library: Any) -> None:
    inputs = make_inputs(Case("starts", (40, 20), (2, 3), 4, 2, head_dim=64, dtype="float16", ragged_q=True), device, seed=4)
    guard = torch.full((64 + 5 + 64, 4, 64), 7.0, dtype=torch.float16, device=device)
    out = guard[64:69]
    inputs.args["cu_seqlens_q"].copy_(lengths_on(device, 0, 2, 2**30))
    library.decode(**inputs.args, out=out)
    torch.cuda.synchronize()
    assert (guard[:64] == 7.0).all()
    assert (guard[69:] == 7.0).all()


@pytest.mark.parametrize("num_splits", [1, 4])
def test_nothing_is_written_around_out(num_splits: int, device: torch.device, library: Any) -> None:
    inputs = make_inputs(Case("guarded", (100, 7, 0), 3, 6, 2, head_dim=40, dtype="bfloat16"), device, seed=5)
    guard = torch.full((3, 5, 8, 56), 7.0, dtype=torch.bfloat16, device=device)
    out = guard[:, 1:4, 1:7, 8:48]
    library.decode(**inputs.args, out=out, num_splits=num_splits)
    assert_close(out, None, reference.decode(**inputs.args)[0], None, what="a view inside a larger out")
    out.fill_(7.0)
    assert (guard == 7.0).all()
