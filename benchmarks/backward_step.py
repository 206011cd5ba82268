"""A training step's attention, forward and backward through autograd: the host's time to issue it, and the memory that it takes.

Protocol of memory: peak bytes that torch's allocator hands out during one step beyond what lies there before it (q, k, v, the gradient
of out), after a step that has compiled everything and left its workspaces.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend

import flashtile
from benchmarks import timing
from benchmarks.backward_check import GradientOracle
from benchmarks.backward_grids import BOTH_WAYS, BackwardShape
from benchmarks.backward_sets import BackwardSets
from benchmarks.forward_peers import ensure_sdpa_can
from benchmarks.forward_sets import num_sets
from benchmarks.refusals import Refused
from benchmarks.timed_trials import OURS, Options, host_us_of, time_all, with_rates
from benchmarks.trials import Trials
from flashtile.testing.backward_peers import Grads
from flashtile.testing.peers import by_backend, sdpa

MEMORY_PROTOCOL = " ".join((__doc__ or "").split("Protocol of memory: ")[1].split())
Attend = Callable[[Grads], torch.Tensor]
"""q, k and v to out, each (b, seqlen, heads, dim)."""


def measure_step(shape: BackwardShape, options: Options, step: Callable[[str], None]) -> dict[str, Any]:
    """GPU time and the host's time of a step of each contestant, gradients checked; ``flops`` are those of both directions."""
    sets = BackwardSets(shape, options.device, num_sets(shape, options.device))
    oracle = GradientOracle(sets)
    trials = Trials(options.device, step)
    for name in (OURS, *options.peers):
        trials.enter(name, lambda name=name: step_of(name, sets), oracle)  # type: ignore[misc]
    hosts: dict[str, float] = {}
    if options.device.type == "cuda":  # first, for a step that no graph holds has a host's time all the same
        for name, fn in list(trials.fns.items()):
            trials.attempt(name, lambda name=name, fn=fn: hosts.update({name: host_us_of(fn, sets.count)}))  # type: ignore[misc]
    time_all(trials, dict.fromkeys(trials.fns, oracle.error), sets, options)
    for name, host_us in hosts.items():
        trials.results[name]["host_us"] = host_us
    flops = BOTH_WAYS * shape.flops
    return shape.facts() | {"sets": sets.count, "flops": flops, "results": with_rates(trials.results, flops)}


def measure_memory(shape: BackwardShape, options: Options, step: Callable[[str], None]) -> dict[str, Any]:
    """Peak bytes of a step of each contestant."""
    if options.device.type != "cuda":
        raise Refused("memory is measured on a GPU, where torch's allocator counts it")
    sets = BackwardSets(shape, options.device)
    oracle = GradientOracle(sets)
    trials = Trials(options.device, step)
    for name in (OURS, *options.peers):
        trials.enter(name, lambda name=name: step_of(name, sets), oracle)  # type: ignore[misc]
    for name, fn in list(trials.fns.items()):
        trials.attempt(name, lambda name=name, fn=fn: trials.results[name].update(peak_bytes=_peak_bytes(fn)))  # type: ignore[misc]
    return shape.facts() | {"results": trials.results}


def step_of(name: str, sets: BackwardSets) -> timing.Contestant:
    """A step of one contestant: its forward call on leaves that want gradients, then theirs."""
    attend = _ATTEND[name](sets)
    leaves = [sets.leaves(i) for i in range(sets.count)]
    dout = sets.dout
    return lambda i: torch.autograd.grad(attend(leaves[i]), leaves[i], dout[i])


def _flashtile(sets: BackwardSets) -> Attend:
    causal, scale = sets.shape.causal, sets.scale
    return lambda qkv: flashtile.attention(*qkv, causal=causal, scale=scale)


def _sdpa(sets: BackwardSets) -> Attend:
    ensure_sdpa_can(sets.shape)
    causal = sets.shape.causal
    return lambda qkv: sdpa(*qkv, causal)


def _flash_attention_4(sets: BackwardSets) -> Attend:
    try:
        from flash_attn.cute import flash_attn_func
    except Exception as error:
        raise Refused(f"flash_attn.cute: {error}") from error

    def attend(qkv: Grads) -> torch.Tensor:
        result = flash_attn_func(*qkv, softmax_scale=sets.scale, causal=sets.shape.causal)
        out: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return out

    return attend


_ATTEND: dict[str, Callable[[BackwardSets], Attend]] = {
    OURS: _flashtile, "fa4": _flash_attention_4, "sdpa": _sdpa,
    "cudnn": lambda sets: by_backend(SDPBackend.CUDNN_ATTENTION, _sdpa(sets)),
    "torch_flash": lambda sets: by_backend(SDPBackend.FLASH_ATTENTION, _sdpa(sets)),
}  # fmt: skip


def _peak_bytes(fn: timing.Contestant) -> int:
    fn(0)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = fn(0)
    torch.cuda.synchronize()
    del grads
    return torch.cuda.max_memory_allocated() - before
