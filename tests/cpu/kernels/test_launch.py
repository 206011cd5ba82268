"""How kernels are described, compiled once and launched: without a GPU, and mostly without a compiler."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from flashtile.errors import ToolchainError, UnsupportedError
from flashtile.kernels.call import DecodeCall
from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device
from flashtile.problem import Problem

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from flashtile.kernels import combine, decode, launch
from flashtile.kernels.launch import Arg, Launch, Spec

CPU = torch.device("cpu")
SM90 = GPUTarget("cuda", 90, 32)


class View(NamedTuple):
    ptr: Any
    stride: Any


class Outer(NamedTuple):
    view: Any
    number: Any


def device_function(x, y, n, SIZE):  # type: ignore[no-untyped-def]
    """Stands for a kernel: three run-time parameters and a constant."""


KERNEL = JITFunction(device_function)


def spec_of(**changes: Any) -> Spec:
    args = {"x": View(Arg("*bf16", 16), Arg("i64", 8)), "y": Outer(View(None, Arg("i32")), None), "n": Arg("i32")}
    return Spec(KERNEL, args | changes, {"SIZE": 64}, {"num_warps": 4})


def test_views_become_nested_types_with_what_is_none_compiled_away() -> None:
    source = spec_of().source()
    assert source.signature == {
        "x": View("*bf16", "i64"),
        "y": Outer(View("constexpr", "i32"), "constexpr"),
        "n": "i32",
        "SIZE": "constexpr",
    }
    assert type(source.signature["y"].view) is View
    assert source.constants == {(1, 0, 0): None, (1, 1): None, (3,): 64}


def test_only_known_divisors_are_promised() -> None:
    assert spec_of().source().attrs == {(0, 0): [["tt.divisibility", 16]], (0, 1): [["tt.divisibility", 8]]}
    assert spec_of(x=View(Arg("*bf16", 1), Arg("i64"))).source().attrs == {}


def test_equal_specs_share_a_key_and_unlike_ones_do_not() -> None:
    assert spec_of().key() == spec_of().key()
    assert hash(spec_of().key()) == hash(spec_of().key())
    unlike = [
        spec_of(),
        spec_of(n=Arg("i64")),
        spec_of(n=Arg("i32", 16)),
        spec_of(n=None),
        spec_of(y=Outer(View(Arg("*fp32"), Arg("i32")), None)),
        Spec(KERNEL, spec_of().args, {"SIZE": 128}, {"num_warps": 4}),
        Spec(KERNEL, spec_of().args, {"SIZE": 64}, {"num_warps": 8}),
    ]
    assert len({spec.key() for spec in unlike}) == len(unlike)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has compiled nothing, and compiles for a GPU that is not there."""
    monkeypatch.setattr(launch, "_COMPILED", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    driver = SimpleNamespace(get_current_target=lambda: SM90)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver, raising=False)
    monkeypatch.setattr(triton.runtime.driver, "_default", driver, raising=False)
    return


