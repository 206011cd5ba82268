"""A block of a language model like Llama, forward and backward through torch.compile, once with each attention.

Protocol of blocks: GPU time of one step (gradients of x and of all weights), compiled with fullgraph, bf16, contestants in turn round
by round in one process, an untimed step before each timed one; median. Before that the gradients of each contestant are held against
the block in float32: at most twice as far off as the block in bf16 with torch's memory-efficient attention. The step that is called
after cuDNN is known to launch cuDNN's attention, by the names of its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashtile
from benchmarks import timing
from benchmarks.backward_grids import BOTH_WAYS, BackwardShape, backward_of
from benchmarks.forward_grids import square
from benchmarks.refusals import Refused, WrongResult
from benchmarks.timed_trials import OURS, Options, with_rates
from benchmarks.trials import Trials
from flashtile.testing.tolerance import relative_l2

PROTOCOL = " ".join((__doc__ or "").split("Protocol of blocks: ")[1].split())
ERROR_FACTOR = 2.0
ROPE_BASE = 500000.0
TIMED_SECONDS = 8.0
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""q (b, s, hq, d), k and v (b, s, hk, d) to out, causal."""


@dataclass(frozen=True)
class Block:
    """One problem: ``batch`` sequences through one block; features are counts."""

    name: str
    batch: int
    seqlen: int
    num_heads_q: int = 32
    num_heads_kv: int = 8
    head_dim: int = 128
    hidden: int = 4096
    mlp: int = 14336

    @property
    def attention(self) -> BackwardShape:
        """The attention inside."""
        return backward_of(square(self.batch, self.seqlen, (self.num_heads_q, self.num_heads_kv), self.head_dim, causal=True))

    @property
    def weights(self) -> int:
        heads = 2 * self.num_heads_q + 2 * self.num_heads_kv
        return self.hidden * (heads * self.head_dim + 3 * self.mlp)

    @property
    def flops(self) -> float:
        """Of all matrix products: three times the forward's of weights, and attention's 1 + 2.5."""
        return 6.0 * self.weights * self.batch * self.seqlen + BOTH_WAYS * self.attention.flops

    def facts(self) -> dict[str, Any]:
        return asdict(self) | {"flops": self.flops, "attention_flops": BOTH_WAYS * self.attention.flops}


def blocks() -> list[Block]:
    """The block of Llama 3 8B on 4 sequences of 4096 tokens."""
    return [Block("Llama-like block 4x4096", 4, 4096)]


def shrunk(block: Block) -> Block:
    """Small enough for a dry run without a GPU."""
    return replace(block, batch=2, seqlen=32, num_heads_q=4, num_heads_kv=1, head_dim=16, hidden=64, mlp=96)


