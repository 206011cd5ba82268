"""What each rank of a test over a shared cache does: decode and append beside what one process makes of the whole cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from flashtile import distributed as parallel
from flashtile import reference
from flashtile.distributed import CacheShards
from flashtile.testing.distributed_sequences import bits, device_here
from flashtile.testing.tolerance import assert_close


@dataclass(frozen=True)
class CacheCase:
    """One call of `parallel.decode`: lengths of the whole sequences; ``seqlens_q`` are one a sequence where ragged."""

    name: str
    seqlens_k: tuple[int, ...]
    capacity: int
    interleave: int | None = None
    seqlen_q: int = 1
    seqlens_q: tuple[int, ...] = ()
    spare_rows: int = 0
    num_heads_q: int = 4
    num_heads_kv: int = 2
    head_dim: int = 16
    head_dim_v: int = 16
    dtype: str = "float32"
    page_size: int = 0
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    leftpad: bool = False
    own_heads: bool = False
    slow_link: bool = False


def check_decode(case: CacheCase, seed: int = 0) -> list[bytes]:
    """Holds out and lse against `reference` on the whole cache; returns their bits, which are the same on all ranks."""
    rank, size, device = dist.get_rank(), dist.get_world_size(), device_here()
    generator = torch.Generator().manual_seed(seed)
    dtype, batch, room = getattr(torch, case.dtype), len(case.seqlens_k), case.capacity * size

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    shards = CacheShards(size, case.interleave)
    total_q = sum(case.seqlens_q) + case.spare_rows
    q = randn(total_q, case.num_heads_q, case.head_dim) if case.seqlens_q else randn(batch, case.seqlen_q, case.num_heads_q, case.head_dim)
    k, v = randn(batch, room, case.num_heads_kv, case.head_dim), randn(batch, room, case.num_heads_kv, case.head_dim_v)
    args: dict[str, Any] = {"causal": case.causal, "window": case.window, "softcap": case.softcap}
    lengths = torch.tensor(case.seqlens_k, dtype=torch.int32)
    features: dict[str, Any] = {}
    if case.sinks:
        features["sinks"] = torch.randn(case.num_heads_q, generator=generator)
    if case.alibi:
        features["alibi_slopes"] = torch.rand(batch, case.num_heads_q, generator=generator)
    if case.leftpad:
        features["leftpad_k"] = (lengths // 3).int()
    if case.seqlens_q:
        features["cu_seqlens_q"] = torch.tensor([sum(case.seqlens_q[:i]) for i in range(batch + 1)], dtype=torch.int32)
        args["max_seqlen_q"] = max(case.seqlens_q)
    expected = reference.decode(q, k, v, lengths, **features, **args)

    positions = shards.positions(rank, case.capacity)
    k_here, v_here = k[:, positions], v[:, positions]
    # what lies beyond a sequence's end reaches nothing
    past = positions[None] >= lengths.clamp(0, room)[:, None]
    k_here[past], v_here[past] = torch.nan, torch.nan
    table = None
    if case.page_size:
        k_here, v_here, table = _paged(k_here, v_here, case.page_size, generator)
        table = table.to(device)
    on_device: dict[str, Any] = {name: x.to(device) for name, x in features.items()}
    link = parallel.Link("slow", 1e3, 1e-9) if case.slow_link else parallel.NVLINK
    out, lse = parallel.decode_with_lse(
        q.to(device), k_here.to(device), v_here.to(device), lengths.to(device), shards, page_table=table, own_heads=case.own_heads,
        link=link, **on_device, **args,
    )  # fmt: skip
    expected_out, expected_lse = expected
    if case.own_heads:
        share = case.num_heads_q // size
        expected_out = expected_out.narrow(-2, rank * share, share)
        expected_lse = expected_lse.narrow(-2, rank * share, share)
    assert_close(out.cpu(), lse.cpu(), expected_out, expected_lse, cpu_engine=device.type == "cpu", what=case.name)
    return bits(out, lse)


def check_append(case: CacheCase, num_new: int, steps: int) -> list[int]:
    """Appends tokens step by step, and holds every rank's keys against the whole; returns how many keys this rank holds."""
    rank, size, device = dist.get_rank(), dist.get_world_size(), device_here()
    generator = torch.Generator().manual_seed(0)
    batch, room = len(case.seqlens_k), case.capacity * size
    shards = CacheShards(size, case.interleave)
    whole = torch.randn(batch, room + num_new * steps, case.num_heads_kv, case.head_dim, generator=generator).to(device)
    lengths = torch.tensor(case.seqlens_k, dtype=torch.int32, device=device)
    positions = shards.positions(rank, case.capacity, device)
    k = whole[:, positions]
    k = torch.where((positions[None] < lengths[:, None])[..., None, None], k, torch.nan)
    v = 2.0 * k
    table = None
    if case.page_size:
        k, v, table = _paged(k, v, case.page_size, generator)
    for _ in range(steps):
        at = lengths.long()[:, None] + torch.arange(num_new, device=device)
        new = whole[torch.arange(batch, device=device)[:, None], at]
        lengths = parallel.append_kv(k, v, new, 2.0 * new, lengths, shards, page_table=table)
    k, v = (k, v) if table is None else (k[table.long()].flatten(1, 2), v[table.long()].flatten(1, 2))
    wanted = torch.tensor(case.seqlens_k) + num_new * steps
    torch.testing.assert_close(lengths.cpu(), wanted.clamp(max=room).int())
    there = positions[None] < lengths[:, None]
    torch.testing.assert_close(k[there], whole[:, positions][there], rtol=0, atol=0)
    torch.testing.assert_close(v[there], 2.0 * whole[:, positions][there], rtol=0, atol=0)
    assert bool(k[~there].isnan().all()), "something was written behind the end"
    return [int(n) for n in there.sum(dim=1)]


def replay_decode() -> None:
    """A decode step captured in a CUDA graph, transfers included, replayed with other lengths; raises where a replay is off."""
    rank, size, device = dist.get_rank(), dist.get_world_size(), device_here()
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 1, 8, 128, generator=generator).to(device, torch.bfloat16)
    k, v = (torch.randn(2, 1024 * size, 2, 128, generator=generator).to(device, torch.bfloat16) for _ in "kv")
    shards, lengths = CacheShards(size, 64), torch.tensor([5, 2000], dtype=torch.int32, device=device)
    held = shards.positions(rank, 1024, device)
    k_here, v_here = k[:, held], v[:, held]
    for _ in range(3):
        parallel.decode(q, k_here, v_here, lengths, shards)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = parallel.decode(q, k_here, v_here, lengths, shards, check=False)
    for now in ([5, 2000], [1, 64], [777, 1300]):
        lengths.copy_(torch.tensor(now, dtype=torch.int32))
        graph.replay()
        expected, _ = reference.decode(q.cpu(), k.cpu(), v.cpu(), lengths.cpu())
        assert_close(out.cpu(), None, expected, None, what=f"lengths {now}")


def _paged(k: torch.Tensor, v: torch.Tensor, page_size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same keys in pages that lie in any order, and their table (batch, max_pages) int32."""
    batch, capacity = k.shape[:2]
    count = batch * capacity // page_size
    shuffled = torch.randperm(count, generator=generator).to(k.device)
    pages = [x.reshape(count, page_size, *x.shape[2:]) for x in (k, v)]
    cut = [torch.empty_like(x).index_copy_(0, shuffled, x) for x in pages]
    return cut[0], cut[1], shuffled.view(batch, -1).int()
