"""attention and attention_varlen on the GPU: compiled callers, CUDA graphs with other lengths, what is compiled, other devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashtile
from flashtile import UnsupportedError, reference
from flashtile.kernels import launch
from flashtile.testing import poison
from flashtile.testing.forward_cases import ForwardCase
from flashtile.testing.forward_inputs import make_forward_inputs
from flashtile.testing.tolerance import assert_close

SHAPE: dict[str, Any] = {"num_heads_q": 8, "num_heads_kv": 2, "head_dim": 128, "dtype": "bfloat16", "causal": True}
PLAIN = ForwardCase("plain", 300, 417, batch=2, **SHAPE)
PACKED = ForwardCase("packed", (200, 1, 77), (300, 64, 77), **SHAPE)
PAGED = ForwardCase("paged", (200, 1, 77), (300, 64, 77), page_size=16, **SHAPE)


def args_of(case: ForwardCase, device: torch.device, seed: int = 0) -> dict[str, Any]:
    return make_forward_inputs(case, device, seed=seed).args


def run_with_lse(args: dict[str, Any], **others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return (flashtile.attention_varlen_with_lse if "cu_seqlens_q" in args else flashtile.attention_with_lse)(**args, **others)


@pytest.mark.parametrize("case", [PLAIN, PACKED, PAGED], ids=lambda case: case.name)
def test_a_compiled_caller_without_graph_breaks(case: ForwardCase, device: torch.device) -> None:
    args = args_of(case, device)
    rest = {name: value for name, value in args.items() if name != "q"}

    def block(q: torch.Tensor) -> torch.Tensor:
        return run_with_lse({"q": q * 0.5, **rest})[0] + 1.0

    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(compiled(args["q"]), block(args["q"]), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("case", [PLAIN, PACKED, PAGED], ids=lambda case: case.name)
def test_out_is_filled_and_returned(case: ForwardCase, device: torch.device) -> None:
    args = args_of(case, device)
    out, _ = poison.outputs(args["q"], 128)
    got, lse = run_with_lse(args, out=out)
    assert got is out
    assert_close(out, lse, *reference.forward(**args), dtype=torch.bfloat16)


@pytest.mark.parametrize("case", [PACKED, PAGED], ids=lambda case: case.name)
def test_a_graph_replays_with_other_lengths(case: ForwardCase, device: torch.device) -> None:
    args = args_of(case, device)
    run_with_lse(args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run_with_lse(args)
    for starts in ([0, 200, 201, 278], [0, 0, 130, 140], [0, 5, 6, 7]):
        lengths = {"cu_seqlens_q": starts}
        lengths |= {"seqused_k": [300, 11, 77]} if case.page_size else {"cu_seqlens_k": [0, 9, 160, 441]}
        for name, values in lengths.items():
            args[name].copy_(torch.tensor(values, dtype=torch.int32))
        # What belonged to nobody before may belong to somebody now.
        for name in ("q", "k", "v"):
            args[name].normal_()
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert_close(out, lse, *reference.forward(**args), dtype=torch.bfloat16, what=f"starts {starts}")


def test_neighbouring_lengths_compile_few_kernels(device: torch.device) -> None:
    # a head_dim that no other test uses, so that nothing is compiled yet
    q, k = (torch.randn(1, 1200, heads, 104, dtype=torch.bfloat16, device=device) for heads in (4, 2))
    before = launch.compilations()
    for length in range(900, 1200, 7):
        flashtile.attention(q[:, :length], k[:, :length], k[:, :length], causal=True)
    assert 1 <= launch.compilations() - before <= 2


def test_a_plan_of_the_cpu_engine_is_refused_on_a_gpu(device: torch.device) -> None:
    with pytest.raises(UnsupportedError, match=r"cpu\.forward"):
        run_with_lse(args_of(PLAIN, device), plan=flashtile.ForwardPlan("cpu.forward"))


def test_a_gradient_of_pages_is_refused_before_anything_runs(device: torch.device) -> None:
    args = args_of(PAGED, device)
    args["k"].requires_grad_()
    with pytest.raises(UnsupportedError, match=r"page_table: .*torch\.no_grad\(\)"):
        flashtile.attention_varlen(**args)


def test_a_device_that_is_not_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = torch.device("cuda", 1)
    args = args_of(PLAIN, other)
    with torch.cuda.device(0):
        out, lse = run_with_lse(args)
        assert torch.cuda.current_device() == 0
    assert out.device == other
    torch.cuda.synchronize(other)
    assert_close(out, lse, *reference.forward(**args), dtype=torch.bfloat16)
