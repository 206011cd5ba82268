"""merge: the fold over parts of the keys, its gradients through out and lse, parts that saw nothing, extreme logits, and compilers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashtile
from flashtile.errors import ArgumentError, DtypeError, ShapeError

INF = float("inf")
Parts = list[torch.Tensor]
"""Outs first, then as many lses: what a gradient is asked for."""


def parts_of(packed: bool, count: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Parts, Parts]:
    rng = torch.Generator().manual_seed(1)
    shape = (5, 2, 4) if packed else (3, 5, 2, 4)
    outs = [torch.randn(shape, generator=rng, dtype=dtype) for _ in range(count)]
    lses = [torch.randn(*shape[:-3], 2, 5, generator=rng, dtype=dtype) * 20 for _ in range(count)]
    return outs, lses


def merged(leaves: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    half = len(leaves) // 2
    return flashtile.merge(leaves[:half], leaves[half:])


def gradients(run: Callable[[Parts], tuple[torch.Tensor, torch.Tensor]], outs: Parts, lses: Parts) -> tuple[torch.Tensor, ...]:
    """Those of every part, where something flows into each element of out and of lse; a lse of -inf gets something, too."""
    leaves = [part.detach().clone().requires_grad_() for part in (*outs, *lses)]
    out, lse = run(leaves)
    rng = torch.Generator().manual_seed(2)
    dout, dlse = (torch.randn(result.shape, generator=rng, dtype=result.dtype) for result in (out, lse))
    return torch.autograd.grad([out, lse], leaves, [dout, dlse])


# The fold


def test_one_part_is_itself() -> None:
    outs, lses = parts_of(packed=False, count=1)
    out, lse = flashtile.merge(outs, lses)
    torch.testing.assert_close(out, outs[0])
    torch.testing.assert_close(lse, lses[0])


@pytest.mark.parametrize("packed", [False, True])
def test_it_is_associative_and_commutative(packed: bool) -> None:
    (a, b, c), (la, lb, lc) = parts_of(packed)
    out, lse = flashtile.merge([a, b, c], [la, lb, lc])
    assert out.shape == a.shape
    assert lse.shape == la.shape
    ab, lab = flashtile.merge([a, b], [la, lb])
    for again in (flashtile.merge([ab, c], [lab, lc]), flashtile.merge([c, b, a], [lc, lb, la])):
        torch.testing.assert_close(again[0], out)
        torch.testing.assert_close(again[1], lse)


@given(st.data())
def test_parts_of_any_sizes_in_any_grouping_are_the_whole(data: st.DataObject) -> None:
    """Attention over ranges of keys, empty ones among them, folded along a random tree."""
    seqlen_k = data.draw(st.integers(0, 12))
    cuts = sorted(data.draw(st.lists(st.integers(0, seqlen_k), max_size=5)))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    q, k, v = (torch.randn(1, n, 2, 8, generator=rng) for n in (3, seqlen_k, seqlen_k))
    whole = flashtile.attention_with_lse(q, k, v)
    pieces = [flashtile.attention_with_lse(q, k[:, i:j], v[:, i:j]) for i, j in zip([0, *cuts], [*cuts, seqlen_k])]
    while len(pieces) > 1:
        take = data.draw(st.integers(2, len(pieces)))
        chosen = [pieces.pop(data.draw(st.integers(0, len(pieces) - 1))) for _ in range(take)]
        pieces.append(flashtile.merge([out for out, _ in chosen], [lse for _, lse in chosen]))
    torch.testing.assert_close(pieces[0], whole)


def test_parts_that_saw_nothing_add_nothing() -> None:
    (a, b, _), (la, lb, _) = parts_of(packed=False)
    lb[0] = -INF
    b[0] = float("nan")
    blind, never = torch.full_like(a, float("nan")), torch.full_like(la, -INF)
    out, lse = flashtile.merge([a, b, blind], [la, lb, never])
    torch.testing.assert_close(out[0], a[0])
    torch.testing.assert_close(lse[0], la[0])
    assert torch.isfinite(out).all()
    out, lse = flashtile.merge([blind, blind], [never, never])
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, never)


@pytest.mark.parametrize("shift", [3e4, 1e30, 3e38])
def test_extreme_logits_leave_the_larger_part(shift: float) -> None:
    (a, b), (la, lb) = parts_of(packed=True, count=2)
    out, lse = flashtile.merge([a, b], [la + shift, lb - shift])
    torch.testing.assert_close(out, a)
    torch.testing.assert_close(lse, la + shift)


def test_equal_lses_of_any_size_average() -> None:
    (a, b), (la, _) = parts_of(packed=True, count=2)
    for shift in (-3e38, -200.0, 0.0, 200.0, 3e38):
        out, lse = flashtile.merge([a, b], [torch.full_like(la, shift)] * 2)
        torch.testing.assert_close(out, (a + b) / 2)
        torch.testing.assert_close(lse, torch.full_like(la, shift + 0.6931472))


@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (3, 0, 2, 4), (0, 2, 4)])
def test_without_rows_there_is_nothing(shape: tuple[int, ...]) -> None:
    lse = torch.zeros(*shape[:-3], shape[-2], shape[-3])
    found = flashtile.merge([torch.zeros(shape)] * 2, [lse] * 2)
    assert [result.shape for result in found] == [torch.Size(shape), lse.shape]


def test_dtypes() -> None:
    outs, lses = parts_of(packed=False)
    out, lse = flashtile.merge([part.bfloat16() for part in outs], lses)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    out, lse = flashtile.merge([outs[0].bfloat16(), *outs[1:]], [part.half() for part in lses])
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)


# Gradients


@pytest.mark.parametrize("packed", [False, True])
def test_first_and_second_derivatives_are_numerically_right(packed: bool) -> None:
    outs, lses = parts_of(packed, dtype=torch.float64)
    few = (slice(1),) * (not packed)  # of the sequences, queries and dims: a second derivative of everything takes long
    leaves = [out[(*few, slice(2), slice(None), slice(2))] for out in outs] + [lse[(*few, slice(None), slice(2))] / 10 for lse in lses]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    run = lambda *parts: merged(list(parts))  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_do_not_depend_on_the_grouping(packed: bool) -> None:
    outs, lses = parts_of(packed)
    lses = [lse / 10 for lse in lses]

    def in_two_steps(leaves: Parts) -> tuple[torch.Tensor, torch.Tensor]:
        a, b, c, la, lb, lc = leaves
        bc, lbc = flashtile.merge([b, c], [lb, lc])
        return flashtile.merge([a, bc], [la, lbc])

    for found, expected in zip(gradients(in_two_steps, outs, lses), gradients(merged, outs, lses)):
        torch.testing.assert_close(found, expected)


def test_what_was_not_seen_has_no_gradient_whatever_its_out_holds() -> None:
    (a, b), (la, lb) = parts_of(packed=False, count=2)
    la[0] = -INF  # seen by b alone,
    lb[0, 0] = -INF  # and in head 0 by nobody
    a[0] = float("nan")
    b[0, :, 0] = INF
    da, db, dla, dlb = gradients(merged, [a, b], [la, lb])
    assert (da[0] == 0).all()
    assert (db[0, :, 0] == 0).all()
    assert (dla[0] == 0).all()
    assert (dlb[0, 0] == 0).all()
    assert all(grad.isfinite().all() for grad in (da, db, dla, dlb))
    # Head 1 of sequence 0 is b's alone, so that what flows into out and lse goes to it as it came.
    rng = torch.Generator().manual_seed(2)
    dout, dlse = torch.randn(a.shape, generator=rng), torch.randn(la.shape, generator=rng)
    torch.testing.assert_close(db[0, :, 1], dout[0, :, 1])
    torch.testing.assert_close(dlb[0, 1], dlse[0, 1])


@pytest.mark.parametrize("shift", [3e4, 1e30, 3e38])
def test_extreme_logits_have_the_larger_parts_gradients(shift: float) -> None:
    (a, b), (la, lb) = parts_of(packed=True, count=2)
    da, db, dla, dlb = gradients(merged, [a, b], [la + shift, lb - shift])
    expected_da, expected_dla = gradients(merged, [a], [la])
    torch.testing.assert_close(da, expected_da)
    torch.testing.assert_close(dla, expected_dla)
    assert not db.any()
    assert not dlb.any()


def test_a_cascade_of_parts_trains_like_the_whole() -> None:
    """Through attention too: a prefix that sequences share, read once for all of them, and tails of their own."""
    rng = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, n, h, 16, generator=rng).requires_grad_() for n, h in ((6, 4), (6, 2), (6, 2)))
    prefix_k, prefix_v = (torch.randn(1, 20, 2, 16, generator=rng).requires_grad_() for _ in range(2))

    def whole() -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (torch.cat([prefix.expand(2, -1, -1, -1), own], dim=1) for prefix, own in ((prefix_k, k), (prefix_v, v)))
        return flashtile.attention_with_lse(q, keys, values, causal=True)

    def cascade() -> tuple[torch.Tensor, torch.Tensor]:
        shared_out, shared_lse = flashtile.attention_with_lse(q.flatten(0, 1)[None], prefix_k, prefix_v)
        own_out, own_lse = flashtile.attention_with_lse(q, k, v, causal=True)
        shared = shared_out.unflatten(1, (2, 6))[0], shared_lse.unflatten(2, (2, 6))[0].transpose(0, 1)
        return flashtile.merge([shared[0], own_out], [shared[1], own_lse])

    leaves, dout, dlse = [q, k, v, prefix_k, prefix_v], torch.randn(2, 6, 4, 16), torch.randn(2, 4, 6)
    torch.testing.assert_close(cascade(), whole())
    expected = torch.autograd.grad(whole(), leaves, [dout, dlse])
    for found, wanted in zip(torch.autograd.grad(cascade(), leaves, [dout, dlse]), expected):
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


# Under compilers


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_is_eager(packed: bool) -> None:
    outs, lses = parts_of(packed)
    lses[0][..., 0, :] = -INF
    traced = torch.compile(merged, fullgraph=True, dynamic=True, backend="aot_eager")
    leaves = [*outs, *lses]
    for found, expected in zip(traced(leaves), merged(leaves)):
        torch.testing.assert_close(found, expected)
    for found, expected in zip(gradients(traced, outs, lses), gradients(merged, outs, lses)):
        torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_attention_over_parts_is_compiled_and_exported_as_one_graph() -> None:
    class Halves(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            parts = [flashtile.attention_with_lse(q, some, some) for some in k.chunk(2, dim=1)]
            return flashtile.merge([out for out, _ in parts], [lse for _, lse in parts])

    q, k = torch.randn(2, 5, 4, 16), torch.randn(2, 30, 2, 16)
    expected = flashtile.attention_with_lse(q, k, k)
    torch.testing.assert_close(torch.export.export(Halves(), (q, k)).module()(q, k), expected)
    leaves = [q.requires_grad_(), k.requires_grad_()]
    traced = torch.compile(Halves(), fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad([result.square().sum() for result in traced(*leaves)], leaves)
    wanted = torch.autograd.grad([result.square().sum() for result in flashtile.attention_with_lse(q, k, k)], leaves)
    for grad, other in zip(found, wanted):
        torch.testing.assert_close(grad, other, rtol=2e-5, atol=2e-5)


# Complaints


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda o, s: ([], []), ArgumentError, "at least one"),
        (lambda o, s: (o, s[:1]), ArgumentError, "3 outs and 1 lses"),
        (lambda o, s: ([o[0], o[1][:1], o[2]], s), ShapeError, r"outs\[1\]"),
        (lambda o, s: ([o[0][0, 0]] * 3, s), ShapeError, r"outs\[0\].*total_q"),
        (lambda o, s: (o, [s[0], s[1], s[2].transpose(1, 2)]), ShapeError, r"lses\[2\].*Transpose"),
        (lambda o, s: ([o[0], o[1].int(), o[2]], s), DtypeError, r"outs\[1\]"),
        (lambda o, s: (o, [s[0].to("meta"), *s[1:]]), ArgumentError, r"lses\[0\].*device"),
        (lambda o, s: (o, [None, *s[1:]]), DtypeError, r"lses\[0\]"),
        (lambda o, s: (o, None), DtypeError, "lses: expected a sequence"),
        (lambda o, s: (None, s), DtypeError, "outs: expected a sequence"),
    ],
)
def test_it_names_the_wrong_part(change: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        flashtile.merge(*change(*parts_of(packed=False)))
