"""Dropout of the softmax: which entries, that a seed repeats them, what results and gradients they leave, and what it costs without."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import flashtile
from flashtile import reference
from flashtile.dropout import draw_seed, keep_mask, philox
from flashtile.errors import ArgumentError, UnsupportedError
from flashtile.planner.catalog import GLUON_BACKWARD_SM90, GLUON_FORWARD_SM90, TRITON_BACKWARD, TRITON_FORWARD, kernel_named
from flashtile.planner.choose import plan_backward, plan_decode, plan_forward
from flashtile.planner.device import Device
from flashtile.problem import Problem
from flashtile.testing.backward_inputs import Gradients, assert_gradients, backward_call
from flashtile.testing.forward_cases import DROPOUT_CASES, ForwardCase
from flashtile.testing.forward_inputs import GENERATOR_SEED, ForwardInputs, expected_forward, make_forward_inputs
from flashtile.testing.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {"head_dim": 16, "num_heads_q": 4, "num_heads_kv": 2, "dtype": "float32", "dropout_p": 0.3}


def small(**changes: Any) -> ForwardInputs:
    return make_forward_inputs(ForwardCase("small", 9, 30, batch=2, **SMALL | changes))


def packed(**changes: Any) -> ForwardInputs:
    return make_forward_inputs(ForwardCase("packed", (9, 4), (30, 12), **SMALL | changes))


def run(args: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The call as ``ForwardInputs.seed`` foresees it."""
    torch.manual_seed(GENERATOR_SEED)
    return (flashtile.attention_varlen_with_lse if "cu_seqlens_q" in args else flashtile.attention_with_lse)(**args)


