"""The serving engine: every token once, no page shared, nothing lost."""

from __future__ import annotations

import pytest
import torch

from flashtile import reference
from flashtile.errors import ArgumentError
from flashtile.testing.sdpa import gather_step
from flashtile.testing.serving import Engine, Heads
from flashtile.testing.tolerance import relative_l2
from flashtile.testing.traffic import Request

HEADS = Heads(4, 2, 16, torch.float32)
CPU = torch.device("cpu")


def engine(num_pages: int = 64, page_size: int = 4, **options: int) -> Engine:
    return Engine(HEADS, CPU, num_pages=num_pages, page_size=page_size, **options)


def test_requests_are_served_to_their_ends_and_pages_come_back() -> None:
    served = engine(chunk_tokens=8, max_running=3)
    requests = [Request(0.0, context, generated) for context, generated in ((13, 4), (5, 1), (30, 2), (1, 6), (9, 0))]
    for request in requests:
        served.submit(request)
    queries = 0
    while (step := served.step()) is not None:
        queries += step.num_queries
        owned = [page for sequence in served.running for page in sequence.pages]
        assert len(owned) == len(set(owned))
        assert len(owned) + served.cache.num_free == served.cache.num_pages
        assert len(step.seqlens_q) <= 3
        for cache in (step.call["k_cache"], step.call["v_cache"]):
            for row, length in zip(step.call["page_table"], step.seqlens_k):
                assert cache[row[row >= 0].long()].flatten(0, 1)[:length].isfinite().all()
    assert queries == sum(r.context_tokens + max(0, r.generated_tokens - 1) for r in requests)
    assert served.num_finished == len(requests)
    assert served.cache.num_free == served.cache.num_pages


def test_prompts_come_in_chunks_beside_decoding_sequences() -> None:
    served = engine(chunk_tokens=8)
    served.place(Request(0.0, 10, 20), 12)
    served.submit(Request(0.0, 17, 3))
    kinds = [(step.kind, step.seqlens_q) for step in (served.step() for _ in range(4)) if step is not None]
    assert kinds == [("mixed", (1, 7)), ("mixed", (1, 7)), ("mixed", (1, 3)), ("decode", (1, 1))]


def test_a_full_batch_does_not_starve_prompts() -> None:
    served = engine(chunk_tokens=1, num_pages=256)
    for _ in range(4):
        served.place(Request(0.0, 3, 50), 5)
    served.submit(Request(0.0, 8, 2))
    assert [step.kind for step in (served.step() for _ in range(3)) if step is not None] == ["mixed", "mixed", "decode"]


def test_drafts_are_appended_and_taken_back() -> None:
    served = engine(max_draft_tokens=3)
    served.place(Request(0.0, 10, 9), 11)
    step = served.step(3)
    assert step is not None
    assert (step.kind, step.seqlens_q, step.seqlens_k) == ("speculative", (4,), (15,))
    rejected = served.reject_drafts(3)
    assert 0 <= rejected <= 3
    assert served.running[0].num_keys == 15 - rejected
    with pytest.raises(ArgumentError, match="draft_tokens"):
        served.step(4)


def test_requests_wait_for_pages_and_giants_are_refused() -> None:
    served = engine(num_pages=4, page_size=4)
    for context in (12, 8, 100):
        served.submit(Request(0.0, context, 2))
    step = served.step()
    assert step is not None
    assert step.seqlens_k == (12,)
    assert len(served.waiting) == 1
    assert served.num_refused == 1
    with pytest.raises(ArgumentError, match="larger cache"):
        served.place(Request(0.0, 8, 2), 8)


def test_sdpa_on_gathered_keys_agrees_with_the_reference() -> None:
    served = engine(chunk_tokens=6, max_draft_tokens=3)
    served.place(Request(0.0, 10, 20), 12)
    served.place(Request(0.0, 5, 20), 7)
    served.submit(Request(0.0, 9, 3))
    kinds = []
    for drafts in (0, 0, 0, 3, 0):
        step = served.step(drafts)
        assert step is not None
        kinds.append(step.kind)
        expected, _ = reference.decode(**step.call)
        assert relative_l2(gather_step(step).out().view_as(expected), expected) < 1e-5
    assert kinds == ["mixed", "mixed", "mixed", "speculative", "decode"]
