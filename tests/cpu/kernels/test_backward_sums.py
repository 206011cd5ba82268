"""dQ's sums in one pass: a block's order is that of the matrix unit's registers, the conversion undoes it, and all are cleared."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashtile.problem import Problem

pytest.importorskip("triton")

from flashtile.kernels.backward import CallViews, delta_pass
from flashtile.kernels.call import BackwardCall
from flashtile.kernels.gluon.backward_sums import SUMS_BLOCK, conversion_spec, place_in_block, sums_blocks
from flashtile.kernels.launch import launcher
from flashtile.kernels.operands import rows_view


def places() -> np.ndarray:
    """Where each (dim, query) of a block lies, from what a thread of a warpgroup holds of a 64 x 64 product.

    Source: PTX ISA, wgmma, accumulator fragments: thread t holds row 16 (t / 32) + (t % 32) / 4 + 8 (i / 2 % 2) and column
    8 (i / 4) + 2 (t % 4) + i % 2 as its number i.
    """
    thread, i = np.arange(128)[:, None], np.arange(32)[None, :]
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
    column = 8 * (i // 4) + 2 * (thread % 4) + i % 2
    found = np.full((64, 64), -1)
    # four numbers of a thread stand together, 16 bytes; those of a warp's lanes in a row; groups of all threads one after another
    found[row, column] = 512 * (i // 4) + 4 * thread + i % 4
    return found


PLACES = places()


def test_every_number_has_a_place_of_its_own() -> None:
    assert sorted(PLACES.reshape(-1)) == list(range(SUMS_BLOCK.value))


def test_threads_add_where_their_registers_belong() -> None:
    d, n = np.arange(64)[:, None], np.arange(64)[None, :]
    begins = place_in_block.fn(d, n)
    assert (begins == PLACES // 4 * 4).all()
    # half a block of queries is half of the memory
    assert (begins[:, 32:] == begins[:, :32] + SUMS_BLOCK.value // 2).all()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head_dim", [40, 128])
def test_the_conversion_finds_every_sum(packed: bool, head_dim: int) -> None:
    """dq of several sequences of several heads; rows of nobody become zero."""
    heads, panels, scale = 2, -(-head_dim // 64), 2.0
    lengths = [70, 0, 129, 64] if packed else [130, 130]
    starts = [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    batch, total = len(lengths), starts[-1] + (3 if packed else 0)
    wanted = np.random.default_rng(0).normal(size=(total, heads, head_dim)).astype(np.float32)
    blocks = sums_blocks(batch, max(lengths), total, packed)
    sums = np.full((heads * blocks * panels * (1 if packed else batch), SUMS_BLOCK.value), np.nan, dtype=np.float32)
    for b, h in np.ndindex(batch, heads):
        first = h * blocks + 2 * (starts[b] // 128 + b) if packed else (b * heads + h) * blocks
        for m, d in np.ndindex(lengths[b], head_dim):
            sums[(first + m // 64) * panels + d // 64, PLACES[d % 64, m % 64]] = wanted[starts[b] + m, h, d]
    wanted[starts[-1] :] = 0
    dq = torch.full((total, heads, head_dim) if packed else (batch, lengths[0], heads, head_dim), torch.nan)

    cu_seqlens = torch.tensor(starts, dtype=torch.int32) if packed else None
    problem = Problem(operation="backward", batch=batch, num_heads_q=heads, num_heads_kv=heads, head_dim=head_dim, ragged_q=packed)
    launch = launcher(conversion_spec(problem, dependent=False), dq.device)
    tokens = (cu_seqlens, None, None, max(lengths), 1, total, 1)
    row_blocks = -(-max(lengths) // 64)
    view = rows_view(dq, lambda tensor: tensor)
    launch.run(
        batch * row_blocks * heads, 1, 0, (torch.from_numpy(sums), blocks), view, tokens, scale, heads, batch, row_blocks, *launch.constants
    )
    assert torch.equal(dq.reshape(total, heads, head_dim), scale * torch.from_numpy(wanted))


@pytest.mark.parametrize("blocks", [1, 7, 64])
def test_sums_are_cleared_beside_delta(blocks: int) -> None:
    """All of them and nothing behind, by however many programs there are."""
    q = torch.ones(2, 40, 2, 64)
    lse = torch.zeros(2, 2, 40)
    problem = Problem(operation="backward", batch=2, seqlen_q=40, num_heads_q=2, num_heads_kv=2, head_dim=64)
    call = BackwardCall(q, q, q, q, lse, q, None, q, q, q, None, None, None, None, 40, 40, None, None, 1.0, 0.0)
    sums = torch.full(((blocks + 1) * SUMS_BLOCK.value,), torch.nan)
    lse_log2, delta = torch.full((2, 160), torch.nan)
    views = CallViews(2, rows_view(q, lambda tensor: tensor), (lse_log2, delta, 80, 40), (None, None, None, 40, 40, 80, 80), (sums, blocks))
    delta_pass(problem, q.device, sums=True)(0, call, views)
    assert (sums[: blocks * SUMS_BLOCK.value] == 0).all()
    assert sums[blocks * SUMS_BLOCK.value :].isnan().all()
    assert (delta == 64).all()
