"""Traces and their quantiles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flashtile.testing.traffic import Quantiles, Request, code_quantiles, conversation_quantiles, read_trace


@pytest.mark.parametrize(("read", "requests"), [(conversation_quantiles, 19366), (code_quantiles, 8819)])
def test_the_shipped_quantiles_are_whole_and_cited(read: Callable[[], Quantiles], requests: int) -> None:
    quantiles = read()
    for column in (quantiles.context_tokens, quantiles.generated_tokens):
        assert len(column) == 101
        assert list(column) == sorted(column)
        assert column[0] >= 1
    assert quantiles.requests == requests
    assert "CC-BY" in quantiles.source
    assert "Splitwise" in quantiles.citation


def test_code_has_longer_prompts_and_shorter_answers_than_conversation() -> None:
    code, conversation = code_quantiles(), conversation_quantiles()
    assert code.context_tokens[50] > conversation.context_tokens[50]
    assert code.generated_tokens[50] < conversation.generated_tokens[50]


@pytest.mark.parametrize("count", [1, 8, 100])
def test_drawn_requests_follow_the_quantiles(count: int) -> None:
    quantiles = conversation_quantiles()
    requests = quantiles.draw(count, seed=1)
    assert len(requests) == count
    assert requests == quantiles.draw(count, seed=1)
    # Sorted, the i-th prompt comes from the i-th slice of the distribution.
    for index, context in enumerate(sorted(request.context_tokens for request in requests)):
        low, high = quantiles.context_tokens[100 * index // count], quantiles.context_tokens[-(-100 * (index + 1) // count)]
        assert low <= context <= high


def test_a_trace_is_sorted_and_starts_at_zero(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2024-05-10 00:00:00.009930+00:00,1,0\n"
        "2023-11-16 18:15:47,5,6\n"
    )
    requests = read_trace(path)
    assert [request.context_tokens for request in requests] == [374, 5, 396, 1]
    assert [round(request.arrival, 5) for request in requests[:3]] == [0.0, 0.31941, 4.31458]
    assert requests[0] == Request(0.0, 374, 44)
    assert requests[0].cut(50) == Request(0.0, 50, 44)
