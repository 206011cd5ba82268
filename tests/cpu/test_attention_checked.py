"""Calls of attention_varlen within `flashtile.checked`: wrong lengths and pages are named."""

from __future__ import annotations

import pytest
import torch

import flashtile
from flashtile.errors import ArgumentError
from flashtile.testing.forward_cases import FORWARD_CASES
from flashtile.testing.forward_inputs import make_forward_inputs
from tests.cpu.attention_calls import run, varlen


def test_checked_accepts_what_is_right() -> None:
    for case in FORWARD_CASES:
        if case.name in {"no_keys", "varlen_everything", "varlen_spare_rows", "varlen_batch_zero", "pages_of_16", "pages_batch_zero"}:
            with flashtile.checked():
                run(make_forward_inputs(case).args)


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize(("starts", "entry"), [((1, 9, 13), 0), ((0, 9, 8), 2), ((0, 9, 99), 2), ((0, -1, 13), 1)])
def test_checked_names_the_first_bad_start(name: str, starts: tuple[int, ...], entry: int) -> None:
    args = varlen() | {name: torch.tensor(starts, dtype=torch.int32)}
    run(args)
    with flashtile.checked(), pytest.raises(ArgumentError, match=rf"{name}\[{entry}\]: .* got {starts[entry]}\."):
        run(args)


def test_checked_names_a_sequence_longer_than_it_was_said_to_be() -> None:
    args = varlen() | {"max_seqlen_q": 8}
    run(args)
    with flashtile.checked(), pytest.raises(ArgumentError, match=r"cu_seqlens_q\[1\]: .*max_seqlen_q \(8\).* got 9\."):
        run(args)


@pytest.mark.parametrize(("used", "entry"), [((31, 5), 0), ((30, 13), 1), ((30, -1), 1)])
def test_checked_names_keys_that_a_sequence_has_not(used: tuple[int, int], entry: int) -> None:
    args = varlen(seqused_k=used)
    run(args)
    with flashtile.checked(), pytest.raises(ArgumentError, match=rf"seqused_k\[{entry}\]: .*the sequence has, .* got {used[entry]}\."):
        run(args)


def test_checked_names_the_first_bad_page() -> None:
    args = varlen(page_size=8)
    args["page_table"][1, 1] = 1000
    run(args)
    with flashtile.checked(), pytest.raises(ArgumentError, match=r"page_table\[1, 1\]: .* got 1000"):
        run(args)
    args["seqused_k"][1] = 8
    with flashtile.checked():
        run(args)
    args["seqused_k"][0] = 99
    with flashtile.checked(), pytest.raises(ArgumentError, match=r"seqused_k\[0\]: .*pages hold, 40, got 99"):
        run(args)


def test_checked_forgives_pages_that_the_window_has_left() -> None:
    args = varlen(page_size=8, causal=True)
    args["page_table"][0, 0] = -1
    with flashtile.checked():
        run(args | {"window": (10, 0)})
        with pytest.raises(ArgumentError, match=r"page_table\[0, 0\]"):
            run(args)
