"""The reference against a loop over single scores in Python floats."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from flashtile import reference
from flashtile.band import Band
from flashtile.testing.cases import SMALL_CASES, Case
from flashtile.testing.inputs import make_inputs


def by_hand(case: Case, args: dict[str, Any]) -> dict[tuple[int, int, int], tuple[list[float], float]]:
    """(sequence, query position, head) -> (out, lse), one score at a time."""
    results = {}
    group = case.num_heads_q // case.num_heads_kv
    left, right = case.window or (None, None)
    right = 0 if case.causal else right
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    row = 0
    for i, (seqlen_q, length) in enumerate(zip(case.query_lengths, case.seqlens_k)):
        seqlen_k = min(max(length, 0), case.room)
        for position in range(seqlen_q):
            for head in range(case.num_heads_q):
                q = (args["q"][row] if case.ragged_q else args["q"][i, position])[head].double()
                logits, values = [], []
                for key in range(seqlen_k):
                    distance = key - (position + seqlen_k - seqlen_q)
                    where = place(case, args, i, key)
                    hidden = (left is not None and distance < -left) or (right is not None and distance > right) or where is None
                    if hidden:
                        continue
                    score = float(q @ args["k_cache"][where][head // group].double()) * scale
                    if case.softcap:
                        score = case.softcap * math.tanh(score / case.softcap)
                    if case.alibi:
                        slopes = args["alibi_slopes"]
                        score -= float(slopes[i, head] if slopes.ndim == 2 else slopes[head]) * abs(distance)
                    logits.append(score)
                    values.append(args["v_cache"][where][head // group].double())
                results[i, position, head] = softmax(logits, values, float(args["sinks"][head]) if case.sinks else None, case.head_dim_v)
            row += 1
    return results


def place(case: Case, args: dict[str, Any], i: int, key: int) -> tuple[int, int] | None:
    if not case.page_size:
        return i, key
    page = int(args["page_table"][i, key // case.page_size])
    return (page, key % case.page_size) if 0 <= page < args["k_cache"].shape[0] else None


def softmax(logits: list[float], values: list[torch.Tensor], sink: float | None, head_dim_v: int) -> tuple[list[float], float]:
    everything = logits + ([] if sink is None else [sink])
    if not everything:
        return [0.0] * head_dim_v, -math.inf
    largest = max(everything)
    total = math.fsum(math.exp(x - largest) for x in everything)
    out = torch.zeros(head_dim_v, dtype=torch.float64)
    for score, value in zip(logits, values):
        out += math.exp(score - largest) / total * value
    return out.tolist(), largest + math.log(total)


FEW = (
    "pages_missing", "everything", "everything_contiguous_fp32", "window_both_sides", "more_queries_than_keys",
    "alibi_per_sequence_paged", "alibi_not_causal_fp32", "softcap", "sinks", "beyond_capacity", "negative_length",
    "ragged_spare_rows", "pages_of_3_hnd", "negative_scale",
)  # fmt: skip


@pytest.mark.parametrize("case", [c for c in SMALL_CASES if c.name in FEW], ids=lambda c: c.name)
def test_decode_is_the_formula(case: Case) -> None:
    args = make_inputs(case).args
    out, lse = reference.decode(**args)
    row = 0
    expected = by_hand(case, args)
    for i, seqlen_q in enumerate(case.query_lengths):
        for position in range(seqlen_q):
            got_out = out[row] if case.ragged_q else out[i, position]
            got_lse = lse[:, row] if case.ragged_q else lse[i, :, position]
            wanted = [expected[i, position, head] for head in range(case.num_heads_q)]
            torch.testing.assert_close(got_out, torch.tensor([w[0] for w in wanted], dtype=torch.float64), rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(got_lse, torch.tensor([w[1] for w in wanted], dtype=torch.float64), rtol=1e-10, atol=1e-10)
            row += 1


def test_rows_of_nobody_are_empty() -> None:
    case = next(c for c in SMALL_CASES if c.name == "ragged_spare_rows")
    out, lse = reference.decode(**make_inputs(case).args)
    assert (out[-case.spare_rows :] == 0).all()
    assert (lse[:, -case.spare_rows :] == -math.inf).all()
    assert lse[:, : -case.spare_rows].isfinite().all()


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda c: c.name)
def test_no_poison_reaches_a_result(case: Case) -> None:
    out, lse = reference.decode(**make_inputs(case).args)
    assert out.isfinite().all()
    assert not lse.isnan().any()
    assert not (lse == math.inf).any()


def test_attention_has_right_gradients() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 4, dtype=torch.float64, generator=rng, requires_grad=True) for n, h in ((3, 4), (5, 2), (5, 2)))
    sinks, slopes = (torch.rand(4, dtype=torch.float64, generator=rng, requires_grad=True) for _ in range(2))

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, sinks, slopes = tensors
        return reference.attention(q, k, v, band=Band(2, 0), softcap=3.0, sinks=sinks, alibi_slopes=slopes)

    assert torch.autograd.gradcheck(run, (q, k, v, sinks, slopes))


def test_a_row_that_sees_nothing_has_no_gradient_and_no_nan() -> None:
    q, k, v = (torch.randn(1, n, 1, 8, requires_grad=True) for n in (4, 2, 2))
    out, lse = reference.attention(q, k, v, band=Band(None, 0))
    assert (out[0, :2] == 0).all()
    assert (lse[0, 0, :2] == -math.inf).all()
    out.sum().backward()
    assert (q.grad[0, :2] == 0).all()
    assert k.grad.isfinite().all()
    assert v.grad.isfinite().all()


def test_packed_sequences_are_sequences() -> None:
    """Starts, used keys and rows of nobody, against slices by hand: three sequences, the second with no query, the third with no key."""
    q, k, v = torch.randn(9, 4, 8), torch.full((15, 2, 8), math.nan), torch.full((15, 2, 16), math.nan)
    k[2:6], v[2:6] = torch.randn(4, 2, 8), torch.randn(4, 2, 16)
    slopes = torch.rand(3, 4)
    starts_q, starts_k, used = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 5, 8], [2, 9, 12, 12], [4, 3, 7]))
    out, lse = reference.attention_varlen(q, k, v, starts_q, starts_k, 5, seqused_k=used, window=(2, 0), alibi_slopes=slopes)
    expected = reference.attention(q[None, :5], k[None, 2:6], v[None, 2:6], band=Band(2, 0), alibi_slopes=slopes[:1])
    assert torch.equal(out[:5], expected[0][0])
    assert torch.equal(lse[:, :5], expected[1][0])
    assert (out[5:] == 0).all()
    assert (lse[:, 5:] == -math.inf).all()


def test_forward_takes_one_length_for_all() -> None:
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 16)
    out, lse = reference.forward(q, k, v, causal=True, softcap=2.0)
    expected_out, expected_lse = reference.attention(q, k, v, band=Band(None, 0), softcap=2.0)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)


def test_gradients_flow_through_packed_sequences() -> None:
    q, k, v = (torch.randn(n, 2, 4, dtype=torch.float64, requires_grad=True) for n in (4, 6, 6))
    starts = torch.tensor([0, 1, 4], dtype=torch.int32), torch.tensor([0, 2, 6], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda q, k, v: reference.forward(q, k, v, *starts, causal=True), (q, k, v))
