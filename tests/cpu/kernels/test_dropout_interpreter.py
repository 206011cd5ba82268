"""Dropout in the portable Triton kernels: what they drop, bit by bit, and results and gradients by every tile.

bfloat16 cases run as float16: the interpreter's product of bfloat16 is wrong.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashtile.dropout import keep_mask, scale_of, threshold_of
from flashtile.planner.plans import BackwardPlan, ForwardPlan
from flashtile.problem import Problem
from flashtile.testing import poison
from flashtile.testing.backward_inputs import assert_gradients, backward_call, backward_problem
from flashtile.testing.forward_cases import DROPOUT_CASES, ForwardCase
from flashtile.testing.forward_inputs import ForwardInputs, expected_forward, forward_call, make_forward_inputs
from flashtile.testing.tolerance import assert_close

pytest.importorskip("triton")
import triton
import triton.language as tl

from flashtile.kernels import backward, forward
from flashtile.kernels.call import BackwardCall
from flashtile.kernels.tile.dropout import kept, kept_transposed
from flashtile.kernels.tile.views import DropoutView

# NumPy computes both branches of a select, the product of 0 and inf of keys that nobody owns among them
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton 3.6 with NumPy 2
]

FORWARD_TILES = ((64, 64), (128, 32), (16, 16), (32, 128))
BACKWARD_TILES = ((64, 128, 128, 64), (32, 64, 64, 128), (16, 16, 16, 16), (128, 64, 64, 32))
"""(block_m, block_n, dq_block_m, dq_block_n)."""


@triton.jit
def note_kept(notes, dropout, stream, query, key, QUERIES: tl.constexpr, KEYS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """notes (QUERIES, KEYS) int8: whether each entry is kept."""
    q = tl.arange(0, QUERIES)
    k = tl.arange(0, KEYS)
    if TRANSPOSED:
        kept_ones = kept_transposed(dropout, stream, query, key, QUERIES, KEYS)
        tl.store(notes + q[None, :] * KEYS + k[:, None], kept_ones.to(tl.int8))
    else:
        tl.store(notes + q[:, None] * KEYS + k[None, :], kept(dropout, stream, query, key, QUERIES, KEYS).to(tl.int8))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(16, 16), (64, 32), (32, 128)])
@pytest.mark.parametrize(
    "seed", [(0, 0), (1234567890123456789, 3), (-1, 2**63 - 1), (2**62 + 5, 2**32 + 7)], ids=["zero", "large", "ones", "beyond_32_bits"]
)
def test_kernels_drop_what_the_oracle_drops(seed: tuple[int, int], shape: tuple[int, int], transposed: bool) -> None:
    queries, keys = shape
    numbers = torch.tensor(seed, dtype=torch.int64)
    for p, stream, query, key in ((0.5, 0, 0, 0), (0.1, 77, 4096 + 16, 160), (0.999, 2**31 - 1, 2**30, 2**31 - 256)):
        notes = torch.full(shape, -1, dtype=torch.int8)
        dropout = DropoutView(numbers, threshold_of(p), scale_of(p))
        note_kept[(1,)](notes, dropout, stream, query, key, queries, keys, transposed)
        expected = keep_mask(p, numbers, torch.tensor(stream), range(query, query + queries), range(key, key + keys))
        assert torch.equal(notes.bool(), expected)
        assert set(notes.unique().tolist()) <= {0, 1}


def run_forward(inputs: ForwardInputs, block_m: int, block_n: int) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = poison.outputs(inputs.args["q"], inputs.case.head_dim_v)
    problem = Problem.forward(**inputs.args, out=out, lse=True)
    forward.bind(problem, ForwardPlan("triton.forward", block_m, block_n, 4, 2), out.device)(forward_call(inputs, out, lse))
    return out, lse


def run_backward(inputs: ForwardInputs, block_m: int, block_n: int, dq_block_m: int, dq_block_n: int) -> BackwardCall:
    call = backward_call(inputs)
    plan = BackwardPlan("triton.backward", block_m, block_n, 4, 2, dq_block_m, dq_block_n, 4, 2)
    with poison.allocations():
        backward.bind(backward_problem(inputs), plan, call.q.device)(call)
    return call


def inputs_of(case: ForwardCase) -> ForwardInputs:
    return make_forward_inputs(replace(case, dtype="float16") if case.dtype == "bfloat16" else case, seed=5)


@pytest.mark.parametrize(("turn", "case"), list(enumerate(DROPOUT_CASES)), ids=[case.name for case in DROPOUT_CASES])
def test_forward_matches_the_reference_that_drops_the_same(turn: int, case: ForwardCase) -> None:
    inputs = inputs_of(case)
    out, lse = run_forward(inputs, *FORWARD_TILES[turn % len(FORWARD_TILES)])
    assert_close(out, lse, *expected_forward(inputs), dtype=inputs.dtype, what=case.name)


@pytest.mark.parametrize(("turn", "case"), list(enumerate(DROPOUT_CASES)), ids=[case.name for case in DROPOUT_CASES])
def test_backward_matches_the_reference_that_drops_the_same(turn: int, case: ForwardCase) -> None:
    inputs = inputs_of(case)
    assert_gradients(inputs, run_backward(inputs, *BACKWARD_TILES[turn % len(BACKWARD_TILES)]))


def test_values_show_which_entries_every_tile_drops() -> None:
    """With keys that all score alike and values that are unit vectors, out is the mask, and so is the values' gradient."""
    case = ForwardCase("shown", 60, 40, batch=2, num_heads_q=4, num_heads_kv=2, head_dim=40, dropout_p=0.3, dtype="float32")
    inputs = make_forward_inputs(case)
    inputs.args["q"].zero_()
    inputs.args["v"].copy_(torch.eye(40)[None, :, None, :].expand(inputs.args["v"].shape))
    streams = torch.arange(8).view(2, 4)
    expected = keep_mask(0.3, inputs.seed, streams, range(60), range(40))
    for tile in FORWARD_TILES:
        out, _ = run_forward(inputs, *tile)
        assert torch.equal((out != 0.0).transpose(1, 2), expected)
    for turn, head in enumerate(range(4)):
        call = backward_call(inputs)
        call.dout.zero_()
        # Query i sends a gradient through dim i % 40 alone, in one head: dv of key j has in dim d the sum over queries of that dim.
        queries = torch.arange(40)
        call.dout[:, queries, head, queries] = 1.0
        block_m, block_n, dq_block_m, dq_block_n = BACKWARD_TILES[turn]
        plan = BackwardPlan("triton.backward", block_m, block_n, 4, 2, dq_block_m, dq_block_n, 4, 2)
        backward.bind(backward_problem(inputs), plan, call.q.device)(call)
        assert torch.equal((call.dv[:, :, head // 2] != 0.0).transpose(1, 2), expected[:, head, :40])
