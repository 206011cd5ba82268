"""How kernels are described, and compiled once: without a GPU, and mostly without a compiler."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashtile.errors import ToolchainError, UnsupportedError

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources

from flashtile.kernels import launch
from flashtile.kernels.launch import Launch
from flashtile.kernels.spec import Arg, Spec
from tests.cpu.kernels.fake_kernel import KERNEL, SM90, FakeKernel, Outer, View, spec_of

CPU = torch.device("cpu")


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