class LlamaBlock(torch.nn.Module):
    """Root mean square norms, rotary positions, grouped heads, a gated MLP: x (b, s, hidden) to the same."""

    def __init__(self, block: Block, attend: Attend, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.block, self.attend = block, attend
        generator = torch.Generator(device=device).manual_seed(1)

        def weight(rows: int, columns: int) -> torch.nn.Parameter:
            drawn = torch.randn(rows, columns, device=device, generator=generator) * columns**-0.5
            return torch.nn.Parameter(drawn.bfloat16().to(dtype))  # the same numbers in every dtype

        queries, keys = block.num_heads_q * block.head_dim, block.num_heads_kv * block.head_dim
        self.to_q, self.to_k, self.to_v = weight(queries, block.hidden), weight(keys, block.hidden), weight(keys, block.hidden)
        self.to_out = weight(block.hidden, queries)
        self.gate, self.up = weight(block.mlp, block.hidden), weight(block.mlp, block.hidden)
        self.down = weight(block.hidden, block.mlp)
        self.norms = torch.nn.ParameterList(torch.ones(block.hidden, device=device, dtype=dtype) for _ in range(2))
        half = torch.arange(0, block.head_dim, 2, device=device) / block.head_dim
        angles = torch.outer(torch.arange(block.seqlen, device=device), ROPE_BASE**-half)
        self.cos, self.sin = angles.cos()[:, None].to(dtype), angles.sin()[:, None].to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, seqlen, _ = x.shape
        normed = F.rms_norm(x, x.shape[-1:], self.norms[0])
        heads = (batch, seqlen, -1, self.block.head_dim)
        q, k, v = (F.linear(normed, weight).view(heads) for weight in (self.to_q, self.to_k, self.to_v))
        x = x + F.linear(self.attend(self._turned(q), self._turned(k), v).reshape(batch, seqlen, -1), self.to_out)
        normed = F.rms_norm(x, x.shape[-1:], self.norms[1])
        return x + F.linear(F.silu(F.linear(normed, self.gate)) * F.linear(normed, self.up), self.down)

    def _turned(self, heads: torch.Tensor) -> torch.Tensor:
        """Rotary positions: (b, s, heads, d)."""
        first, second = heads.chunk(2, dim=-1)
        return torch.cat((first * self.cos - second * self.sin, second * self.cos + first * self.sin), dim=-1)


def measure(block: Block, options: Options, step: Callable[[str], None]) -> dict[str, Any]:
    """Everything about one block, as a result file carries it."""
    device = options.device
    generator = torch.Generator(device=device).manual_seed(0)
    x, dout = (torch.randn(block.batch, block.seqlen, block.hidden, device=device, generator=generator).bfloat16() for _ in range(2))
    oracle = BlockOracle(block, x, dout)
    trials = Trials(device, step)
    for name in (OURS, *options.peers):
        trials.enter(name, lambda name=name: _step_of(name, block, x, dout), oracle)  # type: ignore[misc]
    step("timing")
    if device.type == "cuda":
        issued = {name: timing.Eager(fn, 1, 1) for name, fn in trials.fns.items()}
        timed = timing.replay_in_turn(issued, options.rounds, TIMED_SECONDS)
    else:
        timed = timing.wall_time(trials.fns, 1, options.rounds)
    for name, clocked in timed.items():
        trials.results[name] |= clocked.to_json()
    return block.facts() | {"error_in_bf16": round(oracle.in_bf16, 6), "results": with_rates(trials.results, block.flops)}


def _step_of(name: str, block: Block, x: torch.Tensor, dout: torch.Tensor) -> timing.Contestant:
    """A compiled step of the block with one contestant's attention; everything is compiled at its first call."""
    if name not in _ATTEND:
        raise Refused(f"a block is measured with {', '.join(_ATTEND)}")
    attend_of, backend = _ATTEND[name]
    model = LlamaBlock(block, attend_of(block, x.device), x.device, x.dtype)
    run = torch.compile(model, fullgraph=True, dynamic=False)
    step = _step(run, list(model.parameters()), x, dout, lambda: nullcontext() if backend is None else sdpa_kernel([backend]))
    if name == "cudnn":
        _ensure_launched("cudnn", step)
    return step


def _step(
    run: Callable[[torch.Tensor], torch.Tensor], weights: list[Any], x: torch.Tensor, dout: torch.Tensor, within: Callable[[], Any]
) -> timing.Contestant:
    """Gradients of x and of all weights."""
    leaf = x.detach().requires_grad_()

    def step(i: int) -> tuple[torch.Tensor, ...]:
        with within():
            return torch.autograd.grad(run(leaf), [leaf, *weights], dout)

    return step


def _ensure_launched(part: str, step: timing.Contestant) -> None:
    """Raises Refused where no kernel of a step has ``part`` in its name, as far as the profiler sees kernels."""
    step(0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as profile:
        step(0)
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    if names and not any(part in name.lower() for name in names):
        raise Refused(f"no kernel of the compiled step is {part}'s")


class BlockOracle:
    """The gradients of a block in float32, and how far those of the same block in bf16 lie from them."""

    def __init__(self, block: Block, x: torch.Tensor, dout: torch.Tensor) -> None:
        with _efficient(x.device):
            self.expected = self._gradients(block, x.float(), dout.float())
            self.in_bf16 = self._worst(self._gradients(block, x, dout))

    def error(self, result: Any) -> float:
        """The worst relative L2 error of a contestant's gradients; raises WrongResult beyond twice that of the block in bf16."""
        error, limit = self._worst(result), ERROR_FACTOR * self.in_bf16
        if not error <= limit:
            raise WrongResult(f"relative L2 error {error:.3g} of a gradient; the limit is {limit:.3g}")
        return error

    def _worst(self, grads: Any) -> float:
        if not all(grad.isfinite().all() for grad in grads):
            raise WrongResult("a gradient has elements NaN or infinite")
        return max(relative_l2(grad, expected) for grad, expected in zip(grads, self.expected, strict=True))

    @staticmethod
    def _gradients(block: Block, x: torch.Tensor, dout: torch.Tensor) -> Any:
        model = LlamaBlock(block, _sdpa(block, x.device), x.device, x.dtype)
        return _step(model, list(model.parameters()), x, dout, nullcontext)(0)


@contextmanager
def _efficient(device: torch.device) -> Iterator[None]:
    """torch's memory-efficient attention, which knows float32 too; on a CPU whatever there is."""
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]) if device.type == "cuda" else nullcontext():
        yield


def _flashtile(block: Block, device: torch.device) -> Attend:
    return lambda q, k, v: flashtile.attention(q, k, v, causal=True)


def _sdpa(block: Block, device: torch.device) -> Attend:
    """torch SDPA with keys and values repeated for each query head, which every backend takes."""
    group = block.num_heads_q // block.num_heads_kv

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return attend


def _sdpa_of_groups(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch SDPA that shares keys and values over a group itself."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _cudnn(block: Block, device: torch.device) -> Attend:
    """With cuDNN's own groups where this torch has them, for that is the less work."""
    q, k = (torch.ones(1, 64, heads, block.head_dim, device=device, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 1))
    try:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            torch.autograd.grad(_sdpa_of_groups(q, k, k).sum(), [q, k])
    except RuntimeError:
        return _sdpa(block, device)
    return _sdpa_of_groups


_ATTEND: dict[str, tuple[Callable[[Block, torch.device], Attend], SDPBackend | None]] = {
    OURS: (_flashtile, None), "cudnn": (_cudnn, SDPBackend.CUDNN_ATTENTION), "sdpa": (_sdpa, None),
}  # fmt: skip
