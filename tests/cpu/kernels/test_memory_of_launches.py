"""Every address that a kernel is launched with lies in a tensor that is still there: one let go before is another's memory by then."""

from __future__ import annotations

import struct
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashtile.ops import backward as backward_ops
from flashtile.ops import forward as forward_ops
from flashtile.ops import prepared
from flashtile.planner.device import Device
from flashtile.testing.append_cases import AppendCase

pytest.importorskip("triton")

from flashtile.kernels import append, backward, block, combine, decode, forward, launch, spec
from flashtile.kernels.gluon import backward_sm90, forward_counter, forward_sm90
from flashtile.kernels.launch import Launch, Spec
from tests.cpu.kernels.fake_gpu import STREAM, FakeGpu

pytestmark = pytest.mark.skipif(launch.c_compiler() is None, reason="the module is C")

COUNTER = 0x12340  # of a stream's tiles, which no call allocates


class Tensors(TorchDispatchMode):
    """The tensors that operations of torch's have made, as long as they are there."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self.made = [weakref.ref(tensor) for tensor in given]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made += [weakref.ref(tensor) for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        return result

    def hold(self, address: int) -> bool:
        storages = [tensor.untyped_storage() for ref in self.made if (tensor := ref()) is not None]
        return any(storage.data_ptr() <= address < storage.data_ptr() + storage.nbytes() for storage in storages)


class Watched:
    """Launches of a call, each looked at when it is made."""

    def __init__(self, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpu = gpu
        self.kernels: Counter[str] = Counter()  # by their module
        self._tensors: Tensors | None = None
        for module in (append, backward, backward_sm90, combine, decode, forward, forward_sm90):
            monkeypatch.setattr(module, "launcher", self._launcher)
        for module in (backward_sm90, forward_sm90):
            monkeypatch.setattr(module, "on_device", lambda run, device: gpu._runner(run))
        # a tensor map that says no more than where its tensor begins
        monkeypatch.setattr(spec, "encoded", lambda meta, x: ((x.data_ptr(),), *x.shape, *x.stride()))
        monkeypatch.setattr(block, "_bytes_of", lambda tensor_map: struct.pack("<Q120x", *tensor_map))
        monkeypatch.setattr(forward_counter.TileCounters, "address", lambda self, stream: (COUNTER, None))

    def run(self, call: Callable[..., Any], **args: Any) -> None:
        """One call, with nothing of an earlier one."""
        with Tensors([arg for arg in args.values() if isinstance(arg, torch.Tensor)]) as self._tensors:
            call(**args)
        self._tensors = None

    def _launcher(self, spec: Spec, device: torch.device) -> Launch:
        launched = self.gpu._launcher(spec, device)

        def run(grid_x: int, grid_y: int, stream: Any, *args: Any) -> None:
            launched.run(grid_x, grid_y, stream, *args)
            if self._tensors is None:
                return
            self.kernels[spec.kernel.fn.__module__.removeprefix("flashtile.kernels.")] += 1
            for offset, address, _ in self.gpu.longer[-1][3].pointers:
                assert address == COUNTER or self._tensors.hold(address), f"{spec.kernel.__name__}: the address at {offset}"

        return launched._replace(run=run)


@pytest.fixture
def watched(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(gpu, monkeypatch)


def test_a_tensor_that_was_let_go_is_noticed(watched: Watched) -> None:
    kernel = watched._launcher(backward.sinks_spec(), torch.device("cpu"))
    end = (4, *kernel.constants)
    watched.run(lambda x: kernel.run(1, 1, STREAM, x.data_ptr(), x.data_ptr(), *end), x=torch.empty(4))
    with pytest.raises(AssertionError, match="backward_sinks_kernel: the address at 0"):
        watched.run(lambda x: kernel.run(1, 1, STREAM, torch.empty(4).data_ptr(), x.data_ptr(), *end), x=torch.empty(4))


@pytest.mark.parametrize("wishes", [{"num_splits": 4}, {"num_splits": 1}, {}], ids=str)
def test_decode(wishes: dict[str, int], watched: Watched) -> None:
    q, lengths = torch.zeros(3, 2, 8, 64, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int32)
    k, v = (torch.zeros(9, 16, 2, 64).to(torch.float8_e4m3fn) for _ in range(2))
    watched.run(
        watched.gpu.decode, q=q, k_cache=k, v_cache=v, seqlens_k=lengths, page_table=torch.zeros(3, 6, dtype=torch.int32)[:, :3],
        leftpad_k=lengths, k_scale=torch.ones(1, 2).expand(3, 2), v_scale=torch.ones(()), sinks=torch.zeros(8),
        alibi_slopes=torch.zeros(3, 9)[:, :8], want_lse=True, **wishes,
    )  # fmt: skip
    assert watched.kernels["decode"] == 1


@pytest.mark.parametrize("case", [AppendCase(), AppendCase(page_size=8), AppendCase(new=(2, 0, 9), queries=(2, 0, 4))], ids=str)
def test_append(case: AppendCase, watched: Watched) -> None:
    args = case.arguments()
    for name in ("rotary_cos", "rotary_sin"):  # copied, for they are no contiguous tables
        args[name] = torch.cat([args[name], args[name]], dim=1)[:, : args[name].shape[1]]
    watched.run(watched.gpu.append, **args)
    assert watched.kernels["append"] == 1


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_forward_on_hopper(packed: bool, watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_ops, "kernel_module", lambda plan: forward_sm90)
    watched.run(watched.gpu.forward, sinks=torch.zeros(8), want_lse=True, **forward_args(packed, 128))
    assert watched.kernels == {"gluon.forward_sm90": 1}


def forward_args(packed: bool, dim: int) -> dict[str, Any]:
    lead = (8192,) if packed else (2, 4096)
    q, k, v = (torch.zeros(*lead, heads, dim, dtype=torch.bfloat16) for heads in (8, 2, 2))
    starts = torch.tensor([0, 4096, 8192], dtype=torch.int32) if packed else None
    longest = 4096 if packed else None
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}


TWO_PASSES = ("backward_keys", "backward_queries")
PLANS = {
    ("a100", 64, False): TWO_PASSES,
    ("h200", 64, False): ("gluon.backward_whole", "gluon.backward_sums"),
    ("h200", 64, True): tuple(f"gluon.{name}" for name in TWO_PASSES),
    ("h200", 192, True): ("gluon.backward_wide_keys", "gluon.backward_wide_queries"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("kind", PLANS, ids=str)
def test_backward(packed: bool, kind: tuple[str, int, bool], watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    device, dim, deterministic = kind
    monkeypatch.setattr(backward_ops, "_PREPARED", {})
    monkeypatch.setattr(backward_ops, "bound", lambda module, problem, plan, device: module.bind(problem, plan, device))
    monkeypatch.setattr(backward_ops, "kernel_module", prepared.kernel_module)
    monkeypatch.setattr(backward_ops.Device, "of", lambda of: Device.named(device))
    args = forward_args(packed, dim)
    q = args["q"]
    *batch, rows, heads, _ = q.shape
    one = torch.zeros((), dtype=q.dtype)
    watched.run(
        backward_ops.backward, out=torch.zeros_like(q), lse=torch.zeros(*batch, heads, rows), dout=one.expand(q.shape),
        dlse=one.float().expand(*batch, heads, rows), seqused_k=None, causal=True, window=None, softcap=0.0, scale=None,
        sinks=torch.zeros(8), alibi_slopes=None, allow_tf32=False, deterministic=deterministic, want_dsinks=True, **args,
    )  # fmt: skip
    assert watched.kernels == {"backward_delta": 2, **dict.fromkeys(PLANS[kind], 1)}
