"""Appends repeated by the C module, and decode behind one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashtile.flash_attn import flash_attn_with_kvcache
from flashtile.planner.after_append import append_programs
from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device
from flashtile.problem import Problem
from flashtile.testing.append_cases import AppendCase

pytest.importorskip("triton")

from flashtile.kernels import launch
from tests.cpu.kernels.fake_gpu import PDL, STREAM, FakeGpu, comparable, names_of, tensors, values_of

pytestmark = pytest.mark.skipif(launch.c_compiler() is None, reason="the module is C")


@pytest.mark.parametrize(
    "case",
    [AppendCase(), AppendCase(pairs=None), AppendCase(queries=0), AppendCase(page_size=8), AppendCase(own_positions=True),
     AppendCase(new=(2, 0, 9), queries=(2, 0, 4))],
    ids=("plain", "not turned", "no queries", "pages", "own positions", "packed"),
)  # fmt: skip
def test_a_repeated_append_launches_what_the_longer_way_launches(case: AppendCase, gpu: FakeGpu) -> None:
    gpu.settle(gpu.append, **case.arguments())
    second = case.arguments(seed=1)
    versions = [second[name]._version for name in ("k_cache", "v_cache")]
    seqlens, q = gpu.append(**second)
    (told,) = gpu.driver.launched
    assert not gpu.longer
    assert [second[name]._version - version for name, version in zip(("k_cache", "v_cache"), versions)] == [1, 1], "autograd is told"
    gpu.table.clear()
    longer_seqlens, longer_q = gpu.append(**second)
    ((kernel, grid_x, grid_y, block),) = gpu.longer
    assert told[:5] == (kernel.function, (grid_x, grid_y, 1), (kernel.threads, 1, 1), kernel.shared, STREAM)
    mine = comparable(told.params, names_of(second, seqlens, q))
    assert mine == comparable(values_of(kernel, block), names_of(second, longer_seqlens, longer_q))
    assert seqlens.shape == longer_seqlens.shape and seqlens.dtype == torch.int32 and (q is None) == (longer_q is None)
    assert q is None or longer_q is None or (q.shape, q.stride(), q.dtype) == (longer_q.shape, longer_q.stride(), longer_q.dtype)


@pytest.mark.parametrize("appends", [False, True])
@pytest.mark.parametrize("queries", [1, 4])
def test_the_drop_in_is_repeated_whole(queries: int, appends: bool, gpu: FakeGpu) -> None:
    """With several queries too, to which a causal mask matters."""
    given = tensors(4096)
    q, new = (torch.empty(1, queries, heads, 128, dtype=torch.bfloat16) for heads in (32, 8))
    args: dict[str, Any] = {"cache_seqlens": given["seqlens_k"], "causal": True} | ({"k": new, "v": new} if appends else {})

    def call() -> None:
        flash_attn_with_kvcache(q, given["k_cache"], given["v_cache"], **args)

    gpu.settle(call)
    call()
    assert not gpu.longer and len(gpu.driver.launched) == 2 + appends, "splits, what combines them, and the append"


def test_a_call_after_an_append_takes_its_place_early(gpu: FakeGpu) -> None:
    given = tensors()
    gpu.settle(after_append=True, num_splits=4, **given)
    gpu.decode(after_append=True, num_splits=4, **given)
    assert [told.attributes for told in gpu.driver.launched] == [{PDL: 1}, {PDL: 1}]
    gpu.settle(num_splits=4, **given)
    gpu.decode(num_splits=4, **given)
    assert [told.attributes for told in gpu.driver.launched] == [{}, {PDL: 1}]


def test_a_long_call_that_would_be_spread_unevenly_waits_for_the_append_to_end(gpu: FakeGpu) -> None:
    """As does one whose plan is given."""
    given = tensors(4096, batch=32)
    plan = plan_decode(Problem.decode(**given), Device.named("h200"))
    for wish in (None, plan):
        gpu.settle(after_append=True, plan=wish, **given)
        gpu.decode(after_append=True, plan=wish, **given)
        assert gpu.driver.launched[0].attributes == {}


@pytest.mark.parametrize(("batch", "tokens", "head_dim"), [(1, 1, 128), (3, 1, 128), (2, 4, 128), (2, 5, 96), (1, 3, 256)])
def test_the_planner_counts_an_appends_programs(batch: int, tokens: int, head_dim: int, gpu: FakeGpu) -> None:
    q, new, cache = (torch.empty(batch, count, heads, head_dim) for count, heads in ((tokens, 32), (tokens, 8), (64, 8)))
    table, lengths = torch.empty(64, 16), torch.zeros(batch, dtype=torch.int32)
    gpu.append(k_cache=cache, v_cache=cache.clone(), k=new, v=new, seqlens_k=lengths, q=q, rotary_cos=table, rotary_sin=table)
    ((_, programs, _, _),) = gpu.longer
    assert append_programs(Problem.decode(q, cache, cache, lengths)) == programs
