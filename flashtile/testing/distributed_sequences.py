"""What each rank of a test does: its rows of whole sequences, beside what one process makes of the whole. Errors leave as exceptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

import flashtile
from flashtile import distributed as parallel
from flashtile import reference
from flashtile.distributed import SequenceShards
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
