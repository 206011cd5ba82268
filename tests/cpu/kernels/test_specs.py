"""What a kernel's module lists for a problem, and `warmup` compiles, is what its calls launch: neither more nor less."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch

from flashtile.cli.shape import Dtype, Operation, make_problem
from flashtile.cli.warmup import as_called
from flashtile.ops import backward as backward_ops
from flashtile.ops import decode as decode_ops
from flashtile.ops import forward as forward_ops
from flashtile.ops import prepared
from flashtile.ops.ahead import PLANNERS, kind_of, specs_of
from flashtile.planner.device import Device

pytest.importorskip("triton")

from flashtile.kernels import backward, block, combine, decode, forward, launch, spec
from flashtile.kernels.gluon import backward_sm90, decode_sm90, forward_counter, forward_sm90
from flashtile.kernels.launch import Launch, Spec
from tests.cpu.kernels.fake_gpu import FakeGpu

pytestmark = pytest.mark.skipif(launch.c_compiler() is None, reason="the module is C")

MODULES = (backward, combine, decode, forward, backward_sm90, decode_sm90, forward_sm90)


class Compared:
    """What calls launch, and what the modules of their plans list for them."""

    def __init__(self, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpu = gpu
        self.launched: set[Any] = set()
        self.listed: set[Any] = set()
        for operation in (decode_ops, forward_ops, backward_ops):
            monkeypatch.setattr(operation, "_PREPARED", {})
            monkeypatch.setattr(operation, "kernel_module", prepared.kernel_module)
            monkeypatch.setattr(operation, "bound", self._bound)
        for module in MODULES:
            monkeypatch.setattr(module, "launcher", self._launcher)
        monkeypatch.setattr(spec, "encoded", lambda meta, x: ((x.data_ptr(),), *x.shape, *x.stride()))
        monkeypatch.setattr(block, "_bytes_of", lambda tensor_map: struct.pack("<Q120x", *tensor_map))
        monkeypatch.setattr(forward_counter.TileCounters, "address", lambda self, stream: (0x12340, None))

    def _bound(self, module: Any, problem: Any, plan: Any, device: torch.device) -> Any:
        self.listed |= {kind_of(spec) for spec in specs_of(problem, plan)}
        return module.bind(problem, plan, device)

    def _launcher(self, spec: Spec, device: torch.device) -> Launch:
        launched = self.gpu._launcher(spec, device)

        def run(*args: Any) -> None:
            self.launched.add(kind_of(spec))
            launched.run(*args)

        return launched._replace(run=run)

    @property
    def names(self) -> set[str]:
        return {name for _, name, *_ in self.launched}


@pytest.fixture
def compared(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Compared:
    return Compared(gpu, monkeypatch)


def on(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "of", lambda where: Device.named(device))


@pytest.mark.parametrize("page_size", [0, 16], ids=["contiguous", "pages"])
@pytest.mark.parametrize(
    ("device", "batch", "wishes", "names"),
    [
        ("a100", 1, {"num_splits": 1}, ("decode_kernel",)),
        ("a100", 1, {"num_splits": 4}, ("combine_kernel", "decode_kernel")),
        ("a100", 3, {}, ("combine_kernel", "decode_kernel")),
        ("h200", 1, {"num_splits": 1}, ("decode_sm90_kernel",)),
        ("h200", 1, {"num_splits": 4}, ("combine_kernel", "decode_sm90_kernel")),
        ("h200", 3, {}, ("combine_kernel", "decode_sm90_kernel")),
        ("h200", 64, {}, ("decode_sm90_kernel",)),
    ],
    ids=str,
)
def test_decode(
    device: str,
    batch: int,
    wishes: dict[str, int],
    names: tuple[str, ...],
    page_size: int,
    compared: Compared,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on(device, monkeypatch)
    q = torch.zeros(batch, 1, 8, 128, dtype=torch.bfloat16)
    shape, table = (batch, 4096), None
    if page_size:
        shape, table = (batch * 256, page_size), torch.zeros(batch, 256, dtype=torch.int32)
    k, v = (torch.zeros(*shape, 2, 128, dtype=torch.bfloat16) for _ in range(2))
    lengths = torch.full((batch,), 4096, dtype=torch.int32)
    compared.gpu.decode(q=q, k_cache=k, v_cache=v, seqlens_k=lengths, page_table=table, sinks=torch.zeros(8), **wishes)
    assert compared.launched == compared.listed
    assert compared.names == set(names)


def whole(packed: bool, seqlen: int, dim: int) -> dict[str, Any]:
    lead = (2 * seqlen,) if packed else (2, seqlen)
    q, k, v = (torch.zeros(*lead, heads, dim, dtype=torch.bfloat16) for heads in (8, 2, 2))
    starts = torch.tensor([0, seqlen, 2 * seqlen], dtype=torch.int32) if packed else None
    longest = seqlen if packed else None
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("device", ["a100", "h200"])
def test_forward(device: str, packed: bool, causal: bool, compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    on(device, monkeypatch)
    args = whole(packed, 1024, 128)
    compared.gpu.forward(**args, causal=causal)
    if device == "h200" and causal and not packed:
        assert compared.launched < compared.listed  # the edge of the band lies otherwise for other lengths of the same plan
        args |= {"k": args["k"][:, :1000], "v": args["v"][:, :1000]}
        compared.gpu.forward(**args, causal=causal)
    assert compared.launched == compared.listed
    assert compared.names == {"forward_sm90_kernel" if device == "h200" else "forward_kernel"}


@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(
    ("device", "dim", "deterministic"), [("a100", 64, False), ("h200", 64, False), ("h200", 64, True), ("h200", 192, True)]
)
def test_backward(
    device: str, dim: int, deterministic: bool, packed: bool, sinks: bool, compared: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(device, monkeypatch)
    args = whole(packed, 1024, dim)
    q = args["q"]
    *batch, rows, heads, _ = q.shape
    backward_ops.backward(
        out=torch.zeros_like(q), lse=torch.zeros(*batch, heads, rows), dout=torch.zeros_like(q), dlse=None, seqused_k=None, causal=True,
        window=None, softcap=0.0, scale=None, sinks=torch.zeros(8) if sinks else None, alibi_slopes=None, allow_tf32=False,
        deterministic=deterministic, want_dsinks=sinks, **args,
    )  # fmt: skip
    assert compared.launched == compared.listed
    assert len(compared.launched) == 3 + sinks


def compiled_by_command(
    operation: str, *, page_size: int, packed: bool, after_append: bool = False, batch: int = 2, seqlen_q: int
) -> set[Any]:
    """What ``flashtile warmup --device h200`` compiles for a shape."""
    problem = make_problem(
        Operation(operation), batch=2, seqlen_q=seqlen_q, seqlen_k=1024, heads=8, kv_heads=2, head_dim=128, head_dim_v=None,
        dtype=Dtype.bfloat16, page_size=page_size, window=None, causal=True, softcap=False, alibi=False, sinks=False, dropout=False,
    )  # fmt: skip
    (called,) = as_called([problem], False, packed, after_append)
    return {kind_of(spec) for spec in specs_of(called, PLANNERS[operation](called, Device.named("h200")))}


@pytest.mark.parametrize("after_append", [False, True], ids=["alone", "after_append"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("seqlen_q", [1, 4])
def test_a_shape_of_the_command_is_a_decode_calls(
    seqlen_q: int, packed: bool, after_append: bool, compared: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("h200", monkeypatch)
    q, k, v = (torch.zeros(*shape, 128, dtype=torch.bfloat16) for shape in ((2, seqlen_q, 8), (128, 16, 2), (128, 16, 2)))
    queries: dict[str, Any] = {"q": q}
    if packed:
        starts = torch.tensor([0, seqlen_q, 2 * seqlen_q], dtype=torch.int32)
        queries = {"q": q.flatten(0, 1), "cu_seqlens_q": starts, "max_seqlen_q": seqlen_q}
    lengths, pages = torch.full((2,), 1024, dtype=torch.int32), torch.zeros(2, 64, dtype=torch.int32)
    compared.gpu.decode(**queries, k_cache=k, v_cache=v, seqlens_k=lengths, page_table=pages, after_append=after_append)
    wanted = compiled_by_command("decode", page_size=16, packed=packed, after_append=after_append, seqlen_q=seqlen_q)
    assert compared.launched == wanted


@pytest.mark.parametrize("kind", ["dense", "packed", "pages"])
def test_a_shape_of_the_command_is_a_forward_calls(kind: str, compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    on("h200", monkeypatch)
    args = whole(kind != "dense", 1024, 128)
    if kind == "pages":
        pages = {"page_table": torch.zeros(2, 64, dtype=torch.int32), "seqused_k": torch.full((2,), 1024, dtype=torch.int32)}
        k, v = (torch.zeros(128, 16, 2, 128, dtype=torch.bfloat16) for _ in range(2))
        args |= {"k": k, "v": v, "cu_seqlens_k": None, **pages}
    compared.gpu.forward(**args, causal=True)
    wanted = compiled_by_command("forward", page_size=16 if kind == "pages" else 0, packed=kind == "packed", seqlen_q=1024)
    assert compared.launched <= compared.listed == wanted
