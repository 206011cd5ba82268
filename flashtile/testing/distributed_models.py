"""A layer whose sequence lies on several ranks, as people build one: sharded weights, compiled, DTensors; each beside one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

import flashtile
from flashtile import distributed as parallel
from flashtile.distributed import SequenceShards
from flashtile.testing.distributed_sequences import device_here

HEADS, DIM = 4, 16
WIDTH = HEADS * DIM
SEQLEN = 32


class Layer(nn.Module):
    """(batch, rows, WIDTH) to the same; positions lie as ``shards`` says, on one process where it is None."""

    def __init__(self, shards: SequenceShards | None) -> None:
        super().__init__()
        self.shards = shards
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DIM)).unbind(2)
        if self.shards is None:
            attended = flashtile.attention(q, k, v, causal=True)
        else:
            attended = parallel.attention(q, k, v, self.shards, causal=True)
        out: torch.Tensor = x + self.out(attended.flatten(2))
        return out


def check_layer(how: str) -> None:
    """Trains the layer one step on this rank's positions, "fsdp" or "compiled", and holds its gradients against one process's."""
    rank, size, device = dist.get_rank(), dist.get_world_size(), device_here()
    shards = SequenceShards.dense(SEQLEN, size)
    torch.manual_seed(0)
    alone = Layer(None).to(device)
    layer = Layer(shards).to(device)
    layer.load_state_dict(alone.state_dict())
    x = torch.randn(2, SEQLEN, WIDTH, device=device)
    alone(x).square().sum().backward()
    expected = {name: weight.grad for name, weight in alone.named_parameters()}

    if how == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(layer, mesh=init_device_mesh(device.type, (size,)))
        layer(shards.shard(x, rank)).square().sum().backward()
        # sharded weights get the mean over ranks of what is a sum over positions
        found = {name: size * weight.grad.full_tensor() for name, weight in layer.named_parameters()}  # type: ignore[union-attr]
    else:
        compiled = torch.compile(layer, backend="aot_eager")
        compiled(shards.shard(x, rank)).square().sum().backward()
        found = {}
        for name, weight in layer.named_parameters():
            if weight.grad is None:
                raise AssertionError(f"{name} has no gradient")
            dist.all_reduce(weight.grad)
            found[name] = weight.grad
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-3)


def check_dtensors(placed: tuple[int, ...]) -> None:
    """DTensors cut along dimension ``placed[i]`` over dimension i of a mesh: the result, and gradients, are placed as q is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    size, device = dist.get_world_size(), device_here()
    mesh = init_device_mesh(device.type, (size,) if len(placed) == 1 else (2, size // 2))
    placements = [Shard(dim) for dim in placed]
    torch.manual_seed(0)
    whole = [torch.randn(4, SEQLEN, HEADS, DIM, device=device, requires_grad=True) for _ in "qkv"]
    expected, expected_lse = flashtile.attention_with_lse(whole[0], whole[1], whole[2], causal=True)
    torch.autograd.backward(expected.square().sum())
    cut = [distribute_tensor(x.detach(), mesh, placements).requires_grad_() for x in whole]
    out, lse = parallel.attention_with_lse(cut[0], cut[1], cut[2], causal=True)
    if not isinstance(out, DTensor) or not isinstance(lse, DTensor) or list(out.placements) != placements:
        raise AssertionError(f"out is {type(out).__name__}, placed {getattr(out, 'placements', None)}")
    torch.autograd.backward(out.square().sum())
    torch.testing.assert_close(out.full_tensor(), expected)
    torch.testing.assert_close(lse.full_tensor(), expected_lse)
    for x, y in zip(cut, whole):
        if not isinstance(x.grad, DTensor):
            raise AssertionError("a DTensor has a gradient that is none")
        torch.testing.assert_close(x.grad.full_tensor(), y.grad, rtol=1e-4, atol=1e-4)