def with_leaves(args: dict[str, Any]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    leaves = {name: args[name].detach().requires_grad_() for name in ("q", "k", "v", "sinks") if args[name] is not None}
    return args | leaves, list(leaves.values())


# Which entries


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_its_authors_words(counter: tuple[int, ...], key: tuple[int, int], words: str) -> None:
    found = philox([torch.tensor(number) for number in counter], key)
    assert " ".join(f"{int(word):08x}" for word in found) == words


@pytest.mark.parametrize("p", [0.0001, 0.1, 0.5, 0.9, 0.999])
def test_the_share_that_is_kept_is_binomial(p: float) -> None:
    kept = keep_mask(p, torch.tensor([17, 4]), torch.arange(8), range(512), range(512)).double()
    # five standard deviations: of all, of each head, of each query and of each key
    for dims, entries in (((0, 1, 2), 8 * 512 * 512), ((1, 2), 512 * 512), ((0, 2), 8 * 512), ((0, 1), 8 * 512)):
        if min(p, 1.0 - p) * entries > 20:
            worst = (kept.mean(dim=dims) - (1.0 - p)).abs().max().item()
            assert worst < 5.0 * math.sqrt(p * (1.0 - p) / entries)


def test_heads_neighbours_seeds_and_offsets_are_independent() -> None:
    def mask(seed: int = 17, offset: int = 4, stream: int = 0, queries: int = 0, keys: int = 0) -> torch.Tensor:
        numbers = torch.tensor([seed, offset])
        found = keep_mask(0.5, numbers, torch.tensor(stream), range(queries, queries + 512), range(keys, keys + 512))
        return found.double() * 2.0 - 1.0

    others = [
        mask(stream=1), mask(seed=18), mask(seed=17 + 2**32), mask(offset=5), mask(queries=1), mask(keys=1), mask(queries=8), mask(keys=8),
        mask(queries=16), mask(keys=512), mask(queries=8, keys=8), mask().T,
    ]  # fmt: skip
    for other in others:
        assert abs((mask() * other).mean().item()) < 5.0 / 512.0


def test_a_part_of_the_mask_is_that_part() -> None:
    seed, streams = torch.tensor([-3, 2**62]), torch.tensor([[0, 1, 2], [3, 2**32 + 4, 5]])
    whole = keep_mask(0.3, seed, streams, range(100), range(70))
    assert whole.shape == (2, 3, 100, 70)
    assert torch.equal(keep_mask(0.3, seed, streams, range(13, 77), range(33, 70)), whole[..., 13:77, 33:70])
    assert torch.equal(keep_mask(0.3, seed, torch.tensor(4), range(100), range(70)), whole[1, 1])
    assert keep_mask(0.3, seed, streams, range(5, 5), range(70)).shape == (2, 3, 0, 70)


def test_a_seed_is_drawn_from_torchs_generator() -> None:
    torch.manual_seed(5)
    first, second = draw_seed(torch.device("cpu")), draw_seed(torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(draw_seed(torch.device("cpu")), first)
    assert not (first == second).any()
    assert (first.dtype, tuple(first.shape)) == (torch.int64, (2,))


# What results


def test_the_reference_drops_behind_the_softmax() -> None:
    q, k, v = (torch.randn(1, 3, 2, 4, dtype=torch.float64) for _ in range(3))
    keep = torch.rand(1, 2, 3, 3) < 0.5
    out, lse = reference.attention(q, k, v, dropout_p=0.25, keep=keep)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2.0
    shares = scores.softmax(dim=-1) * keep / 0.75
    torch.testing.assert_close(out, torch.einsum("bhqk,bkhd->bqhd", shares, v))
    torch.testing.assert_close(lse, scores.logsumexp(dim=-1))


def test_the_references_gradients() -> None:
    q, k, v = (torch.randn(1, n, h, 4, dtype=torch.float64, requires_grad=True) for n, h in ((5, 2), (7, 1), (7, 1)))
    seed = torch.tensor([1, 2])
    assert torch.autograd.gradcheck(lambda *qkv: reference.forward(*qkv, causal=True, dropout_p=0.4, seed=seed), (q, k, v))


@pytest.mark.parametrize("case", DROPOUT_CASES, ids=lambda case: case.name)
def test_every_case_on_the_cpu(case: ForwardCase) -> None:
    inputs = make_forward_inputs(case)
    call = backward_call(inputs)
    args, leaves = with_leaves(inputs.args)
    out, lse = run(args)
    assert_close(out.detach(), lse.detach(), *expected_forward(inputs), dtype=inputs.dtype, cpu_engine=True, what=case.name)
    flows = [(out, call.dout)] if call.dlse is None else [(out, call.dout), (lse, call.dlse)]
    found = torch.autograd.grad([result for result, _ in flows], leaves, [gradient for _, gradient in flows])
    assert_gradients(inputs, call, Gradients(*found[:3], found[3] if len(found) > 3 else None))


def test_many_blocks_of_rows_and_keys_on_the_cpu() -> None:
    inputs = make_forward_inputs(ForwardCase("blocks", 150, 1100, num_heads_q=4, head_dim=16, dropout_p=0.2, dtype="float32"))
    args, leaves = with_leaves(inputs.args)
    call = backward_call(inputs, through_lse=False)
    out, lse = run(args)
    assert_close(out.detach(), lse.detach(), *expected_forward(inputs), dtype=inputs.dtype, cpu_engine=True)
    assert_gradients(inputs, call, Gradients(*torch.autograd.grad(out, leaves, call.dout), None))


def test_packed_sequences_drop_what_a_batch_drops() -> None:
    args = small().args
    starts = [torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (9, 30)]
    together, _ = run({name: args[name] for name in ("q", "k", "v", "dropout_p")})
    flat = {name: args[name].flatten(0, 1) for name in ("q", "k", "v")}
    apart, _ = run(flat | {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1], "max_seqlen_q": 9, "dropout_p": 0.3})
    torch.testing.assert_close(apart.view(together.shape), together)


def test_lse_is_that_of_the_whole_softmax() -> None:
    args = small().args
    dropped, lse = run(args)
    whole, expected = run(args | {"dropout_p": 0.0})
    torch.testing.assert_close(lse, expected)
    assert not torch.allclose(dropped, whole)


def test_the_mean_over_seeds_is_attention_without_dropout() -> None:
    args = small().args
    whole, _ = run(args | {"dropout_p": 0.0})
    several = torch.stack([flashtile.attention(**args) for _ in range(200)])
    error = (several.mean(dim=0) - whole) / (several.std(dim=0) / 200**0.5)
    assert error.abs().max() < 6.0


# Repeats


def test_torchs_seed_repeats_a_call_and_each_call_has_its_own() -> None:
    args = small().args
    first, _ = run(args)
    second = flashtile.attention(**args)
    assert torch.equal(run(args)[0], first)
    assert not torch.equal(second, first)


@pytest.mark.parametrize("through_operator", [False, True])
def test_checkpoints_drop_the_same_again(through_operator: bool) -> None:
    def loss(args: dict[str, Any]) -> torch.Tensor:
        return flashtile.attention(**args).sin().sum()

    args, leaves = with_leaves(small().args)
    torch.manual_seed(3)
    expected = torch.autograd.grad(loss(args), leaves)
    torch.manual_seed(3)
    step = torch.compile(loss, backend="aot_eager", fullgraph=True) if through_operator else loss
    found = torch.autograd.grad(checkpoint(step, args, use_reentrant=False), leaves)
    assert all(torch.equal(*pair) for pair in zip(found, expected))


def test_no_random_number_is_drawn_where_nothing_is_dropped() -> None:
    args, leaves = with_leaves(small(dropout_p=0.0).args)
    before = torch.get_rng_state()
    torch.autograd.grad(flashtile.attention(**args).sum(), leaves)
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_casts_a_call_with_dropout() -> None:
    inputs = small(dtype="float32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = run(inputs.args)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected_forward(inputs)[0], atol=0.1, rtol=0.1)


# Under a compiler


@pytest.mark.parametrize("inputs", [small(causal=True, sinks=True, padding=0), packed(padding=0)], ids=["plain", "packed"])
def test_compiled_is_eager(inputs: ForwardInputs) -> None:
    def loss(args: dict[str, Any]) -> torch.Tensor:
        function = flashtile.attention_varlen_with_lse if "cu_seqlens_q" in args else flashtile.attention_with_lse
        out, lse = function(**args | {"q": args["q"] * 2})
        return out.sin().sum() + lse.square().sum()

    args, leaves = with_leaves(inputs.args)
    torch._dynamo.reset()
    for seed in (3, 4):
        values = []
        for step in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
            torch.manual_seed(seed)
            value = step(args)
            values.append((value, *torch.autograd.grad(value, leaves)))
        assert all(torch.equal(*pair) for pair in zip(*values))


def test_opcheck() -> None:
    args, _ = with_leaves(small(padding=0).args)
    q, k, v, seed = args["q"], args["k"], args["v"], draw_seed(torch.device("cpu"))
    rest = (True, None, None, 0.0, None, None, None, None, None, False, None, True, 0.3, seed)
    forward_operands = (q, k, v, None, None, None, None, None, None, *rest)
    torch.library.opcheck(torch.ops.flashtile.forward.default, forward_operands)
    out, lse = torch.ops.flashtile.forward(*forward_operands)
    flows = (torch.randn_like(out), None, None, None, None, None, None)
    operands = (*(tensor.detach() for tensor in (q, k, v, out, lse)), *flows, *rest[:6], None, False, None, False, 0.3, seed)
    torch.library.opcheck(torch.ops.flashtile.backward.default, operands)
    with pytest.raises(ArgumentError, match="seed: "):
        torch.ops.flashtile.forward(*forward_operands[:-1], None)


# What is refused, and who runs it


@pytest.mark.parametrize("p", [1.0, 1.5, -0.1, float("nan"), True, "0.1", torch.tensor(0.1)])
def test_a_probability_is_a_number_below_one(p: Any) -> None:
    args = small().args | {"dropout_p": p}
    for _ in range(2):
        with pytest.raises(ArgumentError, match="dropout_p: "):
            flashtile.attention(**args)


def test_an_integer_is_a_number() -> None:
    args = small().args
    assert torch.equal(flashtile.attention(**args | {"dropout_p": 0}), flashtile.attention(**args | {"dropout_p": 0.0}))


def test_keys_in_pages_are_not_dropped() -> None:
    inputs = make_forward_inputs(ForwardCase("pages", (3, 5), (9, 20), page_size=16, head_dim=16))
    with pytest.raises(UnsupportedError, match=r"dropout_p: expected 0\.0 for keys in pages"):
        flashtile.attention_varlen(**inputs.args | {"dropout_p": 0.1})
    with pytest.raises(UnsupportedError, match=r"dropout_p: expected 0\.0 for decode"):
        plan_decode(Problem(dropout=True), Device.named("H200"))


def test_hoppers_kernels_leave_it_to_the_portable_ones() -> None:
    device, problem = Device.named("H200"), Problem("forward", 4, 2048, seqlen_k=2048, num_heads_q=8, num_heads_kv=8, lse=True)
    for planned, hopper, portable in (
        (plan_forward, GLUON_FORWARD_SM90, TRITON_FORWARD),
        (plan_backward, GLUON_BACKWARD_SM90, TRITON_BACKWARD),
    ):
        problem = problem.with_(operation=kernel_named(hopper).operation)
        assert planned(problem, device).kernel == hopper
        assert planned(problem.with_(dropout=True), device).kernel == portable
        [reason] = kernel_named(hopper).reasons_against(problem.with_(dropout=True), device)
        assert "dropout" in reason
