"""A cache too long for one GPU: its keys lie on all ranks, which decode together and append in turn.

    torchrun --nproc-per-node 2 examples/long_context_decode.py                    # two processes of a CPU
    torchrun --nproc-per-node 8 examples/long_context_decode.py --device cuda --keys 8388608

Every rank calls with the same new query, key and value, as the layers of a model do that is copied to all. Pages go round, so that a
growing sequence fills all ranks alike. What comes out is compared with one process that holds the whole, where it fits.
"""

from __future__ import annotations

import os
from typing import Annotated

import torch
import torch.distributed as dist
import typer

import flashtile
from flashtile import distributed as parallel

HEADS_Q, HEADS_KV, DIM, PAGE = 8, 2, 64, 64


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    keys: Annotated[int, typer.Option(min=0, help="of the whole cache when decoding begins")] = 8192,
    tokens: Annotated[int, typer.Option(min=0, help="to decode and append")] = 4,
    compare: Annotated[bool, typer.Option(help="hold every step against one process with the whole cache")] = True,
) -> None:
    where = begin(device)
    rank, size = dist.get_rank(), dist.get_world_size()
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    shards = parallel.CacheShards(size, interleave=PAGE)
    capacity = -(-(keys + tokens) // (PAGE * size)) * PAGE  # of each rank: whole pages
    k_cache, v_cache = (torch.zeros(1, capacity, HEADS_KV, DIM, device=where, dtype=dtype) for _ in "kv")
    whole = tuple(torch.zeros(1, capacity * size if compare else 0, HEADS_KV, DIM, device=where, dtype=dtype) for _ in "kv")
    torch.manual_seed(0)  # every rank draws the same tokens
    lengths = torch.zeros(1, dtype=torch.int32, device=where)

    def append(count: int, at: int) -> None:
        nonlocal lengths
        k, v = (torch.randn(1, count, HEADS_KV, DIM, device=where, dtype=dtype) for _ in "kv")
        lengths = parallel.append_kv(k_cache, v_cache, k, v, lengths, shards)
        if compare:
            for cache, new in zip(whole, (k, v)):
                cache[:, at : at + count] = new

    for start in range(0, keys, 4096):
        append(min(4096, keys - start), start)
    if rank == 0:
        print(f"{keys} keys on {size} ranks, {capacity} each")
        print(*parallel.explain_exchange(1, HEADS_Q, DIM, size, out_bytes=dtype.itemsize).lines(), sep="\n")
    for step in range(tokens):
        append(1, keys + step)
        q = torch.randn(1, 1, HEADS_Q, DIM, device=where, dtype=dtype)
        out = parallel.decode(q, k_cache, v_cache, lengths, shards, check=step == 0)
        if compare and rank == 0:
            apart = (out - flashtile.decode(q, whole[0], whole[1], lengths)).abs().max().item()
            print(f"token {step}: at most {apart:.2g} apart from one process")
    dist.destroy_process_group()


def begin(device: str) -> torch.device:
    """Joins the group that torchrun describes; this rank's device."""
    if not dist.is_torchelastic_launched():
        raise typer.BadParameter("ranks are processes that torchrun starts: torchrun --nproc-per-node 2 examples/long_context_decode.py")
    if device == "cpu":
        dist.init_process_group("gloo")
        return torch.device("cpu")
    where = torch.device(device, int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(where)
    dist.init_process_group("nccl", device_id=where)
    return where


if __name__ == "__main__":
    typer.run(main)
