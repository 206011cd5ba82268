"""What each rank of a test does: its part of a whole problem, beside what one process makes of the whole. Errors leave as exceptions."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

import flashtile
from flashtile import distributed as parallel
from flashtile import reference
from flashtile.distributed import CacheShards, SequenceShards
from flashtile.testing.tolerance import assert_close, relative_l2

# of a gradient against one in float64, relative L2: float32 sums in another order; 16-bit partial results are rounded before they are added
GRADIENT_ERROR = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class SequenceCase:
    """One call of `parallel.attention`: lengths of the whole; ``seqlens_k`` () are those of the queries."""

    name: str
    seqlens: tuple[int, ...]
    seqlens_k: tuple[int, ...] = ()
    packed: bool = False
    zigzag: bool = True
    method: str = "ring"
    batch: int = 2
    num_heads_q: int = 4
    num_heads_kv: int = 2
    head_dim: int = 16
    head_dim_v: int = 16
    dtype: str = "float32"
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    lse_gradient: bool = True


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


def device_here() -> torch.device:
    """This rank's device: the current GPU beside NCCL."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def check_attention(case: SequenceCase, seed: int = 0) -> list[bytes]:
    """Holds out, lse and all gradients of this rank against the whole by `reference` in float64; returns their bits."""
    rank, size, device = dist.get_rank(), dist.get_world_size(), device_here()
    whole = _sequences(case, seed)
    leaves = {name: x.double().requires_grad_() for name, x in whole.items() if name in ("q", "k", "v", "sinks")}
    shards = SequenceShards(case.seqlens, size, case.packed, case.zigzag)
    k_shards = SequenceShards(case.seqlens_k or case.seqlens, size, case.packed, case.zigzag)
    mask = {"causal": case.causal, "window": case.window, "softcap": case.softcap}
    expected = _whole_attention(case, leaves, whole, mask)
    torch.autograd.backward(expected, (whole["dout"].double(), whole["dlse"].double() * case.lse_gradient))

    mine = {name: _cut(name, x, shards, k_shards, rank).to(device) for name, x in whole.items()}
    given = {name: mine[name].requires_grad_() for name in leaves}
    out, lse = parallel.attention_with_lse(
        given["q"], given["k"], given["v"], shards, k_shards, method=case.method, sinks=given.get("sinks"),
        alibi_slopes=mine.get("alibi_slopes"), deterministic=True, **mask,
    )  # fmt: skip
    torch.autograd.backward((out, lse), (mine["dout"], mine["dlse"])) if case.lse_gradient else out.backward(mine["dout"])
    dtype, cpu = out.dtype, device.type == "cpu"
    expected_out, expected_lse = (_cut(name, x.detach(), shards, k_shards, rank) for name, x in zip(("q", "dlse"), expected))
    assert_close(out.detach().cpu(), lse.detach().cpu(), expected_out, expected_lse, dtype=dtype, cpu_engine=cpu, what=case.name)
    found = [out, lse]
    for name, x in given.items():
        gradient = x.grad
        if gradient is None:
            raise AssertionError(f"{case.name}: {name} has no gradient")
        found.append(gradient)
        if name == "sinks":
            gradient = gradient.clone()
            dist.all_reduce(gradient)  # each rank has the share of its rows, or of its heads
        wanted = leaves[name].grad
        error = relative_l2(gradient.cpu(), _cut(name, wanted, shards, k_shards, rank)) if wanted is not None else 0.0
        if not error <= GRADIENT_ERROR[dtype]:
            raise AssertionError(f"{case.name}: the gradient of {name} is {error:.3g} off (relative L2)")
    return bits(*found)


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


def disagree(what: str) -> None:
    """Rank 1 makes a call that does not go with the others'; nobody may hang."""
    rank, size = dist.get_rank(), dist.get_world_size()
    odd = rank == 1
    q, k = torch.randn(1, 4, 4, 16), torch.randn(1, 4, 2, 16)
    lengths = torch.tensor([6], dtype=torch.int32)
    if what == "heads":
        parallel.attention(q, k[:, :, :1] if odd else k, k[:, :, :1] if odd else k, causal=True)
    elif what == "rows":
        parallel.attention(q, k[:, :3] if odd else k, k[:, :3] if odd else k, causal=True)
    elif what == "mask":
        parallel.attention(q, k, k, causal=not odd)
    elif what == "world size":
        parallel.attention(q, k, k, SequenceShards.dense(4 * size, size + 1), causal=True)
    elif what == "capacity":
        parallel.decode(q[:, :1], k[:, :3] if odd else k, k[:, :3] if odd else k, lengths)
    elif what == "decode world size":
        parallel.decode(q[:, :1], k, k, lengths, CacheShards(size + 1))
    elif what == "kind of call":
        parallel.decode(q[:, :1], k, k, lengths) if odd else parallel.attention(q, k, k)
    else:
        raise ValueError(what)


