"""Band: what each side hides, against the sentence that defines it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtile import errors
from flashtile.band import Band

SIDES = st.none() | st.integers(0, 12)
BANDS = st.builds(Band, SIDES, SIDES)
LENGTHS = st.integers(0, 14)


def sees(band: Band, q: int, k: int, offset: int) -> bool:
    distance = k - q - offset
    return (band.left is None or distance >= -band.left) and (band.right is None or distance <= band.right)


@settings(deadline=None)
@given(BANDS, LENGTHS, LENGTHS)
def test_dense_is_the_definition(band: Band, seqlen_q: int, seqlen_k: int) -> None:
    mask = band.dense(seqlen_q, seqlen_k)
    assert mask.shape == (seqlen_q, seqlen_k)
    for q, k in itertools.product(range(seqlen_q), range(seqlen_k)):
        assert mask[q, k].item() == sees(band, q, k, seqlen_k - seqlen_q)


@settings(deadline=None)
@given(BANDS, LENGTHS, LENGTHS)
def test_transposed_swaps_queries_and_keys(band: Band, seqlen_q: int, seqlen_k: int) -> None:
    assert torch.equal(band.transposed().dense(seqlen_k, seqlen_q), band.dense(seqlen_q, seqlen_k).T)
    assert band.transposed().transposed() == band


@settings(deadline=None)
@given(BANDS, st.integers(1, 14), LENGTHS)
def test_keys_seen_counts_the_union_of_windows(band: Band, seqlen_q: int, seqlen_k: int) -> None:
    assert band.keys_seen(seqlen_q, seqlen_k) == int(band.dense(seqlen_q, seqlen_k).any(dim=0).sum())


@settings(deadline=None)
@given(BANDS, LENGTHS)
def test_simplified_hides_the_same_keys_from_a_lone_query(band: Band, seqlen_k: int) -> None:
    assert torch.equal(band.simplified(1).dense(1, seqlen_k), band.dense(1, seqlen_k))
    assert band.simplified(2) == band


def test_an_offset_of_its_own_moves_the_diagonal() -> None:
    assert Band(None, 0).dense(2, 4, offset=0).tolist() == [[True, False, False, False], [True, True, False, False]]
    assert Band(None, 0).dense(2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]


def test_causal_closes_the_right_side_and_keeps_the_left() -> None:
    assert Band.of(causal=True, window=(7, 3)) == Band(7, 0)
    assert Band.of(causal=False, window=(7, 3)) == Band(7, 3)
    assert Band.of(causal=False).is_full
    assert not Band.of(causal=True).is_full


@pytest.mark.parametrize("window", [(-1, 0), (0, -1), (1.5, 0), (True, 0)])
def test_a_side_that_is_no_count_is_refused_by_name(window: tuple[int, int]) -> None:
    with pytest.raises(errors.ArgumentError, match=r"window \((left|right)\).*Use None"):
        Band.of(window=window)


@pytest.mark.parametrize("window", [5, (1,), (1, 2, 3), "12"])
def test_a_window_that_is_no_pair_is_refused(window: object) -> None:
    with pytest.raises(errors.ArgumentError, match="window: expected a pair"):
        Band.of(window=window)  # type: ignore[arg-type]
