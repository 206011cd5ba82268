"""More queries or keys than kernels count are refused before anything runs, whatever was called before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashtile
from flashtile.arguments.counts import MOST_TOKENS
from flashtile.errors import UnsupportedError

PAGE = 2**20
ROWS = torch.ones(16)


def tokens(*counts: int, heads: int = 1) -> torch.Tensor:
    """(*counts, heads, 16) that share one head's memory."""
    return ROWS.as_strided((*counts, heads, 16), (*(0 for _ in counts), 0, 1))


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def contiguous(capacity: int) -> dict[str, Any]:
    return {"q": tokens(2, 1), "k_cache": tokens(2, capacity), "v_cache": tokens(2, capacity), "seqlens_k": numbers(3, 0)}


def paged(num_pages: int, max_pages: int) -> dict[str, Any]:
    cache = tokens(num_pages, PAGE)
    table = torch.zeros(1, dtype=torch.int32).expand(2, max_pages).contiguous()
    return {"q": tokens(2, 1), "k_cache": cache, "v_cache": cache, "seqlens_k": numbers(3, 0), "page_table": table}


def packed(total_q: int) -> dict[str, Any]:
    return contiguous(8) | {"q": tokens(total_q), "cu_seqlens_q": numbers(0, 1, 2), "max_seqlen_q": 1}


@pytest.mark.parametrize("hint", [{}, {"max_seqlen_k": 3}], ids=["", "hint"])
@pytest.mark.parametrize(
    ("name", "usual", "many"),
    [
        ("k_cache", contiguous(8), contiguous(MOST_TOKENS + 1)),
        ("k_cache", paged(3, 2), paged(MOST_TOKENS + 1, 2)),
        ("page_table", paged(3, 2), paged(3, MOST_TOKENS // PAGE + 1)),
        ("q", packed(2), packed(MOST_TOKENS + 1)),
    ],
    ids=["keys", "pages", "table", "queries"],
)
def test_decode(name: str, usual: dict[str, Any], many: dict[str, Any], hint: dict[str, int]) -> None:
    assert torch.equal(flashtile.decode(**usual, **hint)[0], torch.ones_like(flashtile.decode(**usual)[0]))
    with pytest.raises(UnsupportedError, match=rf"{name}: expected at most 2\^30 .*merge"):
        flashtile.decode(**many, **hint)


@pytest.mark.parametrize("hint", [{}, {"max_seqlen_k": 3}], ids=["", "hint"])
@pytest.mark.parametrize("name", ["k", "pages", "page_table", "q"])
def test_attention_varlen(name: str, hint: dict[str, int]) -> None:
    starts = {"cu_seqlens_q": numbers(0, 1, 2), "max_seqlen_q": 1}
    usual: dict[str, Any] = {"q": tokens(2), **starts}
    if name in ("pages", "page_table"):
        cache, wide = tokens(3, PAGE), tokens(MOST_TOKENS + 1, PAGE)
        usual |= {"k": cache, "v": cache, "cu_seqlens_k": None, "page_table": numbers(0, 0).view(2, 1), "seqused_k": numbers(3, 1)}
        long = torch.zeros(2, MOST_TOKENS // PAGE + 1, dtype=torch.int32)
        many = usual | ({"k": wide, "v": wide} if name == "pages" else {"page_table": long})
    else:
        usual |= {"k": tokens(8), "v": tokens(8), "cu_seqlens_k": numbers(0, 3, 8)}
        wide = tokens(MOST_TOKENS + 1)
        many = usual | ({"q": wide} if name == "q" else {"k": wide, "v": wide})
    assert torch.equal(flashtile.attention_varlen(**usual, **hint), torch.ones(2, 1, 16))
    named = "k" if name == "pages" else name
    with pytest.raises(UnsupportedError, match=rf"^{named}: expected at most 2\^30 .*merge"):
        flashtile.attention_varlen(**many, **hint)


def test_attention() -> None:
    few, wide = tokens(1, 2), tokens(1, MOST_TOKENS + 1)
    with pytest.raises(UnsupportedError, match=r"^k: expected at most 2\^30 keys of a sequence, got 1073741825"):
        flashtile.attention(few, wide, wide)
    with pytest.raises(UnsupportedError, match=r"^q: expected at most 2\^30 queries"):
        flashtile.attention(wide, few, few)


def test_appends() -> None:
    long = paged(3, MOST_TOKENS // PAGE + 1)
    with pytest.raises(UnsupportedError, match=r"^page_table: expected at most 2\^30 keys"):
        flashtile.append_kv(long["k_cache"], long["v_cache"], tokens(2, 1), tokens(2, 1), long["seqlens_k"], page_table=long["page_table"])


def test_as_many_as_there_may_be() -> None:
    """A table of so many pages is computed: its lengths say how much of it is read."""
    assert flashtile.decode(**paged(3, MOST_TOKENS // PAGE), max_seqlen_k=3)[0].eq(1).all()