def test_many_threads_compile_a_kernel_once(no_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def slow_compile(spec: Spec, target: GPUTarget) -> Any:
        compiled.append(spec.key())
        time.sleep(0.02)
        return FakeKernel()

    monkeypatch.setattr(launch, "compile_spec", slow_compile)
    before = launch.compilations()
    specs = [spec_of(), spec_of(n=Arg("i64"))]
    got: list[Launch] = []
    start = threading.Barrier(8)

    def work(i: int) -> None:
        start.wait()
        got.append(launch.launcher(specs[i % 2], CPU))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert len(compiled) == len(set(compiled)) == 2
    assert launch.compilations() - before == 2
    assert len({id(one.run) for one in got}) == 2
    assert got[0].constants == (64,)


def test_each_device_has_a_launcher_of_its_own(no_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "compile_spec", lambda spec, target: FakeKernel())
    first, second = (launch.launcher(spec_of(), torch.device("cuda", i)) for i in range(2))
    assert first.run is not second.run
    assert launch.launcher(spec_of(), torch.device("cuda", 0)).run is first.run


def fail(error: Exception) -> Callable[..., Any]:
    def raising(*args: Any) -> Any:
        raise error

    return raising


def test_a_kernel_that_exceeds_the_device_is_unsupported(no_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "compile_spec", fail(OutOfResources(300_000, 232_448, "shared memory")))
    before = launch.compilations()
    with pytest.raises(UnsupportedError, match=r"device_function does not fit a GPU.*300000.*smaller tile"):
        launch.launcher(spec_of(), CPU)
    assert launch.compilations() == before


@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler."), FileNotFoundError("gcc")])
def test_a_missing_c_compiler_is_named(error: Exception, no_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(launch, "compile_spec", fail(error))
    with pytest.raises(ToolchainError, match=r"C compiler: expected gcc or clang .* got none\. Install one .*apt install gcc.* CC"):
        launch.launcher(spec_of(), CPU)


def test_a_c_compiler_that_fails_points_to_pythons_headers(no_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(launch, "compile_spec", fail(subprocess.CalledProcessError(1, ["gcc", "main.c"])))
    with pytest.raises(ToolchainError, match=r"one that failed \(Command .*gcc.*python3-dev"):
        launch.launcher(spec_of(), CPU)


def test_other_errors_of_the_compiler_stay_what_they_are(no_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(launch, "compile_spec", fail(RuntimeError("PassManager::run failed")))
    with pytest.raises(RuntimeError, match="PassManager") as raised:
        launch.launcher(spec_of(), CPU)
    assert not isinstance(raised.value, ToolchainError)


def test_the_compiler_that_is_configured_is_the_one_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in ("clang", "special-cc", "cc") else None)
    monkeypatch.delenv("CC", raising=False)
    assert launch.c_compiler() == "/usr/bin/clang"
    monkeypatch.setenv("CC", "special-cc")
    assert launch.c_compiler() == "/usr/bin/special-cc"
    monkeypatch.setenv("CC", "nowhere")
    assert launch.c_compiler() is None


class FakeKernel:
    """A compiled kernel that notes how it is launched: ("direct" or "triton", arguments)."""

    function = 1234
    packed_metadata = (4, 1, 0)
    metadata = SimpleNamespace(target=GPUTarget("hip", "gfx942", 64))

    def __init__(self, **attributes: Any) -> None:
        self.calls: list[tuple[str, Any]] = []
        known = {"launch_cooperative_grid": False, "launch_pdl": True, "arg_annotations": "annotations", "kernel_signature": b"signature"}
        self.run = SimpleNamespace(launch=lambda *args: self.calls.append(("direct", args)), **(known | attributes))

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *args, stream: self.calls.append(("triton", (grid, stream, args)))

    def launched(self, target: GPUTarget = SM90) -> list[tuple[str, Any]]:
        launch._raw_launch(self, self.run, target)(7, 3, 99, (10, 20), None, 5)
        return self.calls


BINARY = {
    "target": SM90, "num_warps": 4, "num_ctas": 1, "shared": 1000, "launch_pdl": True, "launch_cooperative_grid": False,
}  # fmt: skip


@pytest.fixture
def binary_takes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What ``kernel_of`` makes of a binary whose parameters have these sizes."""

    def kernel_of(sizes: list[int], run: Any = None, **metadata: Any) -> Any:
        monkeypatch.setattr(launch, "parameter_sizes", lambda cubin: sizes)
        compiled = SimpleNamespace(function=1234, metadata=SimpleNamespace(**(BINARY | metadata)), asm={"cubin": b""})
        return launch.kernel_of(compiled, run or SimpleNamespace(), spec_of())

    return kernel_of


def test_a_kernel_is_launched_directly_where_its_binary_takes_what_we_pass(binary_takes: Callable[..., Any]) -> None:
    sizes = [8, 8, 4, 4, 8, 8]  # x.ptr, x.stride, y.view.stride, n, and Triton's two
    assert binary_takes(sizes) == (1234, 128, 1000, True, False, (("*bf16", "i64"), ((None, "i32"), None), "i32", None), 2)
    assert binary_takes(sizes[:-1]) is None
    assert binary_takes([8, *sizes]) is None
    assert binary_takes(sizes, num_ctas=2) is None
    assert binary_takes(sizes, target=GPUTarget("hip", "gfx942", 64)) is None
    assert binary_takes(sizes, run=SimpleNamespace(global_scratch_size=128)) is None
    assert binary_takes(sizes, run=SimpleNamespace(profile_scratch_size=128)) is None


def test_a_triton_that_names_its_facts_otherwise_launches_itself() -> None:
    assert launch.kernel_of(SimpleNamespace(metadata=SimpleNamespace(target=SM90)), SimpleNamespace(), spec_of()) is None


BY_TRITON = [("triton", ((7, 3, 1), 99, ((10, 20), None, 5)))]


@pytest.mark.parametrize("version", ["3.6.0", "3.6.1+git1234", "3.7.0", "3.7.1"])
def test_known_tritons_are_launched_directly(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    ((way, args),) = FakeKernel().launched()
    assert way == "direct"
    assert args[:7] == (7, 3, 1, 99, 1234, False, True)


@pytest.mark.parametrize("version", ["3.5.1", "3.8.0", "4.0.0", "3.70.0"])
def test_unknown_tritons_are_asked_to_launch(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    assert FakeKernel().launched() == BY_TRITON


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1"])
def test_kernels_that_need_more_than_a_launch_are_left_to_triton(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    assert FakeKernel(global_scratch_size=128).launched() == BY_TRITON
    assert FakeKernel(profile_scratch_size=128).launched() == BY_TRITON
    assert FakeKernel().launched(GPUTarget("hip", "gfx942", 64)) == BY_TRITON
    other = FakeKernel()
    del other.run.launch
    assert other.launched() == BY_TRITON


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1"])
@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_that_listens_later_hears_every_launch(version: str, hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    kernel = FakeKernel()
    run = launch._raw_launch(kernel, kernel.run, SM90)

    def listener(*_: Any) -> None:
        pass

    for _ in range(2):
        run(1, 1, 0)
        getattr(triton.knobs.runtime, hook).add(listener)
        try:
            run(1, 1, 0)
        finally:
            getattr(triton.knobs.runtime, hook).remove(listener)
    assert [way for way, _ in kernel.calls] == ["direct", "triton"] * 2


def test_the_installed_triton_is_launched_as_it_launches_itself() -> None:
    """Fails at a Triton whose launcher takes other arguments, or that nobody has looked at yet."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    assert version in ((3, 6), (3, 7)), (
        f"teach launch.py how Triton {triton.__version__} launches, or accept the slower way, and list it here"
    )
    from triton.backends.nvidia.driver import CudaLauncher

    calls: list[tuple[Any, ...]] = []
    launcher = object.__new__(CudaLauncher)
    launcher.launch = lambda *args: calls.append(args)
    launcher.num_ctas, launcher.launch_cooperative_grid, launcher.launch_pdl = 1, "cooperative", "pdl"
    launcher.global_scratch_size = launcher.profile_scratch_size = 0
    launcher.global_scratch_align = launcher.profile_scratch_align = 1
    if version == (3, 7):
        launcher.arg_annotations, launcher.kernel_signature = "annotations", "signature"
    # what its constructor sets, and what a compiled kernel holds
    assert set(vars(launcher)) <= set(CudaLauncher.__init__.__code__.co_names)
    assert {"_run", "function", "packed_metadata"} <= set(CompiledKernel.__init__.__code__.co_names)
    kernel = object.__new__(CompiledKernel)
    kernel.module, kernel._run, kernel.function, kernel.packed_metadata = "module", launcher, "function", "metadata"
    kernel.name, kernel.src = "name", None

    kernel[7, 3, 1]((10, 20), None, 5, stream=99)
    direct = launch._raw_launch(kernel, kernel.run, SM90)
    assert direct.__name__ == f"by_launcher_{version[0]}{version[1]}"
    direct(7, 3, 99, (10, 20), None, 5)
    by_triton, ours = calls
    assert len(by_triton) == len(ours)
    hooks = (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook)
    for theirs, mine in zip(by_triton, ours):
        if theirs in hooks or type(theirs).__name__ == "LazyDict":
            assert mine is None
        else:
            assert mine == theirs


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> dict[Any, int]:
    """How often each kernel is asked for; none is compiled, and launches do nothing."""
    asked: dict[Any, int] = {}

    def note(spec: Spec, device: torch.device) -> Launch:
        asked[spec.key()] = asked.get(spec.key(), 0) + 1
        return Launch(lambda *args: None, ())

    monkeypatch.setattr(decode, "launcher", note)
    monkeypatch.setattr(combine, "launcher", note)
    return asked


def step(device: Device, *, max_seqlen_k: int | None = None, **tensors: torch.Tensor) -> None:
    problem = Problem.decode(**tensors, max_seqlen_k=max_seqlen_k)
    plan = plan_decode(problem, device)
    call = DecodeCall(**tensors, page_table=None, cu_seqlens_q=None, sinks=None, alibi_slopes=None,
                      out=tensors["q"], lse=None, scale=1.0, softcap=0.0)  # fmt: skip
    decode.bind(problem, plan, CPU)(call)


@pytest.mark.parametrize("growth", ["cache", "hint"])
@pytest.mark.parametrize("first", [1, 900, 4000, 16_000, 32_000])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("heads", [(32, 8, 128), (64, 1, 128), (16, 16, 64)], ids=str)
def test_a_thousand_growing_lengths_ask_for_at_most_four_kernels(
    heads: tuple[int, int, int], batch: int, first: int, growth: str, asked_for: dict[Any, int]
) -> None:
    heads_q, heads_kv, dim = heads
    k, v = torch.empty(2, batch, first + 1000, heads_kv, dim, dtype=torch.bfloat16)
    q, lengths = torch.empty(batch, 1, heads_q, dim, dtype=torch.bfloat16), torch.empty(batch, dtype=torch.int32)
    device = Device.named("h200")
    # plans change at most every 64 keys
    for length in range(first, first + 1000, 16):
        if growth == "hint":
            step(device, q=q, k_cache=k, v_cache=v, seqlens_k=lengths, max_seqlen_k=length)
        else:
            step(device, q=q, k_cache=k[:, :length], v_cache=v[:, :length], seqlens_k=lengths)
    assert 1 <= len(asked_for) <= 4


def test_a_run_of_lengths_is_planned_anew_only_at_steps() -> None:
    k = torch.empty(1, 3000, 8, 128, dtype=torch.bfloat16)
    q, lengths = torch.empty(1, 1, 32, 128, dtype=torch.bfloat16), torch.empty(1, dtype=torch.int32)
    problems = {Problem.decode(q, k, k, lengths, max_seqlen_k=length) for length in range(1000, 2000)}
    assert len(problems) <= 10