def die(where: str) -> str:
    """The last rank dies; what the others see of it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == size - 1:
        os._exit(1)
    q = torch.randn(1, 8, 4, 16)
    try:
        parallel.attention(q, q, q, causal=True, check=where == "check", method="ring" if where != "ulysses" else "ulysses")
    except flashtile.CommunicationError as error:
        return str(error)
    raise AssertionError("nothing was noticed")


def bits(*tensors: torch.Tensor) -> list[bytes]:
    """Of each tensor, to compare."""
    return [x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() for x in tensors]


def _sequences(case: SequenceCase, seed: int) -> dict[str, torch.Tensor]:
    """The whole q, k, v, the gradients that flow in, and what else the case has."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    rows_q, rows_k = ([sum(n)] if case.packed else [case.batch, n[0]] for n in (case.seqlens, case.seqlens_k or case.seqlens))

    def randn(rows: list[int], heads: int, dim: int) -> torch.Tensor:
        return torch.randn(*rows, heads, dim, generator=generator).to(dtype)

    found = {
        "q": randn(rows_q, case.num_heads_q, case.head_dim),
        "k": randn(rows_k, case.num_heads_kv, case.head_dim),
        "v": randn(rows_k, case.num_heads_kv, case.head_dim_v),
        "dout": randn(rows_q, case.num_heads_q, case.head_dim_v),
        "dlse": torch.randn(*rows_q[:-1], case.num_heads_q, rows_q[-1], generator=generator),
    }
    if case.sinks:
        found["sinks"] = torch.randn(case.num_heads_q, generator=generator)
    if case.alibi:
        found["alibi_slopes"] = torch.rand(case.num_heads_q, generator=generator)
    return found


def _whole_attention(
    case: SequenceCase, leaves: dict[str, torch.Tensor], whole: dict[str, torch.Tensor], mask: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference on the whole, sequence by sequence, in float64, differentiable."""
    lengths_k = case.seqlens_k or case.seqlens
    band = flashtile.Band.of(mask["causal"], mask["window"])
    scores: dict[str, Any] = {"softcap": case.softcap, "sinks": leaves.get("sinks"), "alibi_slopes": whole.get("alibi_slopes")}
    if not case.packed:
        return reference.attention(leaves["q"], leaves["k"], leaves["v"], band=band, **scores)
    q, k, v = (torch.split(leaves[name], list(n)) for name, n in (("q", case.seqlens), ("k", lengths_k), ("v", lengths_k)))
    results = [reference.attention(a[None], b[None], c[None], band=band, **scores) for a, b, c in zip(q, k, v)]
    return torch.cat([out[0] for out, _ in results]), torch.cat([lse[0] for _, lse in results], dim=-1)


def _cut(name: str, x: torch.Tensor, shards: SequenceShards, k_shards: SequenceShards, rank: int) -> torch.Tensor:
    """A rank's part of a tensor of the whole."""
    if name in ("sinks", "alibi_slopes"):
        return x.clone()
    if name == "dlse":
        return shards.shard(x.transpose(-1, -2), rank).transpose(-1, -2).contiguous()
    return (k_shards if name in ("k", "v") else shards).shard(x, rank)


def _paged(k: torch.Tensor, v: torch.Tensor, page_size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same keys in pages that lie in any order, and their table (batch, max_pages) int32."""
    batch, capacity = k.shape[:2]
    count = batch * capacity // page_size
    shuffled = torch.randperm(count, generator=generator).to(k.device)
    pages = [x.reshape(count, page_size, *x.shape[2:]) for x in (k, v)]
    cut = [torch.empty_like(x).index_copy_(0, shuffled, x) for x in pages]
    return cut[0], cut[1], shuffled.view(batch, -1).int()


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
